"""What a call costs the host. Collected before the other benchmarks: a compiler's worker processes would share the cores."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest

from tests.bench import peers, table
from tests.bench.peers import LIGER
from tests.bench.run import Run
from tests.bench.table import Bench


@pytest.mark.parametrize("bench", [pytest.param(b, id=b.op) for b in table.present()])
def test_host_cost(run: Run, bench: Bench, benchmark: Any) -> None:
    run.host(bench)
    rounds, iterations = (10, 25) if run.device.type == "cuda" else (2, 1)
    benchmark.pedantic(run.step(bench), rounds=rounds, iterations=iterations, warmup_rounds=1)  # to keep and compare: --benchmark-autosave


def test_host_cost_is_a_fraction_of_liger_kernels(run: Run) -> None:
    (rms_norm,) = (b for b in table.ALL if b.op == "rms_norm")
    if LIGER not in peers.uncompiled("rms_norm", run.device):
        pytest.skip("needs a GPU and liger-kernel")
    ratios = run.host_pair(rms_norm, LIGER, pairs=100, turns=50).ratios
    print(f"\nhost cost over liger-kernel's: median {median(ratios):.2f}, half of 100 pairs from {ratios[25]:.2f} to {ratios[75]:.2f}")
    assert median(ratios) <= 0.65
