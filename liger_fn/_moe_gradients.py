r"""Experts of a mixture: sums over rows sorted by expert, in Triton. The math stands in `_moe_rows.py`.

    _experts_sum_kernel      y_t = Σ_j w_tj rows[place of (t, j)], in fp32 and in the order of j; dx likewise, without w
    _experts_slope_kernel    dw, from its parts, and ⟨dy, bias⟩
    _experts_weight_kernel   dweightᵉ = Σ_p a_pᵀ b_p over one expert's places: a program has the whole sum of its tile
    _experts_bias_kernel     likewise for a bias

Programs of the last two take the experts with most rows first, so that those of a skewed routing that take long do not start last. Nothing
is atomic, and every sum is in one order: the same inputs give the same bits.
"""

from __future__ import annotations

from ._head_kernels import _place
from ._launch import jit, tl
from ._moe_products import _columns, _dot

# --- sums over a token's slots, over a slot's columns -----------------------------------------------------------------------------------


@jit
def _experts_sum_kernel(rows_ptr, place_ptr, weight_ptr, out_ptr, H, K: tl.constexpr, BLOCK: tl.constexpr):
    pid, blocks_h = tl.program_id(0).to(tl.int64), tl.cdiv(H, BLOCK)
    token, at = pid // blocks_h, (pid % blocks_h).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(K):
        place = tl.load(place_ptr + token * K + j).to(tl.int64)
        row = tl.load(rows_ptr + place * H + at, mask=at < tl.where(place >= 0, H, 0), other=0.0).to(tl.float32)
        if weight_ptr is not None:
            row *= tl.load(weight_ptr + token * K + j, mask=place >= 0, other=0.0).to(tl.float32)
        acc += row
    tl.store(out_ptr + token * H + at, acc.to(out_ptr.dtype.element_ty), mask=at < H)


@jit
def _experts_slope_kernel(
    parts_ptr, place_ptr, dy_ptr, index_ptr, bias_ptr, out_ptr, N, width, H, dy_stride, K,
    R: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dw of R slots: the sum of each one's `width` parts, and ⟨dy, bias⟩ where there is a bias."""
    slot = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    place = tl.load(place_ptr + slot, mask=slot < N, other=-1).to(tl.int64)
    kept, part = place >= 0, tl.arange(0, BLOCK)
    total = tl.sum(tl.load((parts_ptr + place * width)[:, None] + part, mask=kept[:, None] & (part < width), other=0.0), 1)
    if bias_ptr is not None:
        e = tl.load(index_ptr + slot, mask=kept, other=0).to(tl.int64)
        dot = tl.zeros((R, BLOCK_H), tl.float32)
        for first in tl.range(0, H, BLOCK_H):
            n = first + tl.arange(0, BLOCK_H)
            mask = kept[:, None] & (n < H)
            d = tl.load((dy_ptr + slot // K * dy_stride)[:, None] + n, mask=mask, other=0.0).to(tl.float32)
            dot += d * tl.load((bias_ptr + e * H)[:, None] + n, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(dot, 1)
    tl.store(out_ptr + slot, total.to(out_ptr.dtype.element_ty), mask=slot < N)


# --- sums over an expert's rows ---------------------------------------------------------------------------------------------------------


@jit
def _some_rows(a_any, token_ptr, p, end, n, n0, stride, BLOCKS: tl.constexpr, MASKED: tl.constexpr, BK: tl.constexpr):
    """[BK, n]: rows of the places from p on, as they lie or, where there are tokens, gathered."""
    place = p + tl.arange(0, BK)
    inside = place < end
    if BLOCKS:
        tile = a_any.load([p, n0])
        if MASKED:
            tile = tl.where(inside[:, None], tile, 0.0)
    else:
        row = tl.where(inside, place, p) if MASKED else place
        if token_ptr is not None:
            row = tl.load(token_ptr + row)
        at = (a_any + row.to(tl.int64) * stride)[:, None] + n[None, :]
        if MASKED:
            tile = tl.load(at, mask=inside[:, None], other=0.0)
        else:
            tile = tl.load(at)
    return tile


@jit
def _experts_weight_kernel(
    a_any, b_any, a_token_ptr, b_token_ptr, offsets_ptr, by_size_ptr, out_ptr, rows, columns, a_stride, b_stride, out_e, out_m, out_n,
    A_BLOCKS: tl.constexpr, B_BLOCKS: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[e] `[rows, columns]` = Σ_p a_pᵀ b_p. The last block of places is masked: the rows beyond are another expert's, or NaN."""
    tiles_m, tiles_n = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    pid = tl.program_id(0)
    each = tiles_m * tiles_n
    e = tl.load(by_size_ptr + pid // each)
    pid_m, pid_n = _place(pid % each, tiles_m, tiles_n, GROUP)
    m0, n0 = pid_m * BM, pid_n * BN
    m, n = _columns(m0, rows, BM, EVEN_M), _columns(n0, columns, BN, EVEN_N)
    start, end = tl.load(offsets_ptr + e), tl.load(offsets_ptr + e + 1)
    whole = start + (end - start) // BK * BK
    acc = tl.zeros((BM, BN), tl.float32)
    for p in tl.range(start, whole, BK):
        a = _some_rows(a_any, a_token_ptr, p, end, m, m0, a_stride, A_BLOCKS, False, BK)
        b = _some_rows(b_any, b_token_ptr, p, end, n, n0, b_stride, B_BLOCKS, False, BK)
        acc = _dot(a.T, b, acc)
    if whole < end:
        a = _some_rows(a_any, a_token_ptr, whole, end, m, m0, a_stride, A_BLOCKS, True, BK)
        b = _some_rows(b_any, b_token_ptr, whole, end, n, n0, b_stride, B_BLOCKS, True, BK)
        acc = _dot(a.T, b, acc)
    m, n = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
    at = out_ptr + e.to(tl.int64) * out_e + (m.to(tl.int64) * out_m)[:, None] + (n.to(tl.int64) * out_n)[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])


@jit
def _experts_bias_kernel(
    a_ptr, token_ptr, order_ptr, weight_ptr, offsets_ptr, by_size_ptr, out_ptr, columns, a_stride,
    GATHER: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[e] `[columns]` = Σ_p a_p, of rows as they lie; or Σ_p w a[token] where they are gathered."""
    pid, blocks_n = tl.program_id(0), tl.cdiv(columns, BLOCK)
    e = tl.load(by_size_ptr + pid // blocks_n).to(tl.int64)
    n = pid % blocks_n * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(offsets_ptr + e + 1)
    acc = tl.zeros((R, BLOCK), tl.float32)
    for p in tl.range(tl.load(offsets_ptr + e), end, R):
        place = p + tl.arange(0, R)
        row = place
        if GATHER:
            row = tl.load(token_ptr + place, mask=place < end, other=0)
        at = (a_ptr + row.to(tl.int64) * a_stride)[:, None] + n[None, :]
        tile = tl.load(at, mask=(place < end)[:, None] & (n < columns)[None, :], other=0.0).to(tl.float32)
        if GATHER:
            slot = tl.load(order_ptr + place, mask=place < end, other=0)
            tile *= tl.load(weight_ptr + slot, mask=place < end, other=0.0).to(tl.float32)[:, None]
        acc += tile
    tl.store(out_ptr + e * columns + n, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=n < columns)
