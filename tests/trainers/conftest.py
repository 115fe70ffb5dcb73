import pytest
import torch

from tests.tiny_models import one_thread, reference_backend

__all__ = ["one_thread", "reference_backend"]


@pytest.fixture(autouse=True)
def any_kernel_of_torch() -> None:
    """Trainers seed and step in ways of their own; torch's deterministic mode, which fills new memory with NaN, is for kernels."""
    torch.use_deterministic_algorithms(False)
