r"""The backward of the rows of a norm, as rms_norm, add_rms_norm and layer_norm share it.

    c₁ = mean(g)        c₂ = mean(g x̂)        dx = r (g − c₁ − x̂ c₂) + ds        dw = Σ_rows dy x̂        db = Σ_rows dy

where x̂ = (x − m) r, g = dy (w + offset), m = c₁ = 0 without a mean, and ds is what else flows into x. A program takes rows at even
intervals and keeps its own sums over them, which a second launch adds up. One program to a multiprocessor has few registers for the next
row, so that row comes through shared memory while this one is computed (`STAGES`). Where dw leaves no room for the weight, that is read
twice for each row, from L2 (`AGAIN`). Wider rows: `_norm_rows.wide_bwd`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import _launch
from ._elementary import rounded
from ._launch import Plan, as_rows, cdiv, jit, next_power_of_2, processors, rows_and_stride, tl
from ._norm_rows import wide_bwd
from ._reduce import partial, sum_rows

HELD, SUMMED = 8192, 16384  # columns that one program can hold, and of which it can hold dw; the second of 16-bit numbers, without db
STEP = 4096  # elements a program takes at a time


class Tile(NamedTuple):
    """How rows are cut: the rows and columns of a step, warps, steps in flight, the programs a multiprocessor has (H100)."""

    rows: int
    columns: int
    warps: int
    stages: int
    resident: int


def _tile(h: int, size: int) -> Tile:
    """For rows of `h` columns, of which a step reads `size` bytes an element. Some 64 KB in flight saturate an H100's memory."""
    columns = next_power_of_2(h)
    rows = max(1, STEP // columns)
    step = rows * columns
    if columns > HELD:
        return Tile(rows, columns, 16, 1, 1)
    stages = 4 if step * size <= 2**14 else 3 if step * size <= 2**15 else 1
    return Tile(rows, columns, 8, stages, 1) if stages > 1 and _launch.NVIDIA else Tile(rows, columns, 8, 1, max(1, 2 * STEP // step))


# --- kernels ----------------------------------------------------------------------------------------------------------------------------


@jit
def _norm_bwd_kernel(
    dy_ptr, ds_ptr, x_ptr, add_ptr, w_ptr, m_ptr, r_ptr, dx_ptr, again_ptr, dw_ptr, db_ptr,
    dy_stride, ds_stride, stride, add_stride, N, H, offset,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, AGAIN: tl.constexpr
):  # fmt: skip
    pid = tl.program_id(0)
    step = tl.num_programs(0) * ROWS
    col = tl.arange(0, BLOCK)[None, :]
    if w_ptr is not None and not AGAIN:
        w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32) + offset
    if dw_ptr is not None:
        dw = tl.zeros((ROWS, BLOCK), tl.float32)
    if db_ptr is not None:
        db = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(pid * ROWS, N, step, num_stages=STAGES):
        row = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
        keep = (row < N) & (col < H)
        if dx_ptr is not None or dw_ptr is not None:
            x = tl.load(x_ptr + row * stride + col, mask=keep, other=0.0, eviction_policy="evict_first")
            if add_ptr is not None:  # rounded as forward rounded it
                more = tl.load(add_ptr + row * add_stride + col, mask=keep, other=0.0, eviction_policy="evict_first")
                x = (x.to(tl.float32) + more.to(tl.float32)).to(x_ptr.dtype.element_ty)
        d = tl.load(dy_ptr + row * dy_stride + col, mask=keep, other=0.0, eviction_policy="evict_first").to(tl.float32)
        r = tl.load(r_ptr + row, mask=row < N, other=0.0)
        m = 0.0
        if m_ptr is not None:
            m = tl.load(m_ptr + row, mask=row < N, other=0.0)
        if dx_ptr is not None or dw_ptr is not None:
            xr = (x.to(tl.float32) - m) * r
        if dx_ptr is not None:
            g = d
            if w_ptr is not None:
                if AGAIN:
                    w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32) + offset
                g = rounded(d, w)  # in a row of one element, g − c₁ is exactly 0
            c1 = 0.0
            if m_ptr is not None:
                c1 = tl.div_rn(tl.sum(g, 1), H * 1.0)[:, None]
            c2 = tl.div_rn(tl.sum(g * xr, 1), H * 1.0)[:, None]
            if AGAIN and w_ptr is not None:  # with the policy of the first load, the compiler would make the two one
                g = rounded(d, tl.load(w_ptr + col, mask=col < H, other=0.0, eviction_policy="evict_last").to(tl.float32) + offset)
            dx = r * (g - c1 - xr * c2)
            if ds_ptr is not None:
                dx += tl.load(ds_ptr + row * ds_stride + col, mask=keep, other=0.0).to(tl.float32)
            dx = dx.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + row * H + col, dx, mask=keep, cache_modifier=".cs")
            if again_ptr is not None:
                tl.store(again_ptr + row * H + col, dx, mask=keep)
        if dw_ptr is not None:
            dw += d * xr
        if db_ptr is not None:
            db += d
    at = pid.to(tl.int64) * H + col
    if dw_ptr is not None:
        tl.store(dw_ptr + at, tl.sum(dw, 0)[None, :].to(dw_ptr.dtype.element_ty), mask=col < H)
    if db_ptr is not None:
        tl.store(db_ptr + at, tl.sum(db, 0)[None, :].to(db_ptr.dtype.element_ty), mask=col < H)


# --- launch -----------------------------------------------------------------------------------------------------------------------------


@lru_cache(1024)
def _plan(n: int, h: int, size: int, device: torch.device, gradient: bool, offset: float, *strides: int) -> Plan:
    t = _tile(h, size)
    return Plan(
        _norm_bwd_kernel, (min(cdiv(n, t.rows), t.resident * processors(device)),), *strides, n, h, offset,
        ROWS=t.rows, BLOCK=t.columns, STAGES=t.stages, AGAIN=t.columns > HELD and gradient, num_warps=t.warps,
    )  # fmt: skip


def norm_bwd(
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
    add: Tensor | None = None,
    ds: Tensor | None = None,
    again: Tensor | None = None,
) -> None:
    """Write what is not None of dx, dw and db, from rows of the last axis.

    Where there is `add`, x is x + add; `ds` is added to dx; `again` is dx once more.
    """
    n, h, size = rstd.numel(), dy.shape[-1], x.element_size()
    if h > HELD and (h > SUMMED or size > 2 or db is not None):
        rows, ds = as_rows(x if add is None else x + add), ds if ds is None else as_rows(ds)
        wide_bwd(as_rows(dy), rows, weight, rstd, dx, dw, offset=offset, mean=mean, db=db, ds=ds, again=again)
        return
    (dy, dy_stride), (x, stride), ds_stride, add_stride = rows_and_stride(dy), rows_and_stride(x), 0, 0
    reads = 2
    if ds is not None:
        (ds, ds_stride), reads = rows_and_stride(ds), reads + 1
    if add is not None:
        (add, add_stride), reads = rows_and_stride(add), reads + 1
    device = dy.device
    plan = _plan(n, h, size * reads, device, dx is not None, offset, dy_stride, ds_stride, stride, add_stride)
    dws, dbs = partial(dw, plan.grid[0], rstd), partial(db, plan.grid[0], rstd)
    plan(device, dy, ds, x, add, weight, mean, rstd, dx, again, dws, dbs)
    sum_rows(dws, dw, dbs, db)
