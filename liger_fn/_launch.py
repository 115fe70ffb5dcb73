"""Launching kernels: the device guard, block sizes, warps and row views; and a recorder that sees each launch without making it.

Kernels compute offsets in 64 bits (`tl.program_id(0).to(tl.int64)`), so a tensor may hold more than 2^31 elements.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

tl: Any
try:
    import triton
    import triton.language

    tl, HAS_TRITON = triton.language, True
except ImportError:  # Windows, Mac, or a CPU-only install: the reference backend runs, and kernels stay plain functions that nobody calls
    tl, HAS_TRITON = SimpleNamespace(constexpr=int), False

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor: Any = None  # type: ignore[no-redef]

COUNTS = ("N", "T", "blocks", "parts")  # parameters that change from batch to batch; the width of no load depends on them


def jit(fn: Callable[..., Any]) -> Any:
    """`triton.jit`, compiled once whatever the `COUNTS` are; by itself, Triton compiles anew for a count of 1 and for multiples of 16."""
    if not HAS_TRITON:
        return fn
    return triton.jit(fn, do_not_specialize=[name for name in COUNTS if name in inspect.signature(fn).parameters])


INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


class Launch(NamedTuple):
    """One recorded launch: what the compiler would be asked for."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


_recorded: list[Launch] | None = None


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect the launches made inside the block instead of making them, so that meta tensors can tell what a GPU would be asked to run."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


@cache
def _module(kind: str) -> Any:
    """`torch.cuda`, `torch.xpu`, …"""
    return torch.get_device_module(kind)


@cache
def _current(device: torch.device) -> Callable[[], int] | None:
    """What tells the index of the current device of its kind; a tensor of that kind exists, so nothing has to be initialised."""
    if device.type in ("cpu", "meta"):
        return None
    return torch._C._cuda_getDevice if device.type == "cuda" else _module(device.type).current_device


class Plan:
    """A launch without its tensors: `kernel[grid](*tensors, *numbers, **meta)`, where the tensors' parameters are called `…_ptr`; `…_any`
    where they may be `blocks` too.

    Whoever launches the same again keeps the plan (`functools.lru_cache`): it finds the compiled kernel by the dtypes and alignments of the
    tensors alone, and goes to it directly, without asking Triton which one it is.
    """

    __slots__ = ("_blocks", "_ready", "empty", "grid", "kernel", "meta", "numbers")

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: Any, **meta: Any) -> None:
        self.kernel, self.grid, self.numbers, self.meta, self.empty = kernel, grid, numbers, meta, 0 in grid
        self._blocks = any(name.endswith("_any") for name in kernel.arg_names)
        self._ready: dict[tuple[Any, ...], Callable[[tuple[Any, ...]], None]] = {}

    def __call__(self, device: torch.device, *tensors: Any) -> None:
        """Launch on `device`, which need not be the current one. An empty grid launches nothing."""
        current = _current(device)
        if self.empty or _recorded is not None or current is None:
            self._slowly(tensors)
            return
        index = device.index
        if index != current():
            with _module(device.type).device(device):
                self(device, *tensors)
            return
        # All that the compiled kernel depends on beside the plan: of each tensor its dtype, and whether 16 divides its address.
        looked = [getattr(t, "base", t) for t in tensors] if self._blocks else tensors  # what blocks are like, the plan's meta tells
        seen = (index, *[None if t is None else (t.dtype,) if t.data_ptr() % 16 else t.dtype for t in looked])
        ready = self._ready.get(seen)
        if ready is not None:
            ready(tensors)
            return
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.meta)
        if NVIDIA and not INTERPRETED:  # elsewhere Triton compiles by more than the alignment of a pointer, or not at all
            self._ready[seen] = self._direct(compiled, index)

    def _slowly(self, tensors: tuple[Any, ...]) -> None:
        """Not to be launched at all, to be recorded, or interpreted."""
        if self.empty:
            return
        if _recorded is not None:
            _recorded.append(Launch(self.kernel, self.grid, (*tensors, *self.numbers), self.meta))
        else:
            self.kernel[self.grid](*tensors, *self.numbers, **self.meta)

    def _direct(self, compiled: Any, device: int) -> Callable[[tuple[Any, ...]], None]:
        """What launches `compiled`. Triton's own launcher calls its hooks even where there is none: it is left to those who profile."""
        x, y, z = (*self.grid, 1, 1)[:3]
        options = self.kernel.arg_names
        rest = (*self.numbers, *[self.meta[name] for name in options if name in self.meta])
        hooked = compiled[x, y, z]
        if not _HOOKS:
            return lambda tensors: hooked(*tensors, *rest)
        run, function, packed, stream = compiled.run, compiled.function, compiled.packed_metadata, torch._C._cuda_getCurrentRawStream
        enter, leave = _HOOKS

        def direct(tensors: tuple[Any, ...]) -> None:
            if enter.calls or leave.calls:
                hooked(*tensors, *rest)
            else:
                run(x, y, z, stream(device), function, packed, None, None, None, *tensors, *rest)

        return direct


_plans: dict[tuple[Any, ...], Plan] = {}
_PLANS_AT_MOST = 4096
_leading: dict[int, int] = {}  # tensors that a kernel takes, before its numbers; a kernel is never freed


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **meta: Any) -> None:
    """`kernel[grid](*args, **meta)` by a plan that is kept here. `args` are the kernel's tensors, or None for one, then its numbers."""
    name = id(kernel)
    n = _leading.get(name)
    if n is None:
        n = _leading[name] = sum(name.endswith(("_ptr", "_any")) for name in kernel.arg_names)
    key = name, grid, args[n:], *meta.values()
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _PLANS_AT_MOST:  # a new shape at every step: start over
            _plans.clear()
        plan = _plans[key] = Plan(kernel, grid, *args[n:], **meta)
    plan(device, *args[:n])


def _hooks() -> tuple[Any, ...]:
    """The launch hooks of the releases of Triton whose launcher is called as `_direct` does; none of any other."""
    if not HAS_TRITON or not (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9):
        return ()
    runtime = triton.knobs.runtime
    return runtime.launch_enter_hook, runtime.launch_exit_hook


_HOOKS = _hooks()


@cache
def copies_blocks(device: torch.device) -> bool:
    """Has `device` an engine that copies blocks of a tensor to shared memory by itself (TMA)? Of NVIDIA's, Hopper and large Blackwells."""
    if TensorDescriptor is None or device.type in ("cpu", "meta"):
        return TensorDescriptor is not None and ENGINE
    return NVIDIA and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def blocks(t: Tensor, shape: list[int]) -> Any:
    """A descriptor by which kernels load blocks of `shape` from `t`, zeros beyond its end; None where device or layout has none."""
    apart = all(stride > 0 and stride * t.element_size() % 16 == 0 for stride in t.stride()[:-1])
    if not copies_blocks(t.device) or 0 in t.shape or t.stride(-1) != 1 or t.data_ptr() % 16 or not apart:
        return None
    return TensorDescriptor(t, list(t.shape), list(t.stride()), shape)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of `device`; a fixed number where there is none to ask, so that the interpreter walks the same loops."""
    if device.type in ("cpu", "meta"):
        return 4
    properties = _module(device.type).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0) or properties.gpu_eu_count)


def has_fp64(device: torch.device) -> bool:
    """Apple's GPUs and some of Intel's have no fp64."""
    return device.type in ("cpu", "cuda", "meta")


def cdiv(a: int, b: int) -> int:
    """ceil(a / b)."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


NVIDIA = not torch.version.hip and not torch.version.xpu
ENGINE = NVIDIA  # what `copies_blocks` says of a GPU that is not there: of the interpreter's, and of meta tensors'
MAX_WARPS = 16 if torch.version.hip else 32  # 1024 threads a block, of 64 or 32 to the warp


def warps(tile: int, per_warp: int = 512, least: int = 1) -> int:
    """Warps for a program that holds `tile` elements, `per_warp` elements each, between `least` and what a block may have."""
    return max(least, min(MAX_WARPS, tile // per_warp))


def registers(most: int | None) -> dict[str, int]:
    """The launch option that holds a thread to `most` registers, so that more programs fit a multiprocessor; NVIDIA only has it."""
    return {"maxnreg": most} if NVIDIA and most is not None else {}


def as_rows(x: Tensor) -> Tensor:
    """`x` as [rows, last axis] with unit stride in the last axis; a view where the strides allow one, else a copy."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def rows_and_stride(x: Tensor) -> tuple[Tensor, int]:
    """`x` as a kernel reads its rows, and from one to the next; a contiguous tensor is taken as it is, since a view costs the host time."""
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = as_rows(x)
    return rows, rows.stride(0)
