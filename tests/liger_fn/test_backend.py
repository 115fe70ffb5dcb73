"""Which implementation runs, and what a user reads who asks for one that cannot."""

from __future__ import annotations

import pytest
import torch

import liger_fn
from liger_fn import _launch

INTERPRETED = pytest.mark.skipif(not _launch.INTERPRETED, reason="needs Triton's interpreter")
COMPILED = pytest.mark.skipif(_launch.INTERPRETED or not _launch.HAS_TRITON, reason="needs Triton without its interpreter")


def test_chosen_by_device_and_dtype(device: torch.device) -> None:
    kernels = "interpreter" if _launch.INTERPRETED else "triton"
    x = torch.zeros(2, 3, device=device)
    if _launch.INTERPRETED or (device.type != "cpu" and _launch.HAS_TRITON):
        assert liger_fn.backend(x) == kernels
    assert liger_fn.backend(x.double()) == "reference"
    assert liger_fn.backend(x.to("meta")) == "reference"


def test_forced_and_restored(device: torch.device) -> None:
    x = torch.zeros(2, 3, device=device)
    before = liger_fn.backend(x)
    with liger_fn.use_backend("reference"):
        assert liger_fn.backend(x) == "reference"
        with pytest.raises(ZeroDivisionError), liger_fn.use_backend("reference"):
            1 / 0  # noqa: B018
        assert liger_fn.backend(x) == "reference"
    assert liger_fn.backend(x) == before


def test_backward_runs_where_its_forward_did(backend: str, device: torch.device) -> None:
    x = torch.randn(3, 63, device=device, requires_grad=True)
    with _launch.record() as launches:
        y = liger_fn.rms_norm(x)
    ran = len(launches)
    with liger_fn.use_backend("reference"), _launch.record() as launches:
        y.sum().backward()
    assert (len(launches) > 0) == (ran > 0) == (backend != "reference")


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"use_backend: .*'triton', 'interpreter', 'reference'.*'cuda'"), liger_fn.use_backend("cuda"):  # type: ignore[arg-type]
        pass


@INTERPRETED
def test_compiled_kernels_in_an_interpreting_process() -> None:
    with pytest.raises(RuntimeError, match=r'use_backend: "triton" .*TRITON_INTERPRET=1.*"interpreter"'), liger_fn.use_backend("triton"):
        pass


@COMPILED
def test_interpreter_in_a_compiling_process() -> None:
    with pytest.raises(RuntimeError, match=r'use_backend: "interpreter" .*TRITON_INTERPRET=1'), liger_fn.use_backend("interpreter"):
        pass


@INTERPRETED
def test_kernels_have_no_float64() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64)
    with liger_fn.use_backend("interpreter"), pytest.raises(TypeError, match=r"rms_norm: .*float64.*reference"):
        liger_fn.rms_norm(x)
