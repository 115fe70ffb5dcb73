"""Sum the rows of an fp32 matrix of partial results into one vector: the second half of every weight gradient.

    out_j = Σ_i partial_ij

One launch for one such matrix or two, deterministic, rounding once to the dtype of `out`.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from ._launch import Plan, cdiv, jit, tl

ROWS, BLOCK = 128, 32  # of a program


@jit
def _column_sums(p_ptr, out_ptr, N, H, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, N, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        acc += tl.load(p_ptr + row * H + col, mask=(row < N) & (col < H), other=0.0)
    out = tl.sum(acc, 0)[None, :]
    tl.store(out_ptr + col, out.to(out_ptr.dtype.element_ty), mask=col < H)


@jit
def _sum_rows_kernel(p_ptr, q_ptr, out_ptr, also_ptr, N, H, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    if q_ptr is None:  # noqa: SIM114  what is None is known to the compiler, which program this is is not
        _column_sums(p_ptr, out_ptr, N, H, ROWS, BLOCK)
    elif tl.program_id(1) == 0:
        _column_sums(p_ptr, out_ptr, N, H, ROWS, BLOCK)
    else:
        _column_sums(q_ptr, also_ptr, N, H, ROWS, BLOCK)


def partial(out: Tensor | None, programs: int, like: Tensor) -> Tensor | None:
    """Room for a sum of each program, in the dtype of `like`, for `sum_rows` to add up; `out` itself where there is but one."""
    return out if out is None or programs == 1 else like.new_empty(programs, out.shape[0])


@lru_cache(1024)
def _plan(n: int, h: int, sums: int) -> Plan:
    return Plan(_sum_rows_kernel, (cdiv(h, BLOCK), sums), n, h, ROWS=ROWS, BLOCK=BLOCK, num_warps=8)


def sum_rows(p: Tensor | None, out: Tensor | None, q: Tensor | None = None, also: Tensor | None = None) -> None:
    """Write `p.sum(0)` into the vector `out` and `q.sum(0)` into `also`, in their dtypes. Nothing is done for what is absent or summed."""
    if p is None or p is out:
        p, out, q, also = q, also, None, None
    if p is None or out is None or p is out:
        return
    if q is also:
        q = also = None
    n, h = p.shape
    _plan(n, h, 1 if q is None else 2)(p.device, p, q, out, also)
