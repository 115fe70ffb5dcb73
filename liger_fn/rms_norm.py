r"""RMSNorm: divide each row by its root mean square, then scale.

    r = rsqrt(mean(x²) + eps)        y = x r (w + offset)
    g = dy (w + offset)              dx = r g − x r³ mean(g x)          dw = Σ_rows dy x r

Residuals: x, w, and r in fp32, one per row. Source: Zhang & Sennrich 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _check
from ._check import wide
from ._launch import Plan, as_rows, cdiv, jit, rows_and_stride, tl
from ._norm_bwd import norm_bwd
from ._norm_rows import RESIDENT, WIDEST, tile, wide_fwd
from ._vjp import Args, Needs, custom_vjp

Cast = Literal["llama", "gemma", "none"]


class Residuals(NamedTuple):
    """What the backward of `rms_norm` needs."""

    x: Tensor
    weight: Tensor | None
    rstd: Tensor
    offset: float
    cast: str


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str) -> Tensor:
    h = wide(x)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if cast == "llama":  # round to x's dtype first, then scale in the dtype that x and weight promote to
        h = h.to(x.dtype)
        return h if weight is None else h * (weight + offset)
    if weight is None:
        return h.to(x.dtype)
    h = h * (wide(weight) + offset)
    return h.to(x.dtype if cast == "gemma" else torch.promote_types(x.dtype, weight.dtype))


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)


def _plain_fwd(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str, needs: Needs) -> tuple[Tensor, Residuals]:
    y = _reference(x, weight, eps, offset, cast)
    return y, Residuals(x, weight, _rstd(x, eps).flatten(), offset, cast)


def _plain_bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None, Tensor | None]:
    x, weight, rstd, offset, _ = res
    r, dyw, xw = rstd.view(*x.shape[:-1], 1), wide(dy), wide(x)
    dx = dw = None
    if needs[0]:
        g = dyw if weight is None else dyw * (wide(weight) + offset)
        dx = (r * g - xw * r**3 * (g * xw).mean(-1, keepdim=True)).to(x.dtype)
    if needs[1] and weight is not None:
        dw = (dyw * xw * r).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return dx, dw


# --- kernels ----------------------------------------------------------------------------------------------------------------------------


@jit
def _rms_norm_fwd_kernel(
    x_ptr, w_ptr, y_ptr, r_ptr, stride, N, H, eps, offset, LLAMA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    keep = (row < N)[:, None] & (col < H)
    x = tl.load(x_ptr + row[:, None] * stride + col, mask=keep, other=0.0, eviction_policy="evict_first").to(tl.float32)
    # correctly rounded: where a row is nearly parallel to its gradient, dx is a difference that keeps only r's last bits
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(x * x, 1), H * 1.0) + eps))
    y = x * r[:, None]
    if LLAMA:
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
    if w_ptr is not None:
        y *= tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32) + offset
    tl.store(y_ptr + row[:, None] * H + col, y.to(y_ptr.dtype.element_ty), mask=keep, cache_modifier=".cs")
    tl.store(r_ptr + row, r, mask=row < N)


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


@lru_cache(1024)
def _plan(n: int, h: int, eps: float, offset: float, llama: bool, stride: int) -> Plan:
    t = tile(h)
    return Plan(
        _rms_norm_fwd_kernel, (cdiv(n, t.rows),), stride, n, h, eps, offset,
        LLAMA=llama, ROWS=t.rows, BLOCK=t.columns, num_warps=t.warps,
    )  # fmt: skip


def _outputs(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str, needs: Needs) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if weight is None or cast == "gemma" else torch.promote_types(x.dtype, weight.dtype)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return y, x.new_empty(prod(x.shape[:-1]), dtype=_check.wide_dtype(x))


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> tuple[Tensor | None, Tensor | None]:
    x, weight = res.x, res.weight
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    return dx, torch.empty_like(weight) if needs[1] and weight is not None else None


def _fwd(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str, needs: Needs) -> tuple[Tensor, Residuals]:
    y, rstd = _outputs(x, weight, eps, offset, cast, needs)
    if x.shape[-1] > RESIDENT:
        wide_fwd(as_rows(x), weight, y, rstd, eps, offset=offset, llama=cast == "llama")
    else:
        rows, stride = rows_and_stride(x)
        _plan(rstd.numel(), x.shape[-1], eps, offset, cast == "llama", stride)(x.device, rows, weight, y, rstd)
    return y, Residuals(x, weight, rstd, offset, cast)


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None, Tensor | None]:
    dx, dw = _gradients(res, dy, needs)
    norm_bwd(dy, res.x, res.weight, res.rstd, dx, dw, offset=res.offset)
    return dx, dw


# --- public function --------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(_fwd, _bwd),
    plain=(_plain_fwd, _plain_bwd),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: (res.x.shape,),
    diff=2,
)
def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0, cast: Cast = "llama") -> Args:
    r"""RMSNorm over the last axis: `y = x rsqrt(mean(x²) + eps) (weight + offset)`.

    Args:
        x: `[..., H]`, any strides, H at least 1; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        weight: `[H]`, or None for no scale.
        eps: added to the mean square.
        offset: added to the weight; 1 for the Gemma family, whose weights are stored around zero.
        cast: where values are rounded. "llama": the normalised row is rounded to x's dtype, then scaled, and y has the dtype that x and
            weight promote to. "gemma": nothing is rounded before y, which has x's dtype. "none": nothing is rounded before y, which has
            the promoted dtype. Statistics are fp32 in all three.

    Returns:
        y, of x's shape. Gradients: x and weight.

    Raises:
        TypeError: a tensor is not of a float dtype.
        ValueError: weight is not `[H]`, tensors are on different devices, H is zero or over 2³¹ − 2¹⁶, x is 0-dimensional, unknown
            `cast`.

    Examples:
        >>> liger_fn.rms_norm(torch.tensor([[3.0, 4.0]]), eps=0.0)
        tensor([[0.8485, 1.1314]])

    Source: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    _check.floating("rms_norm", x=x)
    _check.optional("rms_norm", weight=weight)
    if x.dim() == 0 or not 0 < x.shape[-1] <= WIDEST:
        raise ValueError(f"rms_norm: the last axis of x must have 1 to {WIDEST} elements, got shape {list(x.shape)}; reshape x")
    if weight is not None:
        _check.shape("rms_norm", "weight", weight, x.shape[-1:], "the last axis of x")
        _check.same_device("rms_norm", x, weight=weight)
        weight = weight.contiguous()
    _check.choice("rms_norm", "cast", cast, ("llama", "gemma", "none"))
    return x, weight, float(eps), float(offset) + 0.0, cast
