r"""The rows of a norm, as rms_norm, add_rms_norm and layer_norm share them: how a program cuts them, and those too wide for one to hold.

A program holds rows of up to `RESIDENT` columns in its registers, and reads them once: those kernels stand in the ops' own files, and in
`_norm_bwd`. Of a wider row it walks the columns twice, here, and the second walk finds them in L2. With x̂ = (x − m) r, where m = 0
without a mean:

    pass 1: m, r                                    pass 2: y = x̂ (w + offset) + b
    pass 1: c₁ = mean(g), c₂ = mean(g x̂)            pass 2: dx = r (g − c₁ − x̂ c₂) + ds        where g = dy (w + offset), c₁ = 0 without m

Mean and squares of the blocks of columns are merged by their centred sums, so that a large mean cancels nothing. Source: Chan, Golub &
LeVeque 1983, doi:10.1080/00031305.1983.10483115. The sums over rows, dw and db, take a launch of their own, by blocks of columns.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ._launch import cdiv, jit, launch, next_power_of_2, processors, tl, warps
from ._reduce import partial, sum_rows

RESIDENT = 65536  # columns one program can hold in forward
WIDEST = 2**31 - 2**16  # columns that a 32-bit number counts, and a block beyond them
BLOCK, WARPS = 16384, 16  # of a wide row: columns at a time, and the warps for them
ROWS, COLUMNS = 16, 128  # of a sum over wide rows: what a program adds at a time


class Tile(NamedTuple):
    """How a row length is cut in forward: the rows and columns a program holds, and its warps."""

    rows: int
    columns: int
    warps: int


def tile(h: int, per_warp: int = 512) -> Tile:
    """One wide row, or several short ones. A warp holds `per_warp` elements of rows of 1024 to 8192, and 1024 of others (H100)."""
    columns = next_power_of_2(h)
    rows = max(1, 2048 // columns)
    return Tile(rows, columns, warps(rows * columns, per_warp if 1024 <= columns <= 8192 else 1024))


# --- kernels ----------------------------------------------------------------------------------------------------------------------------


@jit
def _wide_fwd_kernel(
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
        x = tl.load(x_at + col, mask=col < H, other=0.0).to(tl.float32)
        if add_ptr is not None:
            x += tl.load(add_ptr + row * add_stride + col, mask=col < H, other=0.0).to(tl.float32)
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
        tl.debug_barrier()  # the second pass reads what all threads stored
        x_at = s_ptr + row * H
    for start in range(0, H, BLOCK):
        col = start + block
        y = (tl.load(x_at + col, mask=col < H, other=0.0).to(tl.float32) - mean) * r
        if LLAMA:
            y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        if w_ptr is not None:
            y *= tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32) + offset
        if b_ptr is not None:
            y += tl.load(b_ptr + col, mask=col < H, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * H + col, y.to(y_ptr.dtype.element_ty), mask=col < H)


@jit
def _wide_bwd_kernel(
    dy_ptr, ds_ptr, x_ptr, w_ptr, m_ptr, r_ptr, dx_ptr, again_ptr, dy_stride, ds_stride, stride, H, offset, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    x_at, dy_at = x_ptr + row * stride, dy_ptr + row * dy_stride
    r = tl.load(r_ptr + row)
    mean = 0.0
    if m_ptr is not None:
        mean = tl.load(m_ptr + row)
    c1 = 0.0
    c2 = 0.0
    for start in range(0, H, BLOCK):
        col = start + block
        g = tl.load(dy_at + col, mask=col < H, other=0.0).to(tl.float32)
        xr = (tl.load(x_at + col, mask=col < H, other=0.0).to(tl.float32) - mean) * r
        if w_ptr is not None:
            g *= tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32) + offset
        if m_ptr is not None:
            c1 += tl.sum(g, 0)
        c2 += tl.sum(g * xr, 0)
    c1 = tl.div_rn(c1, H * 1.0)
    c2 = tl.div_rn(c2, H * 1.0)
    for start in range(0, H, BLOCK):
        col = start + block
        g = tl.load(dy_at + col, mask=col < H, other=0.0).to(tl.float32)
        xr = (tl.load(x_at + col, mask=col < H, other=0.0).to(tl.float32) - mean) * r
        if w_ptr is not None:
            g *= tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32) + offset
        dx = r * (g - c1 - xr * c2)
        if ds_ptr is not None:
            dx += tl.load(ds_ptr + row * ds_stride + col, mask=col < H, other=0.0).to(tl.float32)
        dx = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + row * H + col, dx, mask=col < H)
        if again_ptr is not None:
            tl.store(again_ptr + row * H + col, dx, mask=col < H)


@jit
def _wide_sums_kernel(
    dy_ptr, x_ptr, m_ptr, r_ptr, dw_ptr, db_ptr, dy_stride, stride, N, H, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    part = tl.program_id(1)
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    dw = tl.zeros((ROWS, COLUMNS), tl.float32)
    db = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(part * ROWS, N, tl.num_programs(1) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        keep = (row < N)[:, None] & (col < H)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col, mask=keep, other=0.0).to(tl.float32)
        db += dy
        if dw_ptr is not None:
            xr = tl.load(x_ptr + row[:, None] * stride + col, mask=keep, other=0.0).to(tl.float32)
            if m_ptr is not None:
                xr -= tl.load(m_ptr + row, mask=row < N, other=0.0)[:, None]
            dw += dy * (xr * tl.load(r_ptr + row, mask=row < N, other=0.0)[:, None])
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
    launch(
        _wide_fwd_kernel, (x.shape[0],), x.device,
        x, add, s, weight, bias, y, mean, rstd, x.stride(0), 0 if add is None else add.stride(0), x.shape[1], eps, offset,
        LLAMA=llama, BLOCK=BLOCK, num_warps=WARPS,
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
    if dx is not None:
        launch(
            _wide_bwd_kernel, (n,), x.device,
            dy, ds, x, weight, mean, rstd, dx, again, dy.stride(0), 0 if ds is None else ds.stride(0), x.stride(0), h, offset,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    if dw is not None or db is not None:
        blocks = cdiv(h, COLUMNS)
        parts = max(1, min(cdiv(n, ROWS), cdiv(16 * processors(x.device), blocks)))
        dws, dbs = partial(dw, parts, rstd), partial(db, parts, rstd)
        launch(
            _wide_sums_kernel, (blocks, parts), x.device,
            dy, x, mean, rstd, dws, dbs, dy.stride(0), x.stride(0), n, h, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
        sum_rows(dws, dw, dbs, db)
