r"""Rotary position embedding: turn pairs of channels by an angle that grows with the position.

With each head split in halves, q = (a, b), cos = (c₁, c₂), sin = (s₁, s₂):

    y = (a c₁ − b s₁,  b c₂ + a s₂)          dq = (da c₁ + db s₂,  db c₂ − da s₁)        where dy = (da, db)

q and k turn by the same angles, in one launch. Residuals: cos and sin. Source: Su et al. 2021, arXiv:2104.09864.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _check
from ._check import wide
from ._launch import jit, launch, next_power_of_2, tl, warps
from ._vjp import Args, Needs, custom_vjp


class Residuals(NamedTuple):
    """What the backward of `rope` needs."""

    cos: Tensor
    sin: Tensor


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return (x * c + torch.cat((-b, a), -1) * s).to(x.dtype)

    return turn(q), turn(k)


def _plain_fwd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, needs: Needs) -> tuple[tuple[Tensor, Tensor], Residuals]:
    return _reference(q, k, cos, sin), Residuals(cos, sin)


def _plain_bwd(res: Residuals, dy: tuple[Tensor, Tensor], needs: Needs, donate: bool) -> tuple[Tensor | None, ...]:
    c, s = wide(res.cos).unsqueeze(1), wide(res.sin).unsqueeze(1)

    def turn_back(d: Tensor) -> Tensor:
        da, db = (wide(d) * s).chunk(2, -1)
        return (wide(d) * c + torch.cat((db, -da), -1)).to(d.dtype)

    return tuple(turn_back(d) if n else None for d, n in zip(dy, needs, strict=True))


# --- kernels ----------------------------------------------------------------------------------------------------------------------------


@jit
def _turn(
    x_ptr, y_ptr, xb, xh, xt, yb, yh, yt, b, t, heads, HALF, c1, c2, s1, s2, BACKWARD: tl.constexpr, H: tl.constexpr, D: tl.constexpr
):
    """Turn all heads of one token."""
    head, d = tl.arange(0, H)[:, None], tl.arange(0, D)[None, :]
    keep = (head < heads) & (d < HALF)
    x_at = x_ptr + b * xb + t * xt + head.to(tl.int64) * xh + d
    y_at = y_ptr + b * yb + t * yt + head.to(tl.int64) * yh + d
    lo = tl.load(x_at, mask=keep, other=0.0).to(tl.float32)
    hi = tl.load(x_at + HALF, mask=keep, other=0.0).to(tl.float32)
    if BACKWARD:
        y_lo, y_hi = lo * c1 + hi * s2, hi * c2 - lo * s1
    else:
        y_lo, y_hi = lo * c1 - hi * s1, hi * c2 + lo * s2
    tl.store(y_at, y_lo.to(y_ptr.dtype.element_ty), mask=keep)
    tl.store(y_at + HALF, y_hi.to(y_ptr.dtype.element_ty), mask=keep)


@jit
def _rope_kernel(
    q_ptr, k_ptr, yq_ptr, yk_ptr, cos_ptr, sin_ptr, qb, qh, qt, kb, kh, kt, yqb, yqh, yqt, ykb, ykh, ykt, cb, ct, sb, st,
    T, q_heads, k_heads, HALF, BACKWARD: tl.constexpr, QH: tl.constexpr, KH: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    d = tl.arange(0, D)[None, :]
    c_at, s_at = cos_ptr + b * cb + t * ct + d, sin_ptr + b * sb + t * st + d
    c1 = tl.load(c_at, mask=d < HALF, other=0.0).to(tl.float32)
    s1 = tl.load(s_at, mask=d < HALF, other=0.0).to(tl.float32)
    c2 = tl.load(c_at + HALF, mask=d < HALF, other=0.0).to(tl.float32)
    s2 = tl.load(s_at + HALF, mask=d < HALF, other=0.0).to(tl.float32)
    if q_ptr is not None:
        _turn(q_ptr, yq_ptr, qb, qh, qt, yqb, yqh, yqt, b, t, q_heads, HALF, c1, c2, s1, s2, BACKWARD, QH, D)
    if k_ptr is not None:
        _turn(k_ptr, yk_ptr, kb, kh, kt, ykb, ykh, ykt, b, t, k_heads, HALF, c1, c2, s1, s2, BACKWARD, KH, D)


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


def _alike(x: Tensor) -> Tensor:
    """An empty tensor in the memory layout of `x`, so that a transposed view costs no copy; the last axis is dense, as kernels write."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else x.new_empty(x.shape)


def _outputs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, needs: Needs) -> tuple[Tensor, Tensor]:
    return _alike(q), _alike(k)


def _gradients(res: Residuals, dy: tuple[Tensor, Tensor], needs: Needs) -> tuple[Tensor | None, ...]:
    return tuple(_alike(d) if n else None for d, n in zip(dy, needs, strict=True))


def _rotate(q: Tensor | None, k: Tensor | None, yq: Tensor | None, yk: Tensor | None, cos: Tensor, sin: Tensor, backward: bool) -> None:
    """Launch over every token; a tensor that is None is left out."""
    q, k = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    some = q if q is not None else k
    if some is None:
        return
    batch, _, length, dim = some.shape
    strides = [s for t in (q, k, yq, yk) for s in ((0, 0, 0) if t is None else t.stride()[:3])]
    tables = [s for t in (cos, sin) for s in (t.stride(0) if t.shape[0] > 1 else 0, t.stride(1))]
    heads = [0 if t is None else t.shape[1] for t in (q, k)]
    tiles = [next_power_of_2(max(h, 1)) for h in heads]
    half = next_power_of_2(dim // 2)
    launch(
        _rope_kernel, (batch * length,), some.device,
        q, k, yq, yk, cos, sin, *strides, *tables, length, *heads, dim // 2,
        BACKWARD=backward, QH=tiles[0], KH=tiles[1], D=half, num_warps=warps(max(tiles) * half),
    )  # fmt: skip


def _fwd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, needs: Needs) -> tuple[tuple[Tensor, Tensor], Residuals]:
    yq, yk = _outputs(q, k, cos, sin, needs)
    _rotate(q, k, yq, yk, cos, sin, backward=False)
    return (yq, yk), Residuals(cos, sin)


def _bwd(res: Residuals, dy: tuple[Tensor, Tensor], needs: Needs, donate: bool) -> tuple[Tensor | None, ...]:
    dq, dk = _gradients(res, dy, needs)
    _rotate(dy[0] if needs[0] else None, dy[1] if needs[1] else None, dq, dk, *res, backward=True)
    return dq, dk


# --- public function --------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(_fwd, _bwd),
    plain=(_plain_fwd, _plain_bwd),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: ((None, None, *res.cos.shape[1:]),) * 2,
    diff=2,
    n_out=2,
)
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Args:
    r"""Rotary position embedding of queries and keys, each head split in halves (the Hugging Face layout).

    Args:
        q: `[B, heads, T, D]`, any strides (a transposed view costs no copy), D even; float32, bfloat16, float16 (kernels) or float64.
        k: `[B, k_heads, T, D]`, of q's dtype; k_heads may differ from q's (grouped queries).
        cos, sin: `[B, T, D]`, or `[1, T, D]` for all of the batch; any float dtype.

    Returns:
        `(q', k')`: q and k turned, in their own shapes, dtypes and memory layouts; the kernels compute in fp32, round once.
        Gradients: q and k.

    Raises:
        TypeError: a tensor is not of a float dtype, or q and k differ in dtype.
        ValueError: a shape does not fit, D is odd, devices differ, or cos or sin asks for a gradient.

    Example:
        >>> q = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)  # one pair of channels
        >>> liger_fn.rope(q, q, torch.zeros(1, 1, 2), torch.ones(1, 1, 2))[0].flatten()  # a quarter turn
        tensor([-4.,  3.])

    Source: Su et al. 2021, arXiv:2104.09864.
    """
    _check.floating("rope", q=q, k=k, cos=cos, sin=sin)
    if q.dim() != 4 or q.shape[-1] % 2 or q.shape[-1] == 0:
        raise ValueError(f"rope: q must be [batch, heads, length, an even head dimension], got {list(q.shape)}")
    batch, _, length, dim = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[2], k.shape[3]) != (batch, length, dim):
        raise ValueError(f"rope: k must be [{batch}, k_heads, {length}, {dim}] (as q, but for the heads), got {list(k.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 3 or table.shape[0] not in (1, batch) or tuple(table.shape[1:]) != (length, dim):
            raise ValueError(
                f"rope: {name} must be [{batch} or 1, {length}, {dim}] (batch, length and head dimension of q), got {list(table.shape)}"
            )
    _check.same_dtype("rope", q, k=k)
    _check.same_device("rope", q, k=k, cos=cos, sin=sin)
    _check.no_grad_for("rope", cos=cos, sin=sin)
    return q, k, cos, sin
