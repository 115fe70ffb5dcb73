"""The loss of a batch from the losses of its rows: their sum, or their mean over what a mean divides by.

That is the number of rows whose target is not ignored, the sum of their weights under class weights, or `items` where given; not zero: the
mean over no row is 0. Sums are taken in fp64, so that one rounding is all they add, and stay on the device, which nobody waits for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ._check import wide, wide_dtype
from ._launch import Plan, has_fp64, jit, tl

BLOCK = 4096  # rows at a time


class Reduce(Protocol):
    """One implementation."""

    def __call__(
        self,
        each: Tensor | None,
        target: Tensor,
        ignore_index: int,
        reduction: str,
        weight: Tensor | None = None,
        items: Tensor | None = None,
        divisor: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """
        Args:
            each: the losses of the N rows; None where only the divisor is wanted yet.
            target: of N elements, any shape. weight: `[V]`, of the classes. items: no axes.
            divisor: what an earlier call returned.

        Returns:
            The loss: no axes, or of target's shape for "none". What a mean divides by, of no axes; None for the other reductions.
        """


def divisor_dtype(weight: Tensor | None, items: Tensor | None) -> torch.dtype:
    """Of what a mean divides by."""
    return items.dtype if items is not None else torch.int64 if weight is None else wide_dtype(weight)


def plain_reduce(
    each: Tensor | None,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    weight: Tensor | None = None,
    items: Tensor | None = None,
    divisor: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """`Reduce` in plain PyTorch, differentiable."""
    if reduction == "none":
        return each if each is None else each.view(target.shape), None
    if reduction == "mean" and divisor is None:
        if items is None:
            counted = target != ignore_index
            items = counted.sum() if weight is None else (wide(weight)[target.clamp(0, len(weight) - 1)] * counted).sum()
        divisor = torch.where(items == 0, torch.ones_like(items), items)
    if each is None:
        return None, divisor
    total = each.sum(dtype=torch.float64 if has_fp64(each.device) else None)
    return (total if divisor is None else total / divisor).to(each.dtype), divisor


_SUM, _ROWS, _ITEMS, _KNOWN = (tl.constexpr(i) for i in range(4))  # where a divisor comes from


@jit
def _loss_reduce_kernel(
    loss_ptr, target_ptr, w_ptr, items_ptr, divisor_ptr, y_ptr, target_stride, L, V, ignore_index,
    FROM: tl.constexpr, FP64: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    WIDE: tl.constexpr = tl.float64 if FP64 else tl.float32
    block = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), WIDE)
    weights = tl.zeros((BLOCK,), WIDE)
    rows = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, L, BLOCK):
        at = start + block
        if loss_ptr is not None:
            total += tl.load(loss_ptr + at, mask=at < L, other=0.0).to(WIDE)
        if FROM == _ROWS:
            y = tl.load(target_ptr + at.to(tl.int64) * target_stride, mask=at < L, other=ignore_index)
            if w_ptr is None:
                rows += (y != ignore_index).to(tl.int64)
            else:
                y_legal = tl.minimum(tl.maximum(y, 0), V - 1)
                weights += tl.load(w_ptr + y_legal, mask=(at < L) & (y != ignore_index), other=0.0).to(WIDE)
    divisor = tl.full((), 1.0, WIDE)
    if FROM == _ROWS:
        if w_ptr is None:
            divisor = tl.sum(rows, 0).to(WIDE)
        else:
            divisor = tl.sum(weights, 0)
    if FROM == _ITEMS:
        divisor = tl.load(items_ptr).to(WIDE)
    if FROM == _KNOWN:
        divisor = tl.load(divisor_ptr).to(WIDE)
    divisor = tl.where(divisor == 0.0, 1.0, divisor)
    if FROM != _SUM and FROM != _KNOWN:
        tl.store(divisor_ptr, divisor.to(divisor_ptr.dtype.element_ty))
    if y_ptr is not None:
        tl.store(y_ptr, (tl.sum(total, 0) / divisor).to(y_ptr.dtype.element_ty))


@lru_cache(1024)
def _plan(stride: int, n: int, v: int, ignore_index: int, made: int, fp64: bool) -> Plan:
    return Plan(_loss_reduce_kernel, (1,), stride, n, v, ignore_index, FROM=made, FP64=fp64, BLOCK=BLOCK, num_warps=BLOCK // 256)


def kernel_reduce(
    each: Tensor | None,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    weight: Tensor | None = None,
    items: Tensor | None = None,
    divisor: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """`Reduce` in one Triton launch of one program."""
    if reduction == "none":
        return each if each is None else each.view(target.shape), None
    made = _SUM if reduction == "sum" else _KNOWN if divisor is not None else _ROWS if items is None else _ITEMS
    if reduction == "mean" and divisor is None:
        divisor = target.new_empty((), dtype=divisor_dtype(weight, items))
    y = None if each is None else each.new_empty(())
    if y is not None or divisor is not None:
        flat, device = target if target.dim() == 1 else target.reshape(-1), target.device
        v = 0 if weight is None else weight.shape[0]
        _plan(flat.stride(0), len(flat), v, ignore_index, made.value, has_fp64(device))(device, each, flat, weight, items, divisor, y)
    return y, divisor
