from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

import liger_fn


@pytest.fixture(autouse=True)
def reference_backend() -> Iterator[None]:
    """What is tested here is who calls whom, so the functions run as plain PyTorch."""
    with liger_fn.use_backend("reference"):
        yield


@pytest.fixture(autouse=True)
def any_kernel_of_torch() -> None:
    """Trainers seed and step in ways of their own; torch's deterministic mode, which fills new memory with NaN, is for kernels."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_settings_are_left() -> Iterator[None]:
    """Accelerate keeps a process's settings, and refuses others in the next test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
