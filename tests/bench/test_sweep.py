"""Time and memory by size, ours against peers, for the plots of docs/benchmarks.md. `make bench BENCH_ARGS="-k sweep"` runs these alone."""

from __future__ import annotations

import pytest
import torch

from tests.bench import table
from tests.bench.run import Run
from tests.bench.table import Sizes, Sweep

pytestmark = pytest.mark.filterwarnings("default")  # what a compiler warns of is no fault of the function it compiles
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [pytest.param(s, n, id=f"{s.op}-{s.bench.shape(n)}") for s in table.sweeps() for n in table.sizes(s, DEVICE)]


@pytest.mark.parametrize(("sweep", "sizes"), CASES)
def test_sweep(run: Run, sweep: Sweep, sizes: Sizes) -> None:
    run.sweep(sweep, sizes)
