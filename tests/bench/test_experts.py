"""The experts of a mixture at the sizes of real models, against dense products of equal work. `make bench BENCH_ARGS="-k experts"`."""

from __future__ import annotations

import pytest
import torch

from tests.bench import experts
from tests.bench.experts import Mixture
from tests.bench.run import Run

pytestmark = pytest.mark.filterwarnings("default")  # what a peer warns of is no fault of the function
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


MIXTURES = [pytest.param(m, id=m.label.replace(" ", "-")) for m in experts.mixtures(DEVICE)]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_experts_speed(run: Run, mixture: Mixture) -> None:
    experts.speed(run, mixture)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_experts_that_tune_themselves(run: Run, mixture: Mixture) -> None:
    """Last, since it takes minutes: what was measured before is kept if nobody waits for it."""
    if DEVICE.type != "cuda" or not set(experts.TUNING) & set(mixture.by):
        pytest.skip("nothing here tunes itself")
    experts.speed(run, mixture, tuning=True)
