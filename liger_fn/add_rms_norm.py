r"""A residual connection and the RMSNorm behind it, in one pass over memory.

    s = x + residual              r = rsqrt(mean(s²) + eps)        y = s r (w + offset)
    g = dy (w + offset)           dx = dresidual = ds + r g − s r³ mean(g s)               dw = Σ_rows dy s r

where ds is the cotangent of s, which is an output too: the residual of what follows. Residuals: s, w, and r in fp32, one per row. An
operator may not return one tensor twice, so on that path (`_composable.py`) x and residual stand for s, and backward adds them again.
Source: Zhang & Sennrich 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check
from ._check import dense, wide
from ._launch import Plan, as_rows, cdiv, jit, rows_and_stride, tl
from ._norm_bwd import norm_bwd
from ._norm_rows import RESIDENT, WIDEST, tile, wide_fwd
from ._vjp import Args, Needs, custom_vjp
from .rms_norm import Cast, rms_norm


class Residuals(NamedTuple):
    """What the backward of `add_rms_norm` needs: `s`, the second output itself; or, where `s` is empty, its terms."""

    s: Tensor
    x: Tensor | None
    residual: Tensor | None
    weight: Tensor | None
    rstd: Tensor
    offset: float


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    s = x + residual
    return rms_norm.reference(s, weight, eps, offset=offset, cast=cast), s  # type: ignore[arg-type]


def _sum(res: Residuals) -> Tensor:
    return res.s if res.x is None or res.residual is None else res.x + res.residual


def _plain_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str, needs: Needs
) -> tuple[tuple[Tensor, Tensor], Residuals]:  # fmt: skip
    y, s = _reference(x, residual, weight, eps, offset, cast)
    return (y, s), Residuals(s, None, None, weight, torch.rsqrt(wide(s).square().mean(-1) + eps), offset)


def _plain_bwd(res: Residuals, dy: tuple[Tensor, Tensor], needs: Needs, donate: bool) -> tuple[Tensor | None, ...]:
    _, _, _, weight, rstd, offset = res
    s = _sum(res)
    d, sw, r = wide(dy[0]), wide(s), rstd.unsqueeze(-1)
    dx = dw = None
    if needs[0] or needs[1]:
        g = d if weight is None else d * (wide(weight) + offset)
        dx = (wide(dy[1]) + (r * g - sw * r**3 * (g * sw).mean(-1, keepdim=True))).to(s.dtype)
    if needs[2] and weight is not None:
        dw = (d * sw * r).reshape(-1, s.shape[-1]).sum(0).to(weight.dtype)
    again = dx.clone() if dx is not None and needs[0] and not donate else dx
    return dx if needs[0] else None, again if needs[1] else None, dw


# --- kernels ----------------------------------------------------------------------------------------------------------------------------


@jit
def _add_rms_norm_fwd_kernel(
    x_ptr, res_ptr, w_ptr, y_ptr, s_ptr, r_ptr, x_stride, res_stride, N, H, eps, offset,
    LLAMA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    keep = (row < N)[:, None] & (col < H)
    x = tl.load(x_ptr + row[:, None] * x_stride + col, mask=keep, other=0.0, eviction_policy="evict_first").to(tl.float32)
    x += tl.load(res_ptr + row[:, None] * res_stride + col, mask=keep, other=0.0, eviction_policy="evict_first").to(tl.float32)
    s = x.to(s_ptr.dtype.element_ty)
    tl.store(s_ptr + row[:, None] * H + col, s, mask=keep, cache_modifier=".cs")
    s = s.to(tl.float32)
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(s * s, 1), H * 1.0) + eps))
    y = s * r[:, None]
    if LLAMA:
        y = y.to(s_ptr.dtype.element_ty).to(tl.float32)
    if w_ptr is not None:
        y *= tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32) + offset
    tl.store(y_ptr + row[:, None] * H + col, y.to(y_ptr.dtype.element_ty), mask=keep, cache_modifier=".cs")
    tl.store(r_ptr + row, r, mask=row < N)


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


@lru_cache(1024)
def _plan(n: int, h: int, eps: float, offset: float, llama: bool, *strides: int) -> Plan:
    t = tile(h)
    return Plan(
        _add_rms_norm_fwd_kernel, (cdiv(n, t.rows),), *strides, n, h, eps, offset,
        LLAMA=llama, ROWS=t.rows, BLOCK=t.columns, num_warps=t.warps,
    )  # fmt: skip


def _made(x: Tensor, weight: Tensor | None, cast: str) -> tuple[Tensor, Tensor, Tensor]:
    """y, s and rstd."""
    dtype = x.dtype if weight is None or cast == "gemma" else torch.promote_types(x.dtype, weight.dtype)
    return dense(x, dtype), dense(x), x.new_empty(x.shape[:-1], dtype=_check.wide_dtype(x))


def _outputs(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str, needs: Needs
) -> tuple[Tensor, Tensor, None, Tensor]:  # fmt: skip
    y, s, rstd = _made(x, weight, cast)
    return y, s, None, rstd  # operators do not return s again


def _gradients(res: Residuals, dy: tuple[Tensor, Tensor], needs: Needs) -> tuple[Tensor | None, ...]:
    ds, dtype, weight = dy[1], res.s.dtype, res.weight
    dx = dense(ds, dtype) if needs[0] else None
    dresidual = dense(ds, dtype) if needs[1] else None
    return dx, dresidual, torch.empty_like(weight) if needs[2] and weight is not None else None


def _fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, cast: str, needs: Needs
) -> tuple[tuple[Tensor, Tensor], Residuals]:  # fmt: skip
    y, s, rstd = _made(x, weight, cast)
    if x.shape[-1] > RESIDENT:
        wide_fwd(as_rows(x), weight, y, rstd, eps, offset=offset, llama=cast == "llama", add=as_rows(residual), s=s)
    else:
        (xs, x_stride), (rs, res_stride) = rows_and_stride(x), rows_and_stride(residual)
        plan = _plan(rstd.numel(), x.shape[-1], eps, offset, cast == "llama", x_stride, res_stride)
        plan(x.device, xs, rs, weight, y, s, rstd)
    return (y, s), Residuals(s, None, None, weight, rstd, offset)


def _bwd(res: Residuals, dy: tuple[Tensor, Tensor], needs: Needs, donate: bool) -> tuple[Tensor | None, ...]:
    s, x, residual, weight, rstd, offset = res
    # Both gradients are one number. Where memory may be reused they are one tensor, as those of PyTorch's own addition are: autograd
    # adds in place only to what nobody else holds. Else each is a tensor of its own, written by the same kernel.
    shared = donate and needs[0] and needs[1]
    dx, dresidual, dw = _gradients(res, dy, (needs[0], needs[1] and not shared, needs[2]))
    first, again = (dresidual, None) if dx is None else (dx, dresidual)
    norm_bwd(
        dy[0], s if x is None else x, weight, rstd, first, dw, offset=offset,
        add=residual, ds=None if first is None else dy[1], again=again,
    )  # fmt: skip
    return dx, dx if shared else dresidual, dw


# --- public function --------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(_fwd, _bwd),
    plain=(_plain_fwd, _plain_bwd),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: ((res.s if res.x is None else res.x).shape,) * 2,
    diff=3,
    n_out=2,
)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0, cast: Cast = "llama"
) -> Args:
    r"""A residual connection and the RMSNorm of the sum: `s = x + residual`, `y = s rsqrt(mean(s²) + eps) (weight + offset)`.

    Args:
        x: `[..., H]`, any strides, H at least 1: what the last block adds; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        residual: of x's shape and dtype: what it is added to.
        weight: `[H]`, or None for no scale; any float dtype.
        eps: added to the mean square.
        offset: added to the weight; 1 for the Gemma family, whose weights are stored around zero.
        cast: where values are rounded, as in `rms_norm`.

    Returns:
        `(y, s)`: the norm's output, and the sum, the residual of the next block. s is rounded to x's dtype, as `x + residual` is, and y is
        the norm of the rounded sum. Gradients: x, residual and weight. Those of x and residual are equal; autograd, or `bwd` with
        `donate`, may return one tensor for both, as for `x + residual`, so copy one before you write to it.

    Raises:
        TypeError: a tensor is not of a float dtype, or x and residual differ in dtype.
        ValueError: shapes or devices differ, weight is not `[H]`, H is zero or over 2³¹ − 2¹⁶, x is 0-dimensional, unknown `cast`.

    Examples:
        >>> y, s = liger_fn.add_rms_norm(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 3.0]]), eps=0.0)
        >>> y, s
        (tensor([[0.8485, 1.1314]]), tensor([[3., 4.]]))

    Source: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    _check.floating("add_rms_norm", x=x, residual=residual)
    _check.optional("add_rms_norm", weight=weight)
    if x.dim() == 0 or not 0 < x.shape[-1] <= WIDEST:
        raise ValueError(f"add_rms_norm: the last axis of x must have 1 to {WIDEST} elements, got shape {list(x.shape)}; reshape x")
    _check.shape("add_rms_norm", "residual", residual, x.shape, "the shape of x")
    _check.same_dtype("add_rms_norm", x, residual=residual)
    if weight is not None:
        _check.shape("add_rms_norm", "weight", weight, x.shape[-1:], "the last axis of x")
        weight = weight.contiguous()
    _check.same_device("add_rms_norm", x, residual=residual, weight=weight)
    _check.choice("add_rms_norm", "cast", cast, ("llama", "gemma", "none"))
    return x, residual, weight, float(eps), float(offset) + 0.0, cast
