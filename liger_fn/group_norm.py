r"""GroupNorm: of each sample, centre a group of channels, divide it by its standard deviation, then scale and shift each channel.

    m = mean(x)        r = rsqrt(mean((x − m)²) + eps)        x̂ = (x − m) r        y = x̂ w_c + b_c
    g = dy w_c         dx = r (g − mean(g) − x̂ mean(g x̂))     dw_c = Σ dy x̂        db_c = Σ dy

Means are over a group: its D = C/G channels of S elements each; dw and db are sums over the samples and over S. Of each sample's channel,

    A = Σ_S dy        B = Σ_S dy x̂ = r (Σ_S dy (x − μ) − (m − μ) A)        mean(g) = Σ_D w A / (D S)        mean(g x̂) = Σ_D w B / (D S)

where μ is m in x's dtype: of half precision, dy (x − μ) is then mostly exact. dw = Σ_samples B, db = Σ_samples A.
Residuals: x, w, b (for its dtype), and m and r in fp32, one of each per sample and group. Source: Wu & He 2018, arXiv:1803.08494.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check
from ._check import wide
from ._group_rows import Shape, about, centred, gradient, large_bwd, large_fwd, scaled
from ._launch import Plan, cdiv, jit, next_power_of_2, processors, tl, warps
from ._reduce import sum_rows
from ._vjp import Args, Needs, custom_vjp

FWD_MOST, BWD_MOST = 16384, 8192  # elements of a group that a program can hold; in backward it holds those of x and of dy
PER_WARP, WARPS = 512, 16  # those that a warp then does, up to as many warps: with more, a thread has too few registers
WIDEST = 2**31 - 2**16  # elements of a group that a 32-bit number counts, and a block beyond them


class Residuals(NamedTuple):
    """What the backward of `group_norm` needs."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor
    num_groups: int


def _shape(x: Tensor, num_groups: int) -> Shape:
    n, c, *spatial = x.shape
    return Shape(n, c, num_groups, c // num_groups, prod(spatial))


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float) -> Tensor:
    w, b = (t if t is None else wide(t).to(_check.wide_dtype(x)) for t in (weight, bias))
    if w is None and b is not None:
        w = torch.ones_like(b)  # the derivative of torch's own fails for a bias without a weight
    return torch.group_norm(wide(x), num_groups, w, b, eps).to(x.dtype)


def _plain_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, needs: Needs
) -> tuple[Tensor, Residuals]:  # fmt: skip
    sh = _shape(x, num_groups)
    rows = wide(x).reshape(sh.n, sh.groups, sh.d * sh.s)
    mean = rows.mean(-1, keepdim=True)
    mean = mean + (rows - mean).mean(-1, keepdim=True)  # what the first sum rounded off: of a large mean, it shows
    rstd = torch.rsqrt((rows - mean).square().mean(-1) + eps)
    return _reference(x, weight, bias, num_groups, eps), Residuals(x, weight, bias, mean.flatten(), rstd.flatten(), num_groups)


def _plain_bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd, num_groups = res
    n, c, groups, d, s = _shape(x, num_groups)
    m, r = (t.view(n, groups, 1, 1) for t in (mean, rstd))
    dyw, xw = (wide(t).reshape(n, groups, d, s) for t in (dy, x))
    dx = dw = db = None
    if needs[0]:
        g, xr = dyw if weight is None else dyw * wide(weight).view(groups, d, 1), (xw - m) * r
        c1, c2 = (t.flatten(2).mean(-1).view(n, groups, 1, 1) for t in (g, g * xr))
        dx = (r * (g - c1 - xr * c2)).view(x.shape).to(x.dtype)
    if needs[1] and weight is not None:
        mu = m.to(x.dtype).to(m.dtype)
        b = ((dyw * (xw - mu)).sum(-1, keepdim=True) - (m - mu) * dyw.sum(-1, keepdim=True)) * r
        dw = b.sum(0).view(c).to(weight.dtype)
    if needs[2] and bias is not None:
        db = dyw.sum(-1).sum(0).view(c).to(bias.dtype)
    return dx, dw, db


# --- kernels ----------------------------------------------------------------------------------------------------------------------------


@jit
def _group_norm_fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, m_ptr, r_ptr, N, G, D, S, eps, ROWS: tl.constexpr, CHANNELS: tl.constexpr, SPATIAL: tl.constexpr
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    i = tl.arange(0, ROWS)
    row = first + i
    ch = tl.arange(0, CHANNELS)[None, :]
    sp = tl.arange(0, SPATIAL)[None, None, :]
    there = (row < N)[:, None] & (ch < D)
    keep = there[:, :, None] & (sp < S)
    base = first * (D * S)
    at = i[:, None, None] * (D * S) + (ch * S)[:, :, None] + sp
    x = tl.load(x_ptr + base + at, mask=keep, other=0.0).to(tl.float32)
    size = D * S * 1.0
    m = tl.div_rn(tl.sum(tl.sum(x, 2), 1), size)
    m += tl.div_rn(tl.sum(tl.sum(tl.where(keep, x - m[:, None, None], 0.0), 2), 1), size)  # what the first sum rounded off
    x = tl.where(keep, x - m[:, None, None], 0.0)
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(tl.sum(x * x, 2), 1), size) + eps))
    y = scaled(x * r[:, None, None], w_ptr, b_ptr, (row % G).to(tl.int32)[:, None] * D + ch, there)
    tl.store(y_ptr + base + at, y.to(y_ptr.dtype.element_ty), mask=keep)
    tl.store(m_ptr + row, m, mask=row < N)
    tl.store(r_ptr + row, r, mask=row < N)


@jit
def _group_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, m_ptr, r_ptr, dx_ptr, dw_ptr, db_ptr, N, G, D, S,
    SAMPLES: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, SPATIAL: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = SAMPLES * GROUPS
    part, parts = tl.program_id(1), tl.num_programs(1)
    i = tl.arange(0, ROWS)
    sample = i // GROUPS
    group = tl.program_id(0) * GROUPS + i % GROUPS
    ch = tl.arange(0, CHANNELS)[None, :]
    sp = tl.arange(0, SPATIAL)[None, None, :]
    c = group[:, None] * D + ch
    dw = tl.zeros((ROWS, CHANNELS), tl.float32)
    db = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(part * SAMPLES, N, parts * SAMPLES):
        has = (start + sample < N) & (group < G)
        row = (start + sample).to(tl.int64) * G + group
        there = has[:, None] & (ch < D)
        keep = there[:, :, None] & (sp < S)
        base = (row * (D * S))[:, None, None]
        at = (ch * S)[:, :, None] + sp
        dy = tl.load(dy_ptr + base + at, mask=keep, other=0.0).to(tl.float32)
        a = tl.sum(dy, 2)
        if db_ptr is not None:
            db += a
        if dx_ptr is not None or dw_ptr is not None:
            x = tl.load(x_ptr + base + at, mask=keep, other=0.0).to(tl.float32)
            m = tl.load(m_ptr + row, mask=has, other=0.0)[:, None]
            r = tl.load(r_ptr + row, mask=has, other=0.0)[:, None]
            b = centred(tl.sum(dy * (x - about(m, x_ptr)[:, :, None]), 2), a, m, r, x_ptr)
            if dw_ptr is not None:
                dw += b
        if dx_ptr is not None:
            if w_ptr is not None:
                w = tl.load(w_ptr + c, mask=there, other=0.0).to(tl.float32)
                a *= w
                b *= w
            c1 = tl.div_rn(tl.sum(a, 1), D * S * 1.0)[:, None, None]
            c2 = tl.div_rn(tl.sum(b, 1), D * S * 1.0)[:, None, None]
            dx = gradient(dy, x - m[:, :, None], r[:, :, None], c1, c2, w_ptr, c, there)
            tl.store(dx_ptr + base + at, dx.to(dx_ptr.dtype.element_ty), mask=keep)
    at = (part * SAMPLES + sample).to(tl.int64)[:, None] * (G * D) + c
    there = (group < G)[:, None] & (ch < D)
    if dw_ptr is not None:
        tl.store(dw_ptr + at, dw, mask=there)
    if db_ptr is not None:
        tl.store(db_ptr + at, db, mask=there)


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """Of a program that holds whole groups: groups, channels of each, elements of each channel, warps; programs to a multiprocessor."""

    rows: int
    channels: int
    spatial: int
    warps: int
    resident: int


@lru_cache(1024)
def _tile(d: int, s: int) -> _Tile:
    """One group, or several small ones."""
    channels, spatial = next_power_of_2(d), next_power_of_2(s)
    size = channels * spatial
    rows = max(1, 2048 // size)
    return _Tile(rows, channels, spatial, min(WARPS, warps(rows * size, PER_WARP)), max(1, min(4, 8192 // (rows * size))))


@lru_cache(1024)
def _fwd_plan(sh: Shape, eps: float) -> Plan:
    t, rows = _tile(sh.d, sh.s), sh.n * sh.groups
    return Plan(
        _group_norm_fwd_kernel, (cdiv(rows, t.rows),), rows, sh.groups, sh.d, sh.s, eps,
        ROWS=t.rows, CHANNELS=t.channels, SPATIAL=t.spatial, num_warps=t.warps,
    )  # fmt: skip


@lru_cache(1024)
def _bwd_plan(sh: Shape, device: torch.device) -> tuple[Plan, int]:
    """The plan, and how many sums of each channel it makes."""
    t = _tile(sh.d, sh.s)
    groups = min(t.rows, next_power_of_2(sh.groups))
    samples, blocks = t.rows // groups, cdiv(sh.groups, groups)
    # A program's part sums are few beside what it reads, unless channels are short: then it takes several samples.
    programs = t.resident * processors(device) * (1 if sh.s < 16 else 4)
    parts = min(cdiv(sh.n, samples), cdiv(programs, blocks))
    plan = Plan(
        _group_norm_bwd_kernel, (blocks, parts), sh.n, sh.groups, sh.d, sh.s,
        SAMPLES=samples, GROUPS=groups, CHANNELS=t.channels, SPATIAL=t.spatial, num_warps=t.warps,
    )  # fmt: skip
    return plan, parts * samples


def _held(sh: Shape, most: int) -> bool:
    """Can one program hold a group?"""
    return next_power_of_2(sh.d) * next_power_of_2(sh.s) <= most


def _outputs(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    n, dtype = x.shape[0] * num_groups, _check.wide_dtype(x)
    return y, x.new_empty(n, dtype=dtype), x.new_empty(n, dtype=dtype)


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    dx = torch.empty_like(res.x, memory_format=torch.contiguous_format) if needs[0] else None
    return dx, *[torch.empty_like(t) if n and t is not None else None for t, n in zip((res.weight, res.bias), needs[1:], strict=True)]


def _fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, needs: Needs
) -> tuple[Tensor, Residuals]:  # fmt: skip
    y, mean, rstd = _outputs(x, weight, bias, num_groups, eps, needs)
    sh, flat = _shape(x, num_groups), x.contiguous()
    if _held(sh, FWD_MOST):
        _fwd_plan(sh, eps)(x.device, flat, weight, bias, y, mean, rstd)
    else:
        large_fwd(flat, weight, bias, y, mean, rstd, eps, sh)
    return y, Residuals(x, weight, bias, mean, rstd, num_groups)


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None, ...]:
    x, weight, _, mean, rstd, num_groups = res
    dx, dw, db = _gradients(res, dy, needs)
    sh, flat, dy = _shape(x, num_groups), x.contiguous(), dy.contiguous()
    if not _held(sh, BWD_MOST):
        large_bwd(dy, flat, weight, mean, rstd, dx, dw, db, sh)
        return dx, dw, db
    plan, sums = _bwd_plan(sh, x.device)
    dws, dbs = [out if out is None else rstd.new_empty(sums, sh.c) for out in (dw, db)]
    plan(x.device, dy, flat, weight, mean, rstd, dx, dws, dbs)
    sum_rows(dws, dw, dbs, db)
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
def group_norm(x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Args:
    r"""GroupNorm: `y = (x − mean(x)) rsqrt(var(x) + eps) weight_c + bias_c`, over each group of C/num_groups channels of each sample.

    Args:
        x: `[N, C, *]`, two axes or more, any strides: where x is not contiguous (`channels_last` is not), a contiguous copy is taken;
            float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        num_groups: how many groups the channels make, in order; it divides C. 1: one group, as LayerNorm over `[C, *]`. C: each channel
            is a group, as InstanceNorm.
        weight: `[C]`, or None for no scale; any float dtype.
        bias: `[C]`, or None for no shift; any float dtype.
        eps: added to the variance, `var(x) = mean((x − mean(x))²)`.

    Returns:
        y, of x's shape and dtype, contiguous: computed in fp32, rounded once. Gradients: x, weight and bias.

    Raises:
        TypeError: a tensor is not of a float dtype.
        ValueError: x has fewer than 2 axes, num_groups is not an integer of at least 1 or does not divide C, a group is empty or has over
            2³¹ − 2¹⁶ elements, weight or bias is not `[C]`, tensors are on different devices.

    Examples:
        >>> liger_fn.group_norm(torch.tensor([[1.0, 3.0, 4.0, 8.0]]), 2, bias=torch.tensor([0.0, 1.0, 0.0, 1.0]), eps=0.0)
        tensor([[-1.,  2., -1.,  2.]])

    Source: Wu & He 2018, arXiv:1803.08494.
    """
    _check.floating("group_norm", x=x)
    _check.optional("group_norm", weight=weight, bias=bias)
    _check.rank("group_norm", "x", x, 2)
    _check.integer("group_norm", "num_groups", num_groups, 1)
    c = x.shape[1]
    if c % num_groups != 0:
        raise ValueError(
            f"group_norm: num_groups must divide the {c} channels of x {list(x.shape)}, got {num_groups}; pass a divisor of {c}"
        )
    if not 0 < c // num_groups * prod(x.shape[2:]) <= WIDEST:
        raise ValueError(
            f"group_norm: a group must have 1 to {WIDEST} elements, got x {list(x.shape)} in {num_groups} groups; "
            "reshape x or change num_groups"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            _check.shape("group_norm", name, t, (c,), "the channels of x")
    _check.same_device("group_norm", x, weight=weight, bias=bias)
    weight, bias = [t if t is None else t.contiguous() for t in (weight, bias)]
    return x.contiguous(), weight, bias, num_groups, float(eps)
