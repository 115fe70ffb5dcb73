"""The launcher: a compiled kernel is found again only for arguments that Triton would compile to the same one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import liger_fn
from liger_fn import _launch


class _Kernel:
    """Stands for a JITFunction: keeps what Triton was asked to launch, and what went to the compiled kernel directly."""

    arg_names = ("x_ptr", "y_ptr", "N", "BLOCK")

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **meta: Any) -> Any:
            self.asked.append((grid, args, meta))
            return {(*grid, 1, 1)[:3]: lambda *all_args: self.direct.append(all_args)}

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> _Kernel:
    monkeypatch.setattr(_launch, "NVIDIA", True)
    monkeypatch.setattr(_launch, "_ready", {})
    return _Kernel()


X = torch.zeros(64)
ODD = torch.zeros(65)[1:]


def _go(
    kernel: Any, x: Any = X, y: Any = None, n: int = 64, block: int = 32, warps: int = 4, grid: tuple[int, ...] = (2,), gpu: int = 0
) -> None:
    _launch._launch(kernel, grid, gpu, (x, y, n), {"BLOCK": block, "num_warps": warps})


def test_the_second_launch_is_direct_with_its_own_tensors(kernel: _Kernel) -> None:
    other = torch.ones(64)
    _go(kernel)
    _go(kernel, x=other)
    assert len(kernel.asked) == 1
    assert kernel.direct == [(other, None, 64, 32)]  # every parameter in order, constexprs last, launch options left out


@pytest.mark.parametrize(
    "change",
    [
        {"x": X.bfloat16()}, {"x": ODD}, {"x": None}, {"y": X}, {"n": 1}, {"n": 2**31}, {"block": 64}, {"warps": 8}, {"grid": (3,)},
        {"grid": (2, 2)}, {"gpu": 1}, {"kernel": _Kernel()},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_specialisation_asks_triton_again(kernel: _Kernel, change: dict[str, Any]) -> None:
    _go(kernel)
    again = {"kernel": kernel} | change
    asked = len(again["kernel"].asked)
    _go(**again)
    assert len(again["kernel"].asked) == asked + 1
    assert kernel.direct == []


def test_shapes_without_end_do_not_fill_memory(kernel: _Kernel) -> None:
    for n in range(2 * _launch._READY_AT_MOST):
        _go(kernel, n=n)
    assert len(_launch._ready) <= _launch._READY_AT_MOST


@pytest.mark.gpu
def test_unaligned_after_aligned_and_back(device: torch.device) -> None:
    """What was compiled for 16-byte aligned pointers would read unaligned ones with vector loads, and fault."""
    flat = torch.randn(8 * 256 + 1, device=device, dtype=torch.bfloat16)
    for start in (0, 1, 0, 1):
        x = flat[start : start + 8 * 256].view(8, 256)
        assert torch.equal(liger_fn.rms_norm(x), liger_fn.rms_norm(x.clone())), start
