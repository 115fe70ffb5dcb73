"""The launcher: a compiled kernel is found again only for arguments that Triton would compile to the same one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import liger_fn
from liger_fn import _launch


class _Compiled:
    """Stands for a CompiledKernel: keeps what came through Triton's own launcher, and what went around it."""

    function, packed_metadata = "function", "packed"

    def __init__(self) -> None:
        self.hooked: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args: self.hooked.append((grid, *args))

    def run(self, *args: Any) -> None:
        self.direct.append(args)


class _Kernel:
    """Stands for a JITFunction: keeps what Triton was asked to launch."""

    arg_names = ("x_ptr", "y_ptr", "N", "BLOCK")
    compiled: _Compiled | None

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.compiled = _Compiled()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **meta: Any) -> Any:
            self.asked.append((grid, args, meta))
            return self.compiled

        return run


HOOKS = SimpleNamespace(calls=[]), SimpleNamespace(calls=[])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> _Kernel:
    monkeypatch.setattr(_launch, "NVIDIA", True)
    monkeypatch.setattr(_launch, "_plans", {})
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(_launch, "_current", lambda device: lambda: device.index)
    monkeypatch.setattr(_launch, "_HOOKS", HOOKS)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: f"stream of {device}", raising=False)
    return _Kernel()


X = torch.zeros(64)
ODD = torch.zeros(65)[1:]


def _go(
    kernel: Any, x: Any = X, y: Any = None, n: int = 64, block: int = 32, warps: int = 4, grid: tuple[int, ...] = (2,), gpu: int = 0
) -> None:
    _launch.launch(kernel, grid, torch.device("cuda", gpu), x, y, n, BLOCK=block, num_warps=warps)


def test_the_second_launch_is_direct_with_its_own_tensors(kernel: _Kernel) -> None:
    other = torch.ones(64)
    _go(kernel)
    _go(kernel, x=other)
    assert len(kernel.asked) == 1
    # the driver's launcher takes the grid, stream, function, metadata, no hooks, then every parameter in order; no launch options
    want = (2, 1, 1, "stream of 0", "function", "packed", None, None, None, other, None, 64, 32)
    assert kernel.compiled.direct == [want]


def test_who_profiles_sees_every_launch(kernel: _Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    _go(kernel)
    monkeypatch.setattr(HOOKS[1], "calls", [print])
    _go(kernel)
    assert kernel.compiled.hooked == [((2, 1, 1), X, None, 64, 32)]
    assert kernel.compiled.direct == []


def test_a_release_of_triton_that_nobody_tried_keeps_its_launcher(kernel: _Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_HOOKS", ())
    _go(kernel)
    _go(kernel)
    assert len(kernel.asked) == 1
    assert kernel.compiled.hooked == [((2, 1, 1), X, None, 64, 32)]


def test_an_interpreted_kernel_is_asked_each_time(kernel: _Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on a GPU, too: the interpreter takes them to the host, and has nothing compiled to return."""
    monkeypatch.setattr(_launch, "INTERPRETED", True)
    kernel.compiled = None
    _go(kernel)
    _go(kernel)
    assert len(kernel.asked) == 2


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
    assert kernel.compiled.direct == []


def test_shapes_without_end_do_not_fill_memory(kernel: _Kernel) -> None:
    for n in range(2 * _launch._PLANS_AT_MOST):
        _go(kernel, n=n)
    assert len(_launch._plans) <= _launch._PLANS_AT_MOST


def test_an_empty_grid_launches_nothing(kernel: _Kernel) -> None:
    _go(kernel, grid=(2, 0))
    assert kernel.asked == []


def test_a_device_is_current_while_its_kernel_is_launched(kernel: _Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0]

    @contextmanager
    def device(other: torch.device) -> Iterator[None]:
        before, now[0] = now[0], other.index
        yield
        now[0] = before

    monkeypatch.setattr(_launch, "_current", lambda device: lambda: now[0])
    monkeypatch.setattr(_launch, "_module", lambda kind: SimpleNamespace(device=device))
    launched_on: list[int] = []
    monkeypatch.setattr(_Compiled, "run", lambda *args: launched_on.append(now[0]))
    for _ in range(2):
        _go(kernel, gpu=1)
    assert (now, launched_on) == ([0], [1])


@pytest.mark.gpu
def test_unaligned_after_aligned_and_back(device: torch.device) -> None:
    """What was compiled for 16-byte aligned pointers would read unaligned ones with vector loads, and fault."""
    flat = torch.randn(8 * 256 + 1, device=device, dtype=torch.bfloat16)
    for start in (0, 1, 0, 1):
        x = flat[start : start + 8 * 256].view(8, 256)
        assert torch.equal(liger_fn.rms_norm(x), liger_fn.rms_norm(x.clone())), start
