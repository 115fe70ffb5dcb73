"""Each function at the sizes of real models against its peers: device time, peak memory, and the floor. Run by `make bench`.

The floor is the least bytes over the copy bandwidth, or the least FLOPs over the matmul rate, measured in the same run.
"""

from __future__ import annotations

import pytest
import torch

from tests.bench import table
from tests.bench.run import Run
from tests.bench.table import Bench, Sizes

pytestmark = pytest.mark.filterwarnings("default")  # what a compiler warns of is no fault of the function it compiles
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [pytest.param(b, s, id=f"{b.op}-{b.shape(s)}") for b in table.present() for s in table.sizes(b, DEVICE)]


@pytest.mark.parametrize(("bench", "sizes"), CASES)
def test_op(run: Run, bench: Bench, sizes: Sizes) -> None:
    run.speed(bench, sizes)
