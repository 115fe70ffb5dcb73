"""Linear cross entropy at the sizes of real models, against the matrix products it is made of. `make bench BENCH_ARGS="-k heads"`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from tests.bench import heads
from tests.bench.run import Run
from tests.bench.table import Sizes

pytestmark = pytest.mark.filterwarnings("default")  # what a compiler warns of is no fault of the function it compiles
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", autouse=True)
def no_compiler_stays() -> Iterator[None]:
    """Each shape is compiled, beyond the number after which the compiler gives up; its workers would share the cores with `test_host`."""
    if DEVICE.type != "cuda":
        yield
        return
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()
    with suppress(ImportError):
        from torch._inductor.async_compile import shutdown_compile_workers

        shutdown_compile_workers()


@pytest.mark.parametrize("sizes", [pytest.param(s, id=heads.label(s)) for s in heads.shapes(DEVICE)])
def test_heads_speed(run: Run, sizes: Sizes) -> None:
    heads.speed(run, sizes)


def test_heads_options(run: Run) -> None:
    heads.options(run)


@pytest.mark.parametrize("n", heads.tokens(DEVICE))
def test_heads_by_tokens(run: Run, n: int) -> None:
    heads.by_tokens(run, n)


def test_heads_errors(run: Run) -> None:
    heads.errors(run)
