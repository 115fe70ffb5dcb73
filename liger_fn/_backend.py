"""Which implementation runs: Triton kernels, Triton's interpreter, or plain PyTorch.

The choice is made for each call, from the tensor it is given: a tensor on a GPU runs the kernels, a CPU tensor runs plain PyTorch, or the
same kernels in Triton's interpreter when the process was started with `TRITON_INTERPRET=1`. fp64 always runs plain PyTorch, since the
kernels keep their statistics in fp32. Autograd runs a backward on the backend that its forward ran on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from ._launch import HAS_TRITON, INTERPRETED

Backend = Literal["triton", "interpreter", "reference"]
R = TypeVar("R")

_GPU = ("cuda", "xpu")  # ROCm tensors say "cuda"
_forced: Backend | None = None


def choose(x: Tensor, op: str) -> Backend:
    """The backend that `op` runs on for tensor `x`."""
    if _forced is not None:
        if x.dtype is torch.float64 and _forced != "reference":
            raise TypeError(f'{op}: the {_forced} backend has no float64; use float32 or liger_fn.use_backend("reference")')
        return _forced
    if not HAS_TRITON or x.dtype is torch.float64:
        return "reference"
    if INTERPRETED:
        return "interpreter" if x.device.type in ("cpu", *_GPU) else "reference"
    return "triton" if x.is_cuda or x.device.type in _GPU else "reference"  # `is_cuda` is the cheaper answer


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run every `liger_fn` call inside the block on one backend, to tell a kernel's fault from your own with one line.

    Args:
        name: "reference" (plain PyTorch, any device), "triton" (GPU tensors), or "interpreter" (the kernels on a CPU, slow; the process
            must have been started with `TRITON_INTERPRET=1`).

    The setting belongs to the process: threads must not overlap in it. Autograd's backward does not consult it, but follows its forward.

    Raises:
        ValueError: `name` is none of the three.
        RuntimeError: Triton is missing, or the process runs the other of Triton's two modes.
    """
    global _forced
    if name not in get_args(Backend):
        raise ValueError(f"use_backend: name must be one of {get_args(Backend)}, got {name!r}")
    if name != "reference" and not HAS_TRITON:
        raise RuntimeError(f'use_backend: {name!r} needs the triton package, which cannot be imported here; use "reference"')
    if name == "interpreter" and not INTERPRETED:
        raise RuntimeError('use_backend: "interpreter" needs TRITON_INTERPRET=1 in the environment before liger_fn is imported')
    if name == "triton" and INTERPRETED:
        raise RuntimeError('use_backend: "triton" cannot run in a process started with TRITON_INTERPRET=1; unset it, or use "interpreter"')
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backend(x: Tensor) -> Backend:
    """The backend a call with tensor `x` would run on now: "triton", "interpreter" or "reference"."""
    return choose(x, "backend")


def autocasts(device: str) -> bool:
    """Is autocast active for this type of device? (PyTorch has no answer for "meta".)"""
    return device != "meta" and torch.is_autocast_enabled(device)


def in_own_dtypes(fn: Callable[..., R]) -> Callable[..., R]:
    """`fn`, whose PyTorch calls keep the dtypes they are written in, whatever autocast is active around it."""

    @wraps(fn)
    def run(*args: Any, **kwargs: Any) -> R:
        first = args[0] if isinstance(args[0], Tensor) else next(t for t in args[0] if isinstance(t, Tensor))  # x, or residuals
        device = first.device.type
        if not autocasts(device):
            return fn(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return fn(*args, **kwargs)

    return run
