"""The options that the losses share: checked, and as the kernels take them."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def class_weights(op: str, name: str, weight: Tensor | None, like: Tensor, v: int, why: str) -> Tensor | None:
    """Weights of `v` classes, which have no gradient."""
    if weight is None:
        return None
    _check.optional(op, **{name: weight})
    _check.shape(op, name, weight, (v,), why)
    _check.same_device(op, like, **{name: weight})
    _check.no_grad_for(op, **{name: weight})
    return weight.contiguous()


def token_weights(op: str, weight: Tensor | None, target: Tensor, x: Tensor) -> Tensor | None:
    """A weight for each row, which has no gradient, in the precision of x's statistics."""
    if weight is None:
        return None
    _check.optional(op, token_weight=weight)
    _check.shape(op, "token_weight", weight, target.shape, "the shape of target")
    _check.same_device(op, target, token_weight=weight)
    _check.no_grad_for(op, token_weight=weight)
    return weight.to(_check.wide_dtype(x))


def shifted(t: Tensor, fill: float) -> Tensor:
    """What belongs to the next position: `[..., T]`, moved one to the left along the last axis."""
    return F.pad(t, (0, 1), value=fill)[..., 1:]


def number(op: str, name: str, value: Any, rule: str) -> float:
    """`value`, a finite number above 0 ("above 0"), of at least 0 ("at least 0") or between 0 and 1 ("from 0 to 1")."""
    # No math.isfinite: a compiler that has met the number with two values traces it as a symbol.
    fits = isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
    if not fits or value < 0 or (rule == "above 0" and value == 0) or (rule == "from 0 to 1" and value > 1):
        hint = "; pass None for no cap" if name == "softcap" else ""
        raise ValueError(f"{op}: {name} must be a number {'of ' if rule == 'at least 0' else ''}{rule}, got {value!r}{hint}")
    return float(value)


def items(op: str, num_items: int | Tensor | None, reduction: str, like: Tensor) -> Tensor | None:
    """`num_items` as a 0-dimensional tensor, made on the device so that the host need not wait."""
    if num_items is None:
        return None
    if reduction != "mean":
        raise ValueError(f'{op}: num_items is what a mean divides by, got it with reduction={reduction!r}; use reduction="mean"')
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"{op}: num_items must be a number or a tensor of one, got shape {list(num_items.shape)}")
        _check.same_device(op, like, num_items=num_items)
        _check.no_grad_for(op, num_items=num_items)
        return num_items.reshape(())
    return torch.full((), _check.integer(op, "num_items", num_items, 0), dtype=torch.int64, device=like.device)
