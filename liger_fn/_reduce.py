"""Sum the rows of an fp32 matrix of partial results into one vector: the second half of every weight gradient.

    out_j = Σ_i partial_ij

One launch, deterministic, rounding once to the dtype of `out`.
"""

from __future__ import annotations

from torch import Tensor

from ._launch import cdiv, jit, launch, tl


@jit
def _sum_rows_kernel(p_ptr, out_ptr, N, H, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, N, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        acc += tl.load(p_ptr + row * H + col, mask=(row < N) & (col < H), other=0.0)
    out = tl.sum(acc, 0)[None, :]
    tl.store(out_ptr + col, out.to(out_ptr.dtype.element_ty), mask=col < H)


def sum_rows(partial: Tensor, out: Tensor) -> None:
    """Write `partial.sum(0)` into the vector `out`, in its dtype."""
    n, h = partial.shape
    launch(_sum_rows_kernel, (cdiv(h, 32),), partial.device, partial, out, n, h, ROWS=64, BLOCK=32, num_warps=4)
