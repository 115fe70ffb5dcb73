"""What every test stands on: which machine this is, which backends it can run, and memory that is NaN until somebody writes it.

Without a GPU, Triton's interpreter is switched on before anything imports triton, so that one run on a CPU covers the kernels and the
plain PyTorch backend. With one, the same tests run the compiled kernels.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

# cuBLAS is deterministic only with a fixed workspace, and reads this when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# What an earlier version of an op compiled to must not be found again: to the compiler, an opaque operator has not changed.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default, said aloud, so that Triton 3.9 does not warn about it

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import liger_fn  # noqa: E402  (triton reads TRITON_INTERPRET when it is imported)

from .interpreter import mend  # noqa: E402

pytest.register_assert_rewrite("tests.contract", "tests.compose", "tests.numerics")

if GPU:
    BACKENDS: tuple[str, ...] = ("triton", "reference")
else:
    BACKENDS = ("interpreter", "reference") if liger_fn.backend(torch.empty(0)) == "interpreter" else ("reference",)

if "interpreter" in BACKENDS:
    mend()
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: as many threads each as makes one a core
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "ignore:.*encountered in:RuntimeWarning",  # the interpreter computes in numpy, which warns where a GPU says inf or NaN in silence
        "ignore:.*torch.jit:DeprecationWarning",  # inside torch's own compiler
    ):
        config.addinivalue_line("filterwarnings", line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Classes made from `tests.contract.Contract` say themselves over what their tests run; `backend` alone is every backend."""
    table = getattr(metafunc.cls, "parametrize", None)
    if table is not None:
        table(metafunc, BACKENDS)
    elif "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count()
    need = {"gpu": (1, "needs a GPU"), "multi_gpu": (2, "needs two GPUs"), "large": (1, "needs a GPU with tens of GiB")}
    for item in items:
        for mark, (count, reason) in need.items():
            if item.get_closest_marker(mark) is not None and gpus < count:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device whose tensors the kernels run on here."""
    return torch.device("cuda", torch.cuda.current_device()) if GPU else torch.device("cpu")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """One backend for the whole test. The kernels are what a call takes by itself, so only the reference is forced."""
    if request.param == "reference":
        with liger_fn.use_backend("reference"):
            yield request.param
    else:
        yield request.param


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """`torch.empty` and its kin return NaN (the largest number, for integers), so an element that a kernel leaves unwritten shows.

    This is torch's deterministic mode, which also refuses every operation of torch whose result changes from run to run.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def memory_is_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test at a real size, so that another process may have what PyTorch would keep for this one."""
    yield
    if GPU and any(request.node.get_closest_marker(mark) for mark in ("gpu", "large")):
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_accelerator_is_left() -> Iterator[None]:
    """Accelerate keeps a process's settings, and refuses others in a later test."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None and state.PartialState._shared_state:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Compile from nothing: no graph, guard or counter of an earlier test is left."""
    torch._dynamo.reset()
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
