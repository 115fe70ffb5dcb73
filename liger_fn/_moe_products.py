r"""Experts of a mixture: products over rows sorted by expert, and what is computed from their accumulators, in Triton.

The math stands in `_moe_rows.py`, the order of rows in `_moe_routing.py`, the launches in `_moe_launch.py`. Of P = T k
places each has a row. x and dy are gathered by the loads of the products that read them, or copied to the places before (`_by_place`).

    _experts_up_kernel       gu [P, N] = x[token] gate_upᵉᵀ + bias, and h [P, I] = act(gu) from the same accumulators
    _experts_rows_kernel     rows [P, N] = a [P, K] wᵉᵀ (+ bias): h downᵉᵀ of forward, dgu gate_upᵉ of backward; a[token] in place of a:
                             dh = dy[token] downᵉ
    _experts_act_kernel      w h alone
    _experts_slopes_kernel   from dh: dgu = w dh ∂h and w h, and Σ dh h over a block's columns: dw in parts

w multiplies h and what is made of dh, never dy, of which no weighted copy is written. A program has one tile of rows, all of one expert,
and sums its terms in their order: a row's result does not depend on which other rows are with it.

Operands called `…_any` are pointers, or descriptors of blocks that the hardware copies by itself (`_launch.blocks`).
"""

from __future__ import annotations

from ._elementary import over
from ._glu_rows import _CODES, _activation
from ._head_kernels import _place
from ._launch import INTERPRETED, jit, tl

CODES = {**{name: _CODES[name] for name in ("silu", "gelu_tanh", "gelu")}, "relu2": _CODES["relu_squared"], "clamped_swiglu": len(_CODES)}
PACKINGS = {"concat": 0, "interleaved": 1, None: 2}  # gate rows, then up; by turns; no gate
_CLAMPED, _SILU = tl.constexpr(CODES["clamped_swiglu"]), tl.constexpr(CODES["silu"])
_CONCAT, _INTERLEAVED, _ALONE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_INTERPRETED = tl.constexpr(INTERPRETED)
BY_COLUMN, BY_TERM = 0, 1  # blocks of a weight whose terms, or whose columns, lie side by side in memory
_BY_COLUMN, _BY_TERM = tl.constexpr(BY_COLUMN), tl.constexpr(BY_TERM)

# --- tiles ------------------------------------------------------------------------------------------------------------------------------


@jit
def _dot(a, b, acc):
    """acc + a b. Of fp32 in blocks of few terms, each summed by itself, as the libraries do: one long sum would round more."""
    if a.dtype == tl.float32:
        # 1 says nothing of fp32, but keeps the compiler from summing in acc.
        acc += tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        if _INTERPRETED:  # which takes bf16 for the integers that it keeps it in
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc)
    return acc


@jit
def _tile_of(tile_ptr, tiles_n, GROUP: tl.constexpr):
    """(where this program's tile of rows stands in the map, its expert, its place among the tiles of columns)."""
    pid_m, pid_n = _place(tl.program_id(0), tl.num_programs(0) // tiles_n, tiles_n, GROUP)
    at = tile_ptr + 4 * pid_m
    return at, tl.load(at), pid_n


@jit
def _rows_of(at, BM: tl.constexpr):
    """(places, which of them the tile has, places that are safe to read) of a tile."""
    first, row = tl.load(at + 1), tl.arange(0, BM)
    inside = row < tl.load(at + 2)
    return (first + row).to(tl.int64), inside, (first + tl.where(inside, row, 0)).to(tl.int64)


@jit
def _columns(n0, N, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Columns from n0 on, those beyond N replaced by ones that can be read. EVEN: 16 divides N, so runs of 8 stay whole."""
    n = n0 + tl.arange(0, WIDTH)
    n = tl.where(n < N, n, n % 8 if EVEN else 0)
    if EVEN:
        n = tl.max_contiguous(tl.multiple_of(n, 8), 8)
    return n


@jit
def _packed_columns(n0, I, WIDTH: tl.constexpr, BN: tl.constexpr, PACKED: tl.constexpr, EVEN: tl.constexpr):
    """The packed columns of gate and up from column n0 of each on."""
    if PACKED == _CONCAT:
        at = tl.arange(0, WIDTH)
        n = n0 + at % BN
        n = tl.where(n < I, n, n % 8 if EVEN else 0) + at // BN * I
        if EVEN:
            n = tl.max_contiguous(tl.multiple_of(n, 8), 8)
    elif PACKED == _INTERLEAVED:
        n = _columns(2 * n0, 2 * I, WIDTH, EVEN)
    else:
        n = _columns(n0, I, WIDTH, EVEN)
    return n


@jit
def _weight_block(w_any, e, n0, k0, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr):
    """[BK, WIDTH] of expert e's weight."""
    if BLOCKS == _BY_COLUMN:
        w = w_any.load([e, n0, k0]).reshape(WIDTH, BK).T
    else:
        w = w_any.load([e, k0, n0]).reshape(BK, WIDTH)
    return w


@jit
def _product(
    a_any, row, first, w_any, e, n, n0, K, w_e, w_n, w_k,
    A_BLOCKS: tl.constexpr, W_BLOCKS: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BM, WIDTH]: the rows of a that begin at `row`, times rows n of expert e's weight; by blocks those from `first` and from n0 on."""
    acc = tl.zeros((BM, WIDTH), tl.float32)
    if not A_BLOCKS:
        a_at = (a_any + row)[:, None]
    if W_BLOCKS is None:
        w_at = w_any + e.to(tl.int64) * w_e + (n.to(tl.int64) * w_n)[None, :]
    for k0 in tl.range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        if A_BLOCKS:
            a = a_any.load([first, k0])
        elif EVEN:  # BK divides K
            a = tl.load(a_at + k[None, :])
        else:
            a = tl.load(a_at + k[None, :], mask=(k < K)[None, :], other=0.0)
        if W_BLOCKS is not None:
            w = _weight_block(w_any, e, n0, k0, W_BLOCKS, WIDTH, BK)
        elif EVEN:
            w = tl.load(w_at + (k.to(tl.int64) * w_k)[:, None])
        else:
            w = tl.load(w_at + (k.to(tl.int64) * w_k)[:, None], mask=(k < K)[:, None], other=0.0)
        acc = _dot(a, w, acc)
    return acc


@jit
def _split(pair, BM: tl.constexpr, BN: tl.constexpr):
    """The two halves of [BM, 2 BN], one beside the other."""
    return tl.split(tl.permute(tl.reshape(pair, (BM, 2, BN)), (0, 2, 1)))


# --- activations ------------------------------------------------------------------------------------------------------------------------


@jit
def _gated(gate, up, limit, alpha, ACT: tl.constexpr, PACKED: tl.constexpr):
    """h, ∂h/∂a and ∂h/∂u, in fp32; `limit` is None where there is none."""
    EXACT: tl.constexpr = gate.dtype == tl.float32
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    a, u = gate, up
    if limit is not None:
        a = tl.where(gate > limit, limit, gate)  # so that NaN stays
        u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    if ACT == _CLAMPED:
        value, slope = _activation(alpha * a, _SILU, EXACT)
        value = over(value, alpha, EXACT)
        u += 1.0
    else:
        value, slope = _activation(a, ACT, EXACT)
    h, to_a, to_u = value, slope, slope
    if PACKED != _ALONE:
        h, to_a, to_u = value * u, slope * u, value
    if limit is not None:
        to_a = tl.where(gate <= limit, to_a, 0.0)
        to_u = tl.where(tl.abs(up) <= limit, to_u, 0.0)
    return h, to_a, to_u


@jit
def _halves(pair, PACKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """(a, u) of packed columns."""
    if PACKED == _INTERLEAVED:
        a, u = tl.split(tl.reshape(pair, (BM, BN, 2)))
    elif PACKED == _CONCAT:
        a, u = _split(pair, BM, BN)
    else:
        a, u = pair, pair
    return a, u


@jit
def _load_packed(gu_ptr, place, inside, n0, I, PACKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """(a, u): BN columns of each from n0 on."""
    if PACKED == _INTERLEAVED:
        n = 2 * n0 + tl.arange(0, 2 * BN)
        at = (gu_ptr + place * 2 * I)[:, None] + n[None, :]
        a, u = _halves(tl.load(at, mask=inside[:, None] & (n < 2 * I)[None, :], other=0.0), PACKED, BM, BN)
    else:
        n = n0 + tl.arange(0, BN)
        mask = inside[:, None] & (n < I)[None, :]
        at = (gu_ptr + place * (I if PACKED == _ALONE else 2 * I))[:, None] + n[None, :]
        a = tl.load(at, mask=mask, other=0.0)
        u = a
        if PACKED == _CONCAT:
            u = tl.load(at + I, mask=mask, other=0.0)
    return a, u


@jit
def _store_packed(gu_ptr, place, inside, a, u, n0, I, PACKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The opposite."""
    kind = gu_ptr.dtype.element_ty
    if PACKED == _INTERLEAVED:
        n = 2 * n0 + tl.arange(0, 2 * BN)
        at = (gu_ptr + place * 2 * I)[:, None] + n[None, :]
        pair = tl.reshape(tl.join(a.to(kind), u.to(kind)), (BM, 2 * BN))
        tl.store(at, pair, mask=inside[:, None] & (n < 2 * I)[None, :])
    else:
        n = n0 + tl.arange(0, BN)
        mask = inside[:, None] & (n < I)[None, :]
        at = (gu_ptr + place * (I if PACKED == _ALONE else 2 * I))[:, None] + n[None, :]
        tl.store(at, a.to(kind), mask=mask)
        if PACKED == _CONCAT:
            tl.store(at + I, u.to(kind), mask=mask)


@jit
def _store_rows(out_ptr, place, inside, rows, n0, N, BN: tl.constexpr):
    n = n0 + tl.arange(0, BN)
    tl.store((out_ptr + place * N)[:, None] + n[None, :], rows.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (n < N)[None, :])


# --- products ---------------------------------------------------------------------------------------------------------------------------


@jit
def _two_products(
    a_any, row, first, w_any, e, n0, n1, K,
    A_BLOCKS: tl.constexpr, W_BLOCKS: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`_product` with the blocks of BN columns from n0 on, and with those from n1 on."""
    left = tl.zeros((BM, BN), tl.float32)
    right = tl.zeros((BM, BN), tl.float32)
    if not A_BLOCKS:
        a_at = (a_any + row)[:, None]
    for k0 in tl.range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        if A_BLOCKS:
            a = a_any.load([first, k0])
        elif EVEN:
            a = tl.load(a_at + k[None, :])
        else:
            a = tl.load(a_at + k[None, :], mask=(k < K)[None, :], other=0.0)
        left = _dot(a, _weight_block(w_any, e, n0, k0, W_BLOCKS, BN, BK), left)
        right = _dot(a, _weight_block(w_any, e, n1, k0, W_BLOCKS, BN, BK), right)
    return left, right


@jit
def _finish_up(
    a, u, pair, gu_ptr, h_ptr, place, inside, n0, I, limit, alpha,
    ACT: tl.constexpr, PACKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write gu and h; `pair` is a and u by turns, where gu has them so."""
    if gu_ptr is not None:
        if PACKED == _INTERLEAVED:
            _store_rows(gu_ptr, place, inside, pair, 2 * n0, 2 * I, 2 * BN)
        else:
            _store_packed(gu_ptr, place, inside, a, u, n0, I, PACKED, BM, BN)
    if h_ptr is not None:
        _store_rows(h_ptr, place, inside, _gated(a, u, limit, alpha, ACT, PACKED)[0], n0, I, BN)


@jit
def _experts_up_kernel(
    x_any, w_any, bias_ptr, token_ptr, tile_ptr, gu_ptr, h_ptr, H, I, x_stride, w_e, w_n, w_k, limit, alpha,
    ACT: tl.constexpr, PACKED: tl.constexpr, A_BLOCKS: tl.constexpr, W_BLOCKS: tl.constexpr, EVEN: tl.constexpr, EVEN_N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile has BN columns of gate and the same of up. gu or h may be unwanted. Rows of x as those of a below."""
    at, e, pid_n = _tile_of(tile_ptr, tl.cdiv(I, BN), GROUP)
    if e < 0:
        return
    WIDTH: tl.constexpr = BN if PACKED == _ALONE else 2 * BN
    kind = gu_ptr.dtype.element_ty if gu_ptr is not None else h_ptr.dtype.element_ty
    place, inside, safe = _rows_of(at, BM)
    first, n0 = tl.load(at + 1), pid_n * BN
    if token_ptr is not None:
        safe = tl.load(token_ptr + safe).to(tl.int64)
    rest = gu_ptr, h_ptr, place, inside
    if PACKED == _CONCAT and W_BLOCKS is not None:
        a, u = _two_products(x_any, safe * x_stride, first, w_any, e, n0, I + n0, H, A_BLOCKS, W_BLOCKS, EVEN, BM, BN, BK)
        if bias_ptr is not None:
            n = e.to(tl.int64) * 2 * I + _columns(n0, I, BN, EVEN_N)
            a += tl.load(bias_ptr + n).to(tl.float32)[None, :]
            u += tl.load(bias_ptr + n + I).to(tl.float32)[None, :]
        a, u = a.to(kind), u.to(kind)
        _finish_up(a, u, a, *rest, n0, I, limit, alpha, ACT, PACKED, BM, BN)
    else:
        n, w0 = _packed_columns(n0, I, WIDTH, BN, PACKED, EVEN_N), n0 * 2 if PACKED == _INTERLEAVED else n0
        acc = _product(x_any, safe * x_stride, first, w_any, e, n, w0, H, w_e, w_n, w_k, A_BLOCKS, W_BLOCKS, EVEN, BM, WIDTH, BK)
        if bias_ptr is not None:
            columns = I if PACKED == _ALONE else 2 * I
            acc += tl.load(bias_ptr + e.to(tl.int64) * columns + n).to(tl.float32)[None, :]
        pair = acc.to(kind)  # backward knows it rounded
        if PACKED == _INTERLEAVED and BN >= 128:  # in two parts, for fewer registers
            B: tl.constexpr = BN // 2
            left, right = _split(pair, BM, BN)
            a, u = _halves(left, PACKED, BM, B)
            _finish_up(a, u, left, *rest, n0, I, limit, alpha, ACT, PACKED, BM, B)
            a, u = _halves(right, PACKED, BM, B)
            _finish_up(a, u, right, *rest, n0 + B, I, limit, alpha, ACT, PACKED, BM, B)
        else:
            a, u = _halves(pair, PACKED, BM, BN)
            _finish_up(a, u, pair, *rest, n0, I, limit, alpha, ACT, PACKED, BM, BN)


@jit
def _experts_rows_kernel(
    a_any, w_any, bias_ptr, token_ptr, tile_ptr, out_ptr, K, columns, a_stride, w_e, w_n, w_k,
    A_BLOCKS: tl.constexpr, W_BLOCKS: tl.constexpr, EVEN: tl.constexpr, EVEN_N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Rows of a lie as places do, or are those of tokens, where there are any."""
    at, e, pid_n = _tile_of(tile_ptr, tl.cdiv(columns, BN), GROUP)
    if e < 0:
        return
    place, inside, safe = _rows_of(at, BM)
    n0 = pid_n * BN
    n = _columns(n0, columns, BN, EVEN_N)
    if token_ptr is not None:
        safe = tl.load(token_ptr + safe).to(tl.int64)
    acc = _product(a_any, safe * a_stride, tl.load(at + 1), w_any, e, n, n0, K, w_e, w_n, w_k, A_BLOCKS, W_BLOCKS, EVEN, BM, BN, BK)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + e.to(tl.int64) * columns + n).to(tl.float32)[None, :]
    _store_rows(out_ptr, place, inside, acc, n0, columns, BN)


# --- the activation's backward ----------------------------------------------------------------------------------------------------------


@jit
def _rows_here(offsets_ptr, E, blocks_n, BM: tl.constexpr):
    """(places, which of them hold a row, block of columns) of a program of the two kernels below."""
    pid = tl.program_id(0)
    place = (pid // blocks_n).to(tl.int64) * BM + tl.arange(0, BM)
    return place, place < tl.load(offsets_ptr + E), pid % blocks_n


@jit
def _experts_act_kernel(
    gu_ptr, weight_ptr, order_ptr, offsets_ptr, h_ptr, E, I, limit, alpha,
    ACT: tl.constexpr, PACKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """h, times w where there is one."""
    place, inside, block = _rows_here(offsets_ptr, E, tl.cdiv(I, BN), BM)
    a, u = _load_packed(gu_ptr, place, inside, block * BN, I, PACKED, BM, BN)
    h, _, _ = _gated(a, u, limit, alpha, ACT, PACKED)
    if weight_ptr is not None:
        h *= tl.load(weight_ptr + tl.load(order_ptr + place, mask=inside, other=0)).to(tl.float32)[:, None]
    _store_rows(h_ptr, place, inside, h, block * BN, I, BN)


@jit
def _experts_slopes_kernel(
    dh_ptr, weight_ptr, order_ptr, offsets_ptr, gu_ptr, dgu_ptr, wh_ptr, dw_ptr, E, I, limit, alpha,
    ACT: tl.constexpr, PACKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dgu, w h and the parts of dw, each where it is wanted. w h may be written over dh."""
    blocks_n = tl.cdiv(I, BN)
    place, inside, block = _rows_here(offsets_ptr, E, blocks_n, BM)
    n0 = block * BN
    n = n0 + tl.arange(0, BN)
    factor = tl.load(weight_ptr + tl.load(order_ptr + place, mask=inside, other=0)).to(tl.float32)
    dh = tl.load((dh_ptr + place * I)[:, None] + n[None, :], mask=inside[:, None] & (n < I)[None, :], other=0.0).to(tl.float32)
    a, u = _load_packed(gu_ptr, place, inside, n0, I, PACKED, BM, BN)
    h, to_a, to_u = _gated(a, u, limit, alpha, ACT, PACKED)
    if dw_ptr is not None:
        total = tl.sum(tl.where((n < I)[None, :], dh * h, 0.0), 1)
        tl.store(dw_ptr + place * blocks_n + block, total, mask=inside)
    if dgu_ptr is not None:
        dh *= factor[:, None]
        _store_packed(dgu_ptr, place, inside, dh * to_a, dh * to_u, n0, I, PACKED, BM, BN)
    if wh_ptr is not None:
        tl.debug_barrier()  # all have read dh
        _store_rows(wh_ptr, place, inside, h * factor[:, None], n0, I, BN)
