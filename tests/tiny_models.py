"""Fixtures for folders whose tests run tiny models: their `conftest.py` imports them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import liger_fn


@pytest.fixture(autouse=True)
def reference_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is tested here is who calls whom, so the functions run as plain PyTorch, unless a test names its backends or wants a GPU."""
    if "backend" in request.fixturenames or request.node.get_closest_marker("gpu"):
        yield
    else:
        with liger_fn.use_backend("reference"):
            yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
