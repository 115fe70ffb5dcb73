"""What a call costs the host. Collected before the other benchmarks: a compiler's worker processes would share the cores."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bench import bars, peers, table
from tests.bench.bars import Bar
from tests.bench.run import Run
from tests.bench.table import HOST, Bench

HELD = ("rms_norm", "cross_entropy", "linear_cross_entropy")  # below their bars, and to stay there; the table of bars shows who is not


@pytest.mark.parametrize("bench", [pytest.param(b, id=b.op) for b in table.present()])
def test_host_cost(run: Run, bench: Bench, benchmark: Any) -> None:
    run.host(bench)
    rounds, iterations = (10, 25) if run.device.type == "cuda" else (2, 1)
    benchmark.pedantic(run.step(bench), rounds=rounds, iterations=iterations, warmup_rounds=1)  # to keep and compare: --benchmark-autosave


@pytest.mark.parametrize("bar", [pytest.param(b, id=f"{b.op}-{b.provider}") for bench in table.present() for b in bars.host(bench.op)])
def test_host_cost_is_a_fraction_of_a_peers(run: Run, bar: Bar) -> None:
    (bench,) = (b for b in table.ALL if b.op == bar.op)
    if run.device.type != "cuda" or bar.provider not in peers.uncompiled(bar.op, run.device):
        pytest.skip(f"needs a GPU and {bar.provider}")
    key = bar.op, bar.shape, HOST, bar.provider
    if key not in {r.key for r in run.rows}:
        run.host(bench)
    ((ratio, note),) = ((r.ours_over_this, r.note) for r in run.rows if r.key == key)
    assert ratio is not None, note
    print(f"\n{bar.op}, host cost over {bar.provider}'s, median of pairs of turns: {ratio:.2f}")
    assert ratio <= bar.most or bar.op not in HELD
