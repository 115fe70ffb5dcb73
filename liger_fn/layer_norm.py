r"""LayerNorm: centre each row, divide it by its standard deviation, then scale and shift.

    m = mean(x)        r = rsqrt(mean((x − m)²) + eps)        x̂ = (x − m) r        y = x̂ w + b
    g = dy w           dx = r (g − mean(g) − x̂ mean(g x̂))     dw = Σ_rows dy x̂      db = Σ_rows dy

Residuals: x, w, b (for its dtype), and m and r in fp32, one of each per row. Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._check import wide
from ._launch import Plan, as_rows, cdiv, jit, rows_and_stride, tl
from ._norm_bwd import norm_bwd
from ._norm_rows import RESIDENT, WIDEST, tile, wide_fwd
from ._vjp import Args, Needs, custom_vjp


class Residuals(NamedTuple):
    """What the backward of `layer_norm` needs."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    w, b = (t if t is None else wide(t).to(_check.wide_dtype(x)) for t in (weight, bias))
    return F.layer_norm(wide(x), x.shape[-1:], w, b, eps).to(x.dtype)


def _plain_fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, needs: Needs) -> tuple[Tensor, Residuals]:
    mean = wide(x).mean(-1, keepdim=True)
    mean = mean + (wide(x) - mean).mean(-1, keepdim=True)  # what the first sum rounded off: of a large mean, it shows
    rstd = torch.rsqrt((wide(x) - mean).square().mean(-1) + eps)
    return _reference(x, weight, bias, eps), Residuals(x, weight, bias, mean.flatten(), rstd.flatten())


def _plain_bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd = res
    m, r = (t.view(*x.shape[:-1], 1) for t in (mean, rstd))
    dyw, xr = wide(dy), (wide(x) - m) * r
    dx = dw = db = None
    if needs[0]:
        g = dyw if weight is None else dyw * wide(weight)
        dx = (r * (g - g.mean(-1, keepdim=True) - xr * (g * xr).mean(-1, keepdim=True))).to(x.dtype)
    if needs[1] and weight is not None:
        dw = (dyw * xr).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    if needs[2] and bias is not None:
        db = dyw.reshape(-1, x.shape[-1]).sum(0).to(bias.dtype)
    return dx, dw, db


# --- kernels ----------------------------------------------------------------------------------------------------------------------------


@jit
def _layer_norm_fwd_kernel(x_ptr, w_ptr, b_ptr, y_ptr, m_ptr, r_ptr, stride, N, H, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    keep = (row < N)[:, None] & (col < H)
    x = tl.load(x_ptr + row[:, None] * stride + col, mask=keep, other=0.0, eviction_policy="evict_first").to(tl.float32)
    m = tl.div_rn(tl.sum(x, 1), H * 1.0)
    d = tl.where(keep, x - m[:, None], 0.0)
    gap = tl.div_rn(tl.sum(d, 1), H * 1.0)  # what the first sum rounded off: so small that the squares about it may be taken about m
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(d * d, 1), H * 1.0) - gap * gap + eps))
    m += gap
    y = (x - m[:, None]) * r[:, None]
    if w_ptr is not None:
        y *= tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)
    if b_ptr is not None:
        y += tl.load(b_ptr + col, mask=col < H, other=0.0).to(tl.float32)
    tl.store(y_ptr + row[:, None] * H + col, y.to(y_ptr.dtype.element_ty), mask=keep, cache_modifier=".cs")
    tl.store(m_ptr + row, m, mask=row < N)
    tl.store(r_ptr + row, r, mask=row < N)


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


@lru_cache(1024)
def _plan(n: int, h: int, eps: float, stride: int) -> Plan:
    t = tile(h, 1024)  # more warps would wait for each other in three sums
    return Plan(_layer_norm_fwd_kernel, (cdiv(n, t.rows),), stride, n, h, eps, ROWS=t.rows, BLOCK=t.columns, num_warps=t.warps)


def _outputs(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    n, dtype = prod(x.shape[:-1]), _check.wide_dtype(x)
    return y, x.new_empty(n, dtype=dtype), x.new_empty(n, dtype=dtype)


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    x, weight, bias, *_ = res
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    dw = torch.empty_like(weight) if needs[1] and weight is not None else None
    return dx, dw, torch.empty_like(bias) if needs[2] and bias is not None else None


def _fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, needs: Needs) -> tuple[Tensor, Residuals]:
    y, mean, rstd = _outputs(x, weight, bias, eps, needs)
    if x.shape[-1] > RESIDENT:
        wide_fwd(as_rows(x), weight, y, rstd, eps, bias=bias, mean=mean)
    else:
        rows, stride = rows_and_stride(x)
        _plan(rstd.numel(), x.shape[-1], eps, stride)(x.device, rows, weight, bias, y, mean, rstd)
    return y, Residuals(x, weight, bias, mean, rstd)


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None, ...]:
    dx, dw, db = _gradients(res, dy, needs)
    norm_bwd(dy, res.x, res.weight, res.rstd, dx, dw, mean=res.mean, db=db)
    return dx, dw, db


# --- public function --------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(_fwd, _bwd),
    plain=(_plain_fwd, _plain_bwd),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: (res.x.shape,),
    diff=3,
)
def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Args:
    r"""LayerNorm over the last axis: `y = (x − mean(x)) rsqrt(var(x) + eps) weight + bias`, where `var(x) = mean((x − mean(x))²)`.

    Args:
        x: `[..., H]`, any strides, H at least 1; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        weight: `[H]`, or None for no scale; any float dtype.
        bias: `[H]`, or None for no shift; any float dtype.
        eps: added to the variance.

    Returns:
        y, of x's shape and dtype: computed in fp32, rounded once. Gradients: x, weight and bias.

    Raises:
        TypeError: a tensor is not of a float dtype.
        ValueError: weight or bias is not `[H]`, tensors are on different devices, H is zero or over 2³¹ − 2¹⁶, x is 0-dimensional.

    Examples:
        >>> liger_fn.layer_norm(torch.tensor([[1.0, 3.0]]), bias=torch.tensor([0.0, 1.0]), eps=0.0)
        tensor([[-1.,  2.]])

    Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450.
    """
    _check.floating("layer_norm", x=x)
    _check.optional("layer_norm", weight=weight, bias=bias)
    if x.dim() == 0 or not 0 < x.shape[-1] <= WIDEST:
        raise ValueError(f"layer_norm: the last axis of x must have 1 to {WIDEST} elements, got shape {list(x.shape)}; reshape x")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            _check.shape("layer_norm", name, t, x.shape[-1:], "the last axis of x")
    _check.same_device("layer_norm", x, weight=weight, bias=bias)
    weight, bias = (t if t is None else t.contiguous() for t in (weight, bias))
    return x, weight, bias, float(eps)
