r"""The groups of group_norm that a program cannot hold: those it walks twice, and those that several programs share.

x `[N, C, *]` lies as N G rows of L = D S elements, D = C/G channels of S elements each. Where there are rows enough for every processor, a
program walks its own row twice, and the second walk finds it in L2. Where there are few, each pass is a launch over parts of the rows:

    sums of parts: means, and squares around them      merged: m, r      then y = x̂ w + b
    sums of parts: A and B of each channel             merged: c₁, c₂    then dx = r (g − c₁ − x̂ c₂), where g = dy w

with A, B as in group_norm.py, whose sums over the samples are db and dw, c₁ = Σ_channels w A / L and c₂ = Σ_channels w B / L.
The last launch goes backwards over x, of which it finds in L2 what was read last. Means and squares are merged by their centred sums, so
that a large mean cancels nothing. Source: Chan, Golub & LeVeque 1983, doi:10.1080/00031305.1983.10483115.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from torch import Tensor

from ._elementary import rounded
from ._launch import cdiv, has_fp64, jit, launch, next_power_of_2, processors, tl, warps
from ._reduce import sum_rows

BLOCK, WARPS = 16384, 16  # of a row whose channels do not matter: elements at a time, and the warps for them
TILE, PER_WARP = 4096, 512  # elements of a tile of channels, and those that a warp holds
PARTS = 256  # that a row is cut into at most
MERGED = 1024  # part sums that a program merges at a time
ENOUGH = 2  # rows to a processor from which on each has a program to itself


class Tile(NamedTuple):
    """Channels, the elements of each, and the warps of a program that holds them."""

    channels: int
    spatial: int
    warps: int


@cache
def tile(channels: int, s: int) -> Tile:
    """A piece of one channel, or several short ones."""
    spatial = min(next_power_of_2(s), TILE)
    channels = min(next_power_of_2(channels), TILE // spatial)
    return Tile(channels, spatial, warps(channels * spatial, PER_WARP))


# --- kernels ----------------------------------------------------------------------------------------------------------------------------


@jit
def scaled(xr, w_ptr, b_ptr, c, there):
    """x̂ w + b, where the channels `c` are all axes of x̂ but the last."""
    y = xr
    if w_ptr is not None:
        y *= tl.expand_dims(tl.load(w_ptr + c, mask=there, other=0.0).to(tl.float32), -1)
    if b_ptr is not None:
        y += tl.expand_dims(tl.load(b_ptr + c, mask=there, other=0.0).to(tl.float32), -1)
    return y


@jit
def gradient(dy, xc, r, c1, c2, w_ptr, c, there):
    """r (g − c₁ − x̂ c₂), likewise, of centred x; r, c₁ and c₂ broadcast to it."""
    xr = xc * r
    g = dy
    if w_ptr is not None:
        w = tl.expand_dims(tl.load(w_ptr + c, mask=there, other=0.0).to(tl.float32), -1)
        g = rounded(dy, w + tl.zeros_like(dy))
    return r * (g - c1 - rounded(xr, c2 + tl.zeros_like(xr)))


@jit
def about(m, x_ptr):
    """μ: m in x's dtype."""
    return m.to(x_ptr.dtype.element_ty).to(tl.float32)


@jit
def centred(b, a, m, r, x_ptr):
    """r Σ dy (x − m), from b = Σ dy (x − μ) and a = Σ dy."""
    return (b - (m - about(m, x_ptr)) * a) * r


@jit
def _moments(x_ptr, start, end, BLOCK: tl.constexpr):
    """(a, m, q) of the elements from `start` to `end`: a is about their mean, a + m is it, q is the sum of squares around it."""
    block = tl.arange(0, BLOCK)
    near = 0.0
    mean = 0.0
    squares = 0.0
    for at in range(start, end, BLOCK):
        col = at + block
        x = tl.load(x_ptr + col, mask=col < end, other=0.0).to(tl.float32)
        here = tl.minimum(end - at, BLOCK) * 1.0
        before = (at - start) * 1.0
        if at == start:  # from here on all is counted from it, and a large mean is rounded once, at the end
            near = tl.div_rn(tl.sum(x, 0), here)
        x = tl.where(col < end, x - near, 0.0)
        own = tl.div_rn(tl.sum(x, 0), here)
        x = tl.where(col < end, x - own, 0.0)
        gap = own - mean
        share = tl.div_rn(here, before + here)
        mean += gap * share
        squares += tl.sum(x * x, 0) + gap * gap * (before * share)
    return near, mean, squares


@jit
def _group_norm_wide_fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, m_ptr, r_ptr, G, D, S, eps, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, SPATIAL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = row * (D * S)
    near, mean, squares = _moments(x_ptr + base, 0, D * S, BLOCK)
    m = near + mean
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, D * S * 1.0) + eps))
    tl.store(m_ptr + row, m)
    tl.store(r_ptr + row, r)
    first = (row % G).to(tl.int32) * D
    for start in range(0, D, CHANNELS):
        ch = start + tl.arange(0, CHANNELS)
        for left in range(0, S, SPATIAL):
            sp = left + tl.arange(0, SPATIAL)[None, :]
            at = ch[:, None] * S + sp
            keep = (ch < D)[:, None] & (sp < S)
            x = tl.load(x_ptr + base + at, mask=keep, other=0.0).to(tl.float32)
            y = scaled((x - m) * r, w_ptr, b_ptr, first + ch, ch < D)
            tl.store(y_ptr + base + at, y.to(y_ptr.dtype.element_ty), mask=keep)


@jit
def _group_norm_moments_kernel(x_ptr, p_ptr, L, length, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    start = part * length
    near, mean, squares = _moments(x_ptr + row * L, start, start + tl.minimum(L - start, length), BLOCK)
    at = p_ptr + row * 3 * parts + part
    tl.store(at, near)
    tl.store(at + parts, mean)
    tl.store(at + 2 * parts, squares)


@jit
def _group_norm_merge_moments_kernel(p_ptr, m_ptr, r_ptr, L, length, parts, eps, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    keep = part < parts
    at = p_ptr + row * 3 * parts
    n = tl.where(keep, tl.minimum(L - part * length, length), 0) * 1.0
    near = tl.load(at)
    own = tl.where(keep, tl.load(at + part, mask=keep, other=0.0) - near + tl.load(at + parts + part, mask=keep, other=0.0), 0.0)
    mean = tl.div_rn(tl.sum(own * n, 0), L * 1.0)
    gap = tl.where(keep, own - mean, 0.0)
    squares = tl.sum(tl.load(at + 2 * parts + part, mask=keep, other=0.0) + gap * gap * n, 0)
    tl.store(m_ptr + row, near + mean)
    tl.store(r_ptr + row, tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, L * 1.0) + eps)))


@jit
def _group_norm_apply_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, m_ptr, r_ptr, N, C, D, S, CHANNELS: tl.constexpr, SPATIAL: tl.constexpr
):  # fmt: skip
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    across = tl.cdiv(S, SPATIAL)
    i = tl.arange(0, CHANNELS)
    row = (pid // across).to(tl.int64) * CHANNELS + i
    there = row < N
    base = (pid // across).to(tl.int64) * CHANNELS * S
    sp = pid % across * SPATIAL + tl.arange(0, SPATIAL)[None, :]
    at = i[:, None] * S + sp
    keep = there[:, None] & (sp < S)
    x = tl.load(x_ptr + base + at, mask=keep, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + row // D, mask=there, other=0.0)[:, None]
    r = tl.load(r_ptr + row // D, mask=there, other=0.0)[:, None]
    y = scaled((x - m) * r, w_ptr, b_ptr, row % C, there)
    tl.store(y_ptr + base + at, y.to(y_ptr.dtype.element_ty), mask=keep)


@jit
def _group_norm_wide_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, m_ptr, r_ptr, dx_ptr, dw_ptr, db_ptr, G, D, S, CHANNELS: tl.constexpr, SPATIAL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = row * (D * S)
    m = tl.load(m_ptr + row)
    r = tl.load(r_ptr + row)
    first = (row % G).to(tl.int32) * D
    c1 = tl.zeros((CHANNELS,), tl.float32)
    c2 = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, D, CHANNELS):
        ch = start + tl.arange(0, CHANNELS)
        a = tl.zeros((CHANNELS, SPATIAL), tl.float32)
        b = tl.zeros((CHANNELS, SPATIAL), tl.float32)
        for left in range(0, S, SPATIAL):
            sp = left + tl.arange(0, SPATIAL)[None, :]
            keep = (ch < D)[:, None] & (sp < S)
            at = ch[:, None] * S + sp
            dy = tl.load(dy_ptr + base + at, mask=keep, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + base + at, mask=keep, other=0.0).to(tl.float32)
            a += dy
            b += dy * (x - about(m, x_ptr))
        a = tl.sum(a, 1)
        b = centred(tl.sum(b, 1), a, m, r, x_ptr)
        if db_ptr is not None:
            tl.store(db_ptr + row * D + ch, a, mask=ch < D)
        if dw_ptr is not None:
            tl.store(dw_ptr + row * D + ch, b, mask=ch < D)
        if w_ptr is not None:
            w = tl.load(w_ptr + first + ch, mask=ch < D, other=0.0).to(tl.float32)
            a *= w
            b *= w
        c1 += a
        c2 += b
    c1 = tl.div_rn(tl.sum(c1, 0), D * S * 1.0)
    c2 = tl.div_rn(tl.sum(c2, 0), D * S * 1.0)
    for start in range(0, D, CHANNELS):
        ch = start + tl.arange(0, CHANNELS)
        for left in range(0, S, SPATIAL):
            sp = left + tl.arange(0, SPATIAL)[None, :]
            keep = (ch < D)[:, None] & (sp < S)
            at = ch[:, None] * S + sp
            dy = tl.load(dy_ptr + base + at, mask=keep, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + base + at, mask=keep, other=0.0).to(tl.float32)
            dx = gradient(dy, x - m, r, c1, c2, w_ptr, first + ch, ch < D)
            tl.store(dx_ptr + base + at, dx.to(dx_ptr.dtype.element_ty), mask=keep)


@jit
def _group_norm_sums_kernel(
    dy_ptr, x_ptr, m_ptr, r_ptr, dw_ptr, db_ptr, N, D, S, length, CHANNELS: tl.constexpr, SPATIAL: tl.constexpr, FP64: tl.constexpr
):  # fmt: skip
    WIDE: tl.constexpr = tl.float64 if FP64 else tl.float32  # of a long sum, the last steps round most
    part = tl.program_id(1)
    i = tl.arange(0, CHANNELS)
    row = tl.program_id(0).to(tl.int64) * CHANNELS + i
    there = row < N
    base = tl.program_id(0).to(tl.int64) * CHANNELS * S
    if dw_ptr is not None:
        m = tl.load(m_ptr + row // D, mask=there, other=0.0)
        r = tl.load(r_ptr + row // D, mask=there, other=0.0)
    a = tl.zeros((CHANNELS, SPATIAL), tl.float32)
    b = tl.zeros((CHANNELS, SPATIAL), tl.float32)
    start = part * length
    for left in range(start, start + tl.minimum(S - start, length), SPATIAL):
        sp = left + tl.arange(0, SPATIAL)[None, :]
        keep = there[:, None] & (sp < S)
        at = i[:, None] * S + sp
        dy = tl.load(dy_ptr + base + at, mask=keep, other=0.0).to(tl.float32)
        a += dy
        if dw_ptr is not None:
            x = tl.load(x_ptr + base + at, mask=keep, other=0.0).to(tl.float32)
            b += dy * (x - about(m, x_ptr)[:, None])
    a = tl.sum(a.to(WIDE), 1).to(tl.float32)
    at = part.to(tl.int64) * N + row
    if dw_ptr is not None:
        tl.store(dw_ptr + at, centred(tl.sum(b.to(WIDE), 1).to(tl.float32), a, m, r, x_ptr), mask=there)
    if db_ptr is not None:
        tl.store(db_ptr + at, a, mask=there)


@jit
def _group_norm_merge_sums_kernel(a_ptr, b_ptr, w_ptr, c_ptr, N, G, D, L, parts, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = (row % G).to(tl.int32) * D
    c1 = tl.zeros((PARTS, CHANNELS), tl.float32)
    c2 = tl.zeros((PARTS, CHANNELS), tl.float32)
    for start in range(0, D, CHANNELS):
        ch = start + tl.arange(0, CHANNELS)[None, :]
        for top in range(0, parts, PARTS):
            part = top + tl.arange(0, PARTS)[:, None]
            keep = (part < parts) & (ch < D)
            at = part.to(tl.int64) * N + row * D + ch
            a = tl.load(a_ptr + at, mask=keep, other=0.0)
            b = tl.load(b_ptr + at, mask=keep, other=0.0)
            if w_ptr is not None:
                w = tl.load(w_ptr + first + ch, mask=ch < D, other=0.0).to(tl.float32)
                a *= w
                b *= w
            c1 += a
            c2 += b
    tl.store(c_ptr + 2 * row, tl.div_rn(tl.sum(tl.sum(c1, 1), 0), L * 1.0))
    tl.store(c_ptr + 2 * row + 1, tl.div_rn(tl.sum(tl.sum(c2, 1), 0), L * 1.0))


@jit
def _group_norm_dx_kernel(
    dy_ptr, x_ptr, w_ptr, m_ptr, r_ptr, c_ptr, dx_ptr, N, C, D, S, CHANNELS: tl.constexpr, SPATIAL: tl.constexpr
):  # fmt: skip
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    across = tl.cdiv(S, SPATIAL)
    i = tl.arange(0, CHANNELS)
    row = (pid // across).to(tl.int64) * CHANNELS + i
    there = row < N
    base = (pid // across).to(tl.int64) * CHANNELS * S
    sp = pid % across * SPATIAL + tl.arange(0, SPATIAL)[None, :]
    at = i[:, None] * S + sp
    keep = there[:, None] & (sp < S)
    dy = tl.load(dy_ptr + base + at, mask=keep, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + base + at, mask=keep, other=0.0).to(tl.float32)
    group = row // D
    m = tl.load(m_ptr + group, mask=there, other=0.0)[:, None]
    r = tl.load(r_ptr + group, mask=there, other=0.0)[:, None]
    c1 = tl.load(c_ptr + 2 * group, mask=there, other=0.0)[:, None]
    c2 = tl.load(c_ptr + 2 * group + 1, mask=there, other=0.0)[:, None]
    dx = gradient(dy, x - m, r, c1, c2, w_ptr, row % C, there)
    tl.store(dx_ptr + base + at, dx.to(dx_ptr.dtype.element_ty), mask=keep)


# --- launches ---------------------------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """How x lies: samples, channels, groups, channels of a group, elements of a channel."""

    n: int
    c: int
    groups: int
    d: int
    s: int


def large_fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor, mean: Tensor, rstd: Tensor, eps: float, sh: Shape) -> None:
    """Write y, mean and rstd of contiguous x."""
    n, c, groups, d, s = sh
    rows, size = n * groups, d * s
    if rows >= ENOUGH * processors(x.device):
        t = tile(d, s)
        launch(
            _group_norm_wide_fwd_kernel, (rows,), x.device,
            x, weight, bias, y, mean, rstd, groups, d, s, eps, BLOCK=BLOCK, CHANNELS=t.channels, SPATIAL=t.spatial, num_warps=WARPS,
        )  # fmt: skip
        return
    length = cdiv(cdiv(size, PARTS), BLOCK) * BLOCK
    parts = cdiv(size, length)
    found = mean.new_empty(rows, 3, parts)
    launch(_group_norm_moments_kernel, (rows, parts), x.device, x, found, size, length, BLOCK=BLOCK, num_warps=WARPS)
    launch(
        _group_norm_merge_moments_kernel, (rows,), x.device,
        found, mean, rstd, size, length, parts, eps, PARTS=next_power_of_2(parts), num_warps=1,
    )  # fmt: skip
    t = tile(n * c, s)
    launch(
        _group_norm_apply_kernel, (cdiv(n * c, t.channels) * cdiv(s, t.spatial),), x.device,
        x, weight, bias, y, mean, rstd, n * c, c, d, s, CHANNELS=t.channels, SPATIAL=t.spatial, num_warps=t.warps,
    )  # fmt: skip


def large_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    sh: Shape,
) -> None:
    """Write what is not None of dx, dw and db; dy and x are contiguous."""
    n, c, groups, d, s = sh
    rows = n * groups
    if dx is not None and rows >= ENOUGH * processors(x.device):
        t = tile(d, s)
        dws, dbs = (out if out is None else mean.new_empty(n, c) for out in (dw, db))
        launch(
            _group_norm_wide_bwd_kernel, (rows,), x.device,
            dy, x, weight, mean, rstd, dx, dws, dbs, groups, d, s, CHANNELS=t.channels, SPATIAL=t.spatial, num_warps=t.warps,
        )  # fmt: skip
    else:
        t = tile(n * c, s)
        length = cdiv(cdiv(s, PARTS), 2 * t.spatial) * 2 * t.spatial
        parts = cdiv(s, length)
        dws, dbs = (mean.new_empty(parts * n, c) if dx is not None or out is not None else None for out in (dw, db))
        blocks = cdiv(n * c, t.channels)
        launch(
            _group_norm_sums_kernel, (blocks, parts), x.device,
            dy, x, mean, rstd, dws, dbs, n * c, d, s, length,
            CHANNELS=t.channels, SPATIAL=t.spatial, FP64=has_fp64(x.device), num_warps=t.warps,
        )  # fmt: skip
        if dx is not None:
            shares = mean.new_empty(rows, 2)
            channels = min(next_power_of_2(d), MERGED)
            launch(
                _group_norm_merge_sums_kernel, (rows,), x.device,
                dbs, dws, weight, shares, n * c, groups, d, d * s, parts,
                PARTS=min(next_power_of_2(parts), MERGED // channels), CHANNELS=channels, num_warps=4,
            )  # fmt: skip
            launch(
                _group_norm_dx_kernel, (blocks * cdiv(s, t.spatial),), x.device,
                dy, x, weight, mean, rstd, shares, dx, n * c, c, d, s, CHANNELS=t.channels, SPATIAL=t.spatial, num_warps=t.warps,
            )  # fmt: skip
    sum_rows(dws, dw, dbs, db)
