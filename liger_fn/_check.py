"""Argument checks. Every error names the function, the rule, what came, and what to do about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._backend import autocasts

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(op: str, **tensors: Tensor) -> None:
    """Each is a tensor of a float dtype that the kernels take."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} must be float32, bfloat16, float16 or float64, got {t.dtype}; convert it with .to(torch.float32)"
            )


def optional(op: str, **tensors: Tensor | None) -> None:
    """Each is None, or a tensor of a float dtype that the kernels take."""
    for name, t in tensors.items():
        if t is not None and (not isinstance(t, Tensor) or t.dtype not in FLOATS):
            floating(op, **{name: t})


def same_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Every other tensor lives where `x` does."""
    device = x.device
    for name, t in others.items():
        if t is not None and t.device != device:
            raise ValueError(f"{op}: {name} must be on {device} like the first argument, got {t.device}; move it with .to({str(device)!r})")


def shape(op: str, name: str, t: Tensor, want: tuple[int, ...], why: str) -> None:
    """`t` has exactly the shape `want`."""
    if t.shape != want:
        raise ValueError(f"{op}: {name} must have shape {list(want)} ({why}), got {list(t.shape)}")


def choice(op: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """`value` is one of the named options."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {allowed}, got {value!r}")


def no_grad_for(op: str, **tensors: Tensor | None) -> None:
    """None of the tensors asks for a gradient that `op` does not compute."""
    for name, t in tensors.items():
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: no gradient is computed for {name}; pass {name}.detach()")


def wide(x: Tensor) -> Tensor:
    """`x` in the precision of statistics: fp64 stays, everything else becomes fp32."""
    return x if x.dtype is torch.float64 else x.float()


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `wide(x)`."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def like(op: str, first: str, x: Tensor, name: str, t: Tensor) -> None:
    """`t` has the shape, the dtype and the device of `x`, which is called `first`."""
    if not isinstance(t, Tensor) or t.dtype is not x.dtype or t.shape != x.shape or t.device != x.device:
        floating(op, **{name: t})
        shape(op, name, t, x.shape, f"the shape of {first}")
        same_dtype(op, x, **{name: t})
        same_device(op, x, **{name: t})


def floats(op: str, name: str, t: Tensor, least: int = 1) -> None:
    """`t` is a tensor of a float dtype that the kernels take, with at least `least` axes."""
    if not isinstance(t, Tensor) or t.dtype not in FLOATS or t.dim() < least:  # one look where nothing is wrong
        floating(op, **{name: t})
        rank(op, name, t, least)


def rank(op: str, name: str, t: Tensor, least: int) -> None:
    """`t` has at least `least` axes."""
    if t.dim() < least:
        raise ValueError(f"{op}: {name} must have at least {least} axes, got shape {list(t.shape)}; add one with .unsqueeze(0)")


def same_dtype(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Every other tensor has the dtype of `x`."""
    for name, t in others.items():
        if t is not None and t.dtype is not x.dtype:
            raise TypeError(f"{op}: {name} must be {x.dtype} like the first argument, got {t.dtype}; convert one with .to(...)")


def at_least_one(op: str, what: str, size: int) -> None:
    """An axis that the op reduces over is not empty."""
    if size < 1:
        raise ValueError(f"{op}: {what} must have at least 1 element, got {size}")


def integers(op: str, name: str, t: Tensor, *, bools: bool = False) -> None:
    """`t` is a tensor of an integer dtype, or of bool where `bools` says so."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(t).__name__}")
    if t.is_floating_point() or t.is_complex() or (t.dtype is torch.bool and not bools):
        raise TypeError(f"{op}: {name} must be of an integer dtype, got {t.dtype}; convert it with .long()")


def classes(op: str, target: Tensor, want: tuple[int, ...], why: str) -> Tensor:
    """`target`, which holds class indices and has the shape `want`, as int64: in a narrow dtype -100 and the vocabulary would wrap."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a torch.Tensor, got {type(target).__name__}")
    if target.is_floating_point() or target.is_complex() or target.dtype is torch.bool:
        raise TypeError(f"{op}: target must hold class indices of an integer dtype, got {target.dtype}; convert it with .long()")
    shape(op, "target", target, want, why)
    return target if target.dtype is torch.int64 else target.long()


def autocast(t: Tensor) -> Tensor:
    """`t` in the dtype that a matrix product takes under an active autocast; as it is otherwise."""
    device = t.device.type
    return t.to(torch.get_autocast_dtype(device)) if autocasts(device) and t.dtype is not torch.float64 else t


def integer(op: str, name: str, value: Any, least: int | None = None) -> Any:
    """`value`, a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or (least is not None and value < least):
        raise ValueError(f"{op}: {name} must be an integer{'' if least is None else f' of at least {least}'}, got {value!r}")
    return value


def dense(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty contiguous tensor of x's shape and device, and of its dtype unless another is given."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
