r"""Softmax over the last axis.

    y_j = e_j / Σ_i e_i        e_j = exp(x_j − m)        m = max_j x_j
    dx_j = y_j (dy_j − c)        c = Σ_i e_i dy_i / Σ_i e_i

Residuals: x, and the pair (m, Σ e) of each row in fp32: y is made again from x, which is read in its place and not rounded in between.
The mean c is taken twice, of dy and then of dy − c, which is nearly zero: where all dy are alike nothing is left of dx, in fp32 too.
Source: Milakov & Gimelshein 2018, arXiv:1805.02867 (the sum in one pass).
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check
from ._check import wide
from ._elementary import exp
from ._launch import Plan, cdiv, jit, next_power_of_2, rows_and_stride, tl, warps
from ._vjp import Args, Needs, custom_vjp

RESIDENT = 16384  # columns that a program holds; longer rows are read twice, the second time from L2
PER_WARP = 1024


class Residuals(NamedTuple):
    """What the backward of `softmax` needs."""

    x: Tensor
    stats: Tensor


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(x: Tensor) -> Tensor:
    return torch.softmax(wide(x), -1).to(x.dtype)


def _plain_fwd(x: Tensor, needs: Needs) -> tuple[Tensor, Residuals]:
    xw = wide(x)
    top = xw.amax(-1, keepdim=True)
    e = torch.exp(xw - top)
    total = e.sum(-1, keepdim=True)
    return (e / total).to(x.dtype), Residuals(x, torch.cat((top, total), -1).view(-1, 2))


def _plain_bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None]:
    if not needs[0]:
        return (None,)
    top, total = res.stats.view(*res.x.shape[:-1], 2).split(1, -1)
    e, dyw = torch.exp(wide(res.x) - top), wide(dy)
    for _ in range(2):
        dyw = dyw - (e * dyw).sum(-1, keepdim=True) / total
    return ((e / total * dyw).to(res.x.dtype),)


# --- kernels ----------------------------------------------------------------------------------------------------------------------------


@jit
def _softmax_fwd_kernel(x_ptr, y_ptr, s_ptr, stride, N, H, ROWS: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    keep = (row < N)[:, None] & (col < H)
    x = tl.load(x_ptr + row[:, None] * stride + col, mask=keep, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
    top = tl.max(x, 1)
    e = exp(x - top[:, None], EXACT)
    total = tl.sum(e, 1)
    y = tl.div_rn(e, total[:, None] + tl.zeros((ROWS, BLOCK), tl.float32))
    tl.store(y_ptr + row[:, None] * H + col, y.to(y_ptr.dtype.element_ty), mask=keep, cache_modifier=".cs")
    tl.store(s_ptr + 2 * row, top, mask=row < N)
    tl.store(s_ptr + 2 * row + 1, total, mask=row < N)


@jit
def _softmax_bwd_kernel(
    dy_ptr, x_ptr, s_ptr, dx_ptr, dy_stride, stride, N, H, ROWS: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    keep = (row < N)[:, None] & (col < H)
    top = tl.load(s_ptr + 2 * row, mask=row < N, other=0.0)[:, None]
    total = tl.load(s_ptr + 2 * row + 1, mask=row < N, other=1.0)[:, None]
    x = tl.load(x_ptr + row[:, None] * stride + col, mask=keep, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
    dy = tl.load(dy_ptr + row[:, None] * dy_stride + col, mask=keep, other=0.0, eviction_policy="evict_first").to(tl.float32)
    e = exp(x - top, EXACT)
    dy -= tl.div_rn(tl.sum(e * dy, 1)[:, None], total)
    dy -= tl.div_rn(tl.sum(e * dy, 1)[:, None], total)
    dx = tl.div_rn(e, total + tl.zeros((ROWS, BLOCK), tl.float32)) * dy
    tl.store(dx_ptr + row[:, None] * H + col, dx.to(dx_ptr.dtype.element_ty), mask=keep, cache_modifier=".cs")


@jit
def _softmax_wide_fwd_kernel(x_ptr, y_ptr, s_ptr, stride, H, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    top = float("-inf")
    total = 0.0
    for start in range(0, H, BLOCK):
        x = tl.load(x_ptr + row * stride + start + col, mask=start + col < H, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * exp(top - shift, EXACT) + tl.sum(exp(x - shift, EXACT), 0)
        top = new
    for start in range(0, H, BLOCK):
        x = tl.load(x_ptr + row * stride + start + col, mask=start + col < H, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = tl.div_rn(exp(x - top, EXACT), total + tl.zeros((BLOCK,), tl.float32))
        tl.store(y_ptr + row * H + start + col, y.to(y_ptr.dtype.element_ty), mask=start + col < H)
    tl.store(s_ptr + 2 * row, top)
    tl.store(s_ptr + 2 * row + 1, total)


@jit
def _softmax_wide_bwd_kernel(dy_ptr, x_ptr, s_ptr, dx_ptr, dy_stride, stride, H, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    top = tl.load(s_ptr + 2 * row)
    total = tl.load(s_ptr + 2 * row + 1)
    mean = 0.0
    for _ in tl.static_range(2):
        dot = 0.0
        for start in range(0, H, BLOCK):
            x = tl.load(x_ptr + row * stride + start + col, mask=start + col < H, other=float("-inf")).to(tl.float32)
            dy = tl.load(dy_ptr + row * dy_stride + start + col, mask=start + col < H, other=0.0).to(tl.float32)
            dot += tl.sum(exp(x - top, EXACT) * (dy - mean), 0)
        mean += tl.div_rn(dot, total)
    for start in range(0, H, BLOCK):
        x = tl.load(x_ptr + row * stride + start + col, mask=start + col < H, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + start + col, mask=start + col < H, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dx = tl.div_rn(exp(x - top, EXACT), total + tl.zeros((BLOCK,), tl.float32)) * (dy - mean)
        tl.store(dx_ptr + row * H + start + col, dx.to(dx_ptr.dtype.element_ty), mask=start + col < H)


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


@lru_cache(1024)
def _plan(n: int, h: int, exact: bool, backward: bool, *strides: int) -> Plan:
    """One long row to a program, or several short ones."""
    columns = min(next_power_of_2(h), RESIDENT)
    rows = max(1, 2048 // columns)
    meta = {"EXACT": exact, "BLOCK": columns, "num_warps": warps(rows * columns, PER_WARP)}
    if h > RESIDENT:
        return Plan(_softmax_wide_bwd_kernel if backward else _softmax_wide_fwd_kernel, (n,), *strides, h, **meta)
    return Plan(_softmax_bwd_kernel if backward else _softmax_fwd_kernel, (cdiv(n, rows),), *strides, n, h, ROWS=rows, **meta)


def _outputs(x: Tensor, needs: Needs) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(prod(x.shape[:-1]), 2, dtype=_check.wide_dtype(x))


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> tuple[Tensor | None]:
    return (torch.empty_like(res.x, memory_format=torch.contiguous_format) if needs[0] else None,)


def _fwd(x: Tensor, needs: Needs) -> tuple[Tensor, Residuals]:
    y, stats = _outputs(x, needs)
    rows, stride = rows_and_stride(x)
    _plan(stats.shape[0], x.shape[-1], x.dtype is torch.float32, False, stride)(x.device, rows, y, stats)
    return y, Residuals(x, stats)


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None]:
    (dx,) = _gradients(res, dy, needs)
    if dx is None:
        return (None,)
    x, stats = res
    (rows, stride), (dys, dy_stride) = rows_and_stride(x), rows_and_stride(dy)
    _plan(stats.shape[0], x.shape[-1], x.dtype is torch.float32, True, dy_stride, stride)(x.device, dys, rows, stats, dx)
    return (dx,)


# --- public function --------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(_fwd, _bwd),
    plain=(_plain_fwd, _plain_bwd),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: (res.x.shape,),
    diff=1,
)
def softmax(x: Tensor) -> Args:
    r"""Softmax over the last axis: `y_j = exp(x_j) / Σ_i exp(x_i)`.

    Args:
        x: `[..., H]`, any strides, any H from 1; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).

    Returns:
        y, of x's shape and dtype, computed in fp32 and rounded once. Gradient: x. A row that is −inf throughout is NaN, as in PyTorch.

    Raises:
        TypeError: x is not of a float dtype. ValueError: x has no axis, or its last is empty.

    Examples:
        >>> liger_fn.softmax(torch.tensor([[0.0, 0.0, 1e4]]))
        tensor([[0., 0., 1.]])

    Source: Milakov & Gimelshein 2018, arXiv:1805.02867 (the sum in one pass).
    """
    _check.floats("softmax", "x", x)
    _check.at_least_one("softmax", "the last axis of x", x.shape[-1])
    return (x,)
