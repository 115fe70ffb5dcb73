r"""The rows of a norm, as rms_norm, add_rms_norm and layer_norm share them: how a program cuts them, and those too wide for one to hold.

In forward a program holds a row of up to `RESIDENT` columns in its registers, and reads it once: those kernels stand in the ops' own files.
Of a wider row it walks the columns twice, here, and the second walk finds them in L2. With x̂ = (x − m) r, where m = 0 without a mean:

    walk 1: m, r                        walk 2: y = x̂ (w + offset) + b

Backward, of the rows that `_norm_bwd` cannot hold, with g = dy (w + offset), where c₁ = 0 without m:

    c₁ = mean(g)        c₂ = mean(g x̂)        dx = r (g − c₁ − x̂ c₂) + ds        dw = Σ_rows dy x̂        db = Σ_rows dy

dx alone takes two such walks. Where dw or db is wanted too, one launch finds c₁ and c₂ row by row, and a second, by blocks of columns, all
the rest, so that memory is read twice and not three times. Each gradient has the same bits, whichever others are wanted with it.

Mean and squares of the blocks of columns are merged by their centred sums, so that a large mean cancels nothing. Source: Chan, Golub &
LeVeque 1983, doi:10.1080/00031305.1983.10483115.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._elementary import rounded
from ._launch import cdiv, jit, launch, next_power_of_2, processors, tl, warps
from ._reduce import partial, sum_rows

RESIDENT = 16384  # columns one program holds in forward
WIDEST = 2**31 - 2**16  # columns that a 32-bit number counts, and a block beyond them
ROWS, COLUMNS, PROGRAMS = 8, 256, 4  # of a backward by blocks of columns: what a program takes at a time, programs to a multiprocessor


class Tile(NamedTuple):
    """How a row length is cut in forward: the rows and columns a program holds, and its warps."""

    rows: int
    columns: int
    warps: int


def tile(h: int, per_warp: int = 512) -> Tile:
    """One wide row, or several short ones. A warp holds `per_warp` elements of rows of 1024 to 8192, and 1024 of others (H100)."""
    columns = next_power_of_2(h)
    rows = max(1, (1024 if columns <= 128 else 2048) // columns)
    return Tile(rows, columns, warps(rows * columns, per_warp if 1024 <= columns <= 8192 else 1024))


def _walk(h: int, *strides: int) -> tuple[int, int]:
    """Columns of a wide row that a program takes at a time in forward, and its warps (H100). Narrow loads take a thread more registers."""
    columns = 16384 if h <= 32768 or any(n % 16 for n in (h, *strides)) else 32768
    return columns, warps(columns, 1024)


# --- kernels ----------------------------------------------------------------------------------------------------------------------------


@jit
def _norm_wide_fwd_kernel(
    x_ptr, add_ptr, s_ptr, w_ptr, b_ptr, y_ptr, m_ptr, r_ptr, stride, add_stride, H, eps, offset, LLAMA: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    x_at = x_ptr + row * stride
    about = 0.0
    mean = 0.0
    squares = 0.0
    for start in range(0, H, BLOCK):
        col = start + block
        # what the second walk reads again is kept in L2: x, or the sum
        x = tl.load(x_at + col, mask=col < H, other=0.0, eviction_policy="evict_last" if add_ptr is None else "evict_first").to(tl.float32)
        if add_ptr is not None:
            x += tl.load(add_ptr + row * add_stride + col, mask=col < H, other=0.0, eviction_policy="evict_first").to(tl.float32)
            s = x.to(s_ptr.dtype.element_ty)
            tl.store(s_ptr + row * H + col, s, mask=col < H)
            x = s.to(tl.float32)
        if m_ptr is not None:
            here = tl.minimum(H - start, BLOCK) * 1.0
            share = here / (start + here)
            if start == 0:  # about the mean: from here on all is counted from it, and a large mean is rounded once, at the end
                about = tl.div_rn(tl.sum(x, 0), here)
            x = tl.where(col < H, x - about, 0.0)
            own = tl.div_rn(tl.sum(x, 0), here)
            x = tl.where(col < H, x - own, 0.0)
            gap = own - mean
            mean += gap * share
            squares += gap * gap * (start * share)
        squares += tl.sum(x * x, 0)
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, H * 1.0) + eps))
    tl.store(r_ptr + row, r)
    if m_ptr is not None:
        mean += about
        tl.store(m_ptr + row, mean)
    if add_ptr is not None:
        tl.debug_barrier()  # the second walk reads what all threads stored
        x_at = s_ptr + row * H
    for start in range(0, H, BLOCK):
        col = start + block
        y = (tl.load(x_at + col, mask=col < H, other=0.0, eviction_policy="evict_first").to(tl.float32) - mean) * r
        if LLAMA:
            y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        if w_ptr is not None:
            y *= tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32) + offset
        if b_ptr is not None:
            y += tl.load(b_ptr + col, mask=col < H, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * H + col, y.to(y_ptr.dtype.element_ty), mask=col < H, cache_modifier=".cs")


@jit
def _norm_wide_bwd_kernel(
    dy_ptr, ds_ptr, x_ptr, w_ptr, m_ptr, r_ptr, c1_ptr, c2_ptr, dx_ptr, again_ptr, dy_stride, ds_stride, stride, H, offset,
    BLOCK: tl.constexpr
):  # fmt: skip
    """dx of a row; or where there is no room for it, its c₁ and c₂."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    x_at, dy_at = x_ptr + row * stride, dy_ptr + row * dy_stride
    r = tl.load(r_ptr + row)
    m = 0.0
    if m_ptr is not None:
        m = tl.load(m_ptr + row)
        first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, H, BLOCK):
        col = start + block
        g = tl.load(dy_at + col, mask=col < H, other=0.0, eviction_policy="" if dx_ptr is None else "evict_last").to(tl.float32)
        x = tl.load(x_at + col, mask=col < H, other=0.0, eviction_policy="" if dx_ptr is None else "evict_last").to(tl.float32)
        if w_ptr is not None:
            g = rounded(g, tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32) + offset)
        if m_ptr is not None:
            first += g
        second += g * ((x - m) * r)
    c1 = 0.0
    if m_ptr is not None:
        c1 = tl.div_rn(tl.sum(first, 0), H * 1.0)
    c2 = tl.div_rn(tl.sum(second, 0), H * 1.0)
    if dx_ptr is None:
        tl.store(c2_ptr + row, c2)
        if m_ptr is not None:
            tl.store(c1_ptr + row, c1)
    else:
        for back in range(0, H, BLOCK):  # the last columns first: L2 is the likeliest to have those
            col = (H - 1) // BLOCK * BLOCK - back + block
            g = tl.load(dy_at + col, mask=col < H, other=0.0, eviction_policy="evict_first").to(tl.float32)
            x = tl.load(x_at + col, mask=col < H, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if w_ptr is not None:
                g = rounded(g, tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32) + offset)
            dx = r * (g - c1 - (x - m) * r * c2)
            if ds_ptr is not None:
                dx += tl.load(ds_ptr + row * ds_stride + col, mask=col < H, other=0.0, eviction_policy="evict_first").to(tl.float32)
            dx = dx.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + row * H + col, dx, mask=col < H, cache_modifier=".cs")
            if again_ptr is not None:
                tl.store(again_ptr + row * H + col, dx, mask=col < H, cache_modifier=".cs")


@jit
def _norm_wide_sums_kernel(
    dy_ptr, ds_ptr, x_ptr, w_ptr, m_ptr, r_ptr, c1_ptr, c2_ptr, dx_ptr, again_ptr, dw_ptr, db_ptr,
    dy_stride, ds_stride, stride, N, H, offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Sums over the rows, of a block of columns; and where there is room for it, its dx, from c₁ and c₂."""
    part = tl.program_id(1)
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if dx_ptr is not None and w_ptr is not None:
        w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32) + offset
    if dw_ptr is not None:
        dw = tl.zeros((ROWS, COLUMNS), tl.float32)
    if db_ptr is not None:
        db = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(part * ROWS, N, tl.num_programs(1) * ROWS):
        row = (N - 1 - start - tl.arange(0, ROWS)).to(tl.int64)[:, None]  # the last first: those may still be in L2
        keep = (row >= 0) & (col < H)
        d = tl.load(dy_ptr + row * dy_stride + col, mask=keep, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if dx_ptr is not None or dw_ptr is not None:
            x = tl.load(x_ptr + row * stride + col, mask=keep, other=0.0, eviction_policy="evict_first").to(tl.float32)
            r = tl.load(r_ptr + row, mask=row >= 0, other=0.0)
            m = 0.0
            if m_ptr is not None:
                m = tl.load(m_ptr + row, mask=row >= 0, other=0.0)
            xr = (x - m) * r
        if dx_ptr is not None:
            g = d
            if w_ptr is not None:
                g = rounded(d, w)
            c1 = 0.0
            if m_ptr is not None:
                c1 = tl.load(c1_ptr + row, mask=row >= 0, other=0.0)
            dx = r * (g - c1 - xr * tl.load(c2_ptr + row, mask=row >= 0, other=0.0))
            if ds_ptr is not None:
                dx += tl.load(ds_ptr + row * ds_stride + col, mask=keep, other=0.0, eviction_policy="evict_first").to(tl.float32)
            dx = dx.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + row * H + col, dx, mask=keep, cache_modifier=".cs")
            if again_ptr is not None:
                tl.store(again_ptr + row * H + col, dx, mask=keep, cache_modifier=".cs")
        if dw_ptr is not None:
            dw += d * xr
        if db_ptr is not None:
            db += d
    at = part.to(tl.int64) * H + col
    if dw_ptr is not None:
        tl.store(dw_ptr + at, tl.sum(dw, 0)[None, :].to(dw_ptr.dtype.element_ty), mask=col < H)
    if db_ptr is not None:
        tl.store(db_ptr + at, tl.sum(db, 0)[None, :].to(db_ptr.dtype.element_ty), mask=col < H)


# --- launches ---------------------------------------------------------------------------------------------------------------------------


def wide_fwd(
    x: Tensor,
    weight: Tensor | None,
    y: Tensor,
    rstd: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    llama: bool = False,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    add: Tensor | None = None,
    s: Tensor | None = None,
) -> None:
    """Write y and rstd of the rows `[N, H]` of x; mean too where there is one; where there is `add`, s = x + add, whose norm y then is."""
    n, h = x.shape
    strides = x.stride(0), 0 if add is None else add.stride(0)
    columns, num_warps = _walk(h, *strides)
    launch(
        _norm_wide_fwd_kernel, (n,), x.device,
        x, add, s, weight, bias, y, mean, rstd, *strides, h, eps, offset,
        LLAMA=llama, BLOCK=columns, num_warps=num_warps,
    )  # fmt: skip


def wide_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dx: Tensor | None,
    dw: Tensor | None,
    *,
    offset: float = 0.0,
    mean: Tensor | None = None,
    db: Tensor | None = None,
    ds: Tensor | None = None,
    again: Tensor | None = None,
) -> None:
    """Write what is not None of dx, dw and db; ds is added to dx, and `again` is dx once more."""
    n, h = x.shape
    strides = dy.stride(0), 0 if ds is None else ds.stride(0), x.stride(0)
    columns, num_warps = _walk(h, *strides)
    columns //= max(2, *(t.element_size() for t in (dy, x, weight) if t is not None))  # dy and x are two, and fp32 takes twice the room
    sums = dw is not None or db is not None
    c1 = c2 = None
    if dx is not None:
        if sums:
            c1, c2 = None if mean is None else torch.empty_like(rstd), torch.empty_like(rstd)
        made = (None, None) if sums else (dx, again)
        launch(
            _norm_wide_bwd_kernel, (n,), x.device,
            dy, None if sums else ds, x, weight, mean, rstd, c1, c2, *made, *strides, h, offset,
            BLOCK=columns, num_warps=num_warps,
        )  # fmt: skip
    if sums:
        blocks = cdiv(h, COLUMNS)
        parts = max(1, min(cdiv(n, ROWS), cdiv(PROGRAMS * processors(x.device), blocks)))
        dws, dbs = partial(dw, parts, rstd), partial(db, parts, rstd)
        launch(
            _norm_wide_sums_kernel, (blocks, parts), x.device,
            dy, ds, x, weight, mean, rstd, c1, c2, dx, again, dws, dbs, *strides, n, h, offset,
            ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
        sum_rows(dws, dw, dbs, db)
