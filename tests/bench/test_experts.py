"""The experts of a mixture at the sizes of real models, against dense products of equal work. `make bench BENCH_ARGS="-k experts"`."""

from __future__ import annotations

import pytest
import torch

from tests.bench import experts
from tests.bench.experts import Mixture
from tests.bench.run import Run

pytestmark = pytest.mark.filterwarnings("default")  # what a peer warns of is no fault of the function
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("mixture", [pytest.param(m, id=m.label.replace(" ", "-")) for m in experts.mixtures(DEVICE)])
def test_experts_speed(run: Run, mixture: Mixture) -> None:
    experts.speed(run, mixture)
