r"""The logits of a head inside its matrix product: their statistics, or their gradient, from accumulators that are never written.

    a = ceiling · x wᵀ        m = max_j a_j        s = log Σ_j exp(a_j − m)        log p_y = a_y − m − s
    g_j = (hot + warm) exp(a_j − m − s)        g_y = hot expm1(log p_y) + warm exp(log p_y)

`hot` and `warm` are a row's `mass · scale` and `pull · scale` of `_loss_rows`, multiplied by `ceiling`, which also defines m and s (there:
s = log1p(Σ_{j≠y} exp(a_j − m)) where the target has the maximum). Accumulators are fp32, where a product that is written first rounds every
logit to 16 bits; a product at the rate of the library's own, less a few percent for the exponentials.

For Hopper: one program a multiprocessor walks the tiles of the product, reads them by the copy engine (host-side tensor descriptors, passed
by value), and finishes each tile from its accumulators. `statistics` keeps a maximum and a sum for each row and tile of columns, which one
more kernel merges; a tile that holds targets leaves them out, so that Σ_{j≠y} loses no digits. `gradient` writes its tiles as if no
column were a target's, and one more kernel writes those elements. Nothing is atomic.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._elementary import exp, expm1, log1p
from ._kept_rows import cut
from ._launch import HAS_TRITON, INTERPRETED, cdiv, jit, launch, processors, tl

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor: Any = None  # type: ignore[no-redef]


class Tile(NamedTuple):
    """How a product is cut: tiles of bm by bn, bk terms at a time; `group` tiles of rows are walked for each tile of columns."""

    bm: int
    bn: int
    bk: int
    group: int
    stages: int
    warps: int
    flatten: bool  # the next tile's first reads begin before this one is finished


STATISTICS = Tile(128, 256, 64, 16, 3, 8, False)
GRADIENT = Tile(128, 256, 64, 16, 4, 8, True)
PARTIALS = 64 * 2**20  # bytes of maxima and sums at a time
LEAST_ROWS, LEAST_CLASSES = 128, 1024
ALIGNED = 16  # bytes: where the copy engine's rows may start


# --- kernels ----------------------------------------------------------------------------------------------------------------------------


@jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Where a tile lies: GROUP tiles of rows together, over all the columns."""
    width = GROUP * tiles_n
    first = tile // width * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    at = tile % width
    return first + at % size, at // size


@jit
def _sums(acc, ceiling):
    """The maximum of each row of a tile, and the sum of exp(ceiling · acc − maximum)."""
    base2 = ceiling * 1.4426950408889634
    top = tl.max(acc, 1)
    shift = tl.where(top == float("-inf"), 0.0, top * base2)
    return top * ceiling, tl.sum(tl.exp2(acc * base2 - shift[:, None]), 1)


@jit
def _head_statistics_kernel(
    x_desc, w_desc, target_ptr, a_y_ptr, tops_ptr, sums_ptr, N, V, H, ceiling,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(N, BM), tl.cdiv(V, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        pid_m, pid_n = _place(tile, tiles_m, tiles_n, GROUP)
        m0, n0 = pid_m * BM, pid_n * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, H, BK):
            acc = tl.dot(x_desc.load([m0, k]), w_desc.load([n0, k]).T, acc)
        row = m0 + tl.arange(0, BM)
        inside = row < N
        at = tl.load(target_ptr + row, mask=inside, other=-1).to(tl.int32) - n0  # of a target that is no class, anything: see the merge
        here = (at >= 0) & (at < BN)
        col = tl.arange(0, BN)
        found = tl.max(here.to(tl.int32), 0) > 0  # in few tiles
        if found:
            own = col[None, :] == at[:, None]
            tl.store(a_y_ptr + row, ceiling * tl.sum(tl.where(own, acc, 0.0), 1), mask=inside & here)
        if found | (V - n0 < BN):  # apart from the above, which would need twice the registers with it
            acc = tl.where((col[None, :] == at[:, None]) | (col >= V - n0)[None, :], float("-inf"), acc)
        top, total = _sums(acc, ceiling)
        part = pid_n.to(tl.int64) * N + row
        tl.store(tops_ptr + part, top, mask=inside)
        tl.store(sums_ptr + part, total, mask=inside)


@jit
def _head_merge_kernel(
    tops_ptr, sums_ptr, a_y_ptr, target_ptr, stats_ptr, log_prob_ptr, N, V, parts, ignore_index, R: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < N
    none = float("-inf")
    tops = tl.full((AT_ONCE, R), none, tl.float32)
    sums = tl.zeros((AT_ONCE, R), tl.float32)
    for first in tl.range(0, parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        at = part.to(tl.int64)[:, None] * N + row[None, :]
        mask = (part < parts)[:, None] & inside[None, :]
        top = tl.load(tops_ptr + at, mask=mask, other=none)
        more = tl.load(sums_ptr + at, mask=mask, other=0.0)
        new = tl.maximum(tops, top)
        shift = tl.where(new == none, 0.0, new)
        sums = sums * exp(tops - shift, True) + more * exp(top - shift, True)
        tops = new
    y = tl.load(target_ptr + row, mask=inside, other=ignore_index)
    counted = y != ignore_index
    a_y = tl.load(a_y_ptr + row, mask=inside & (y >= 0) & (y < V), other=float("nan"))
    top = tl.maximum(tl.max(tops, 0), a_y)
    shift = tl.where(top == none, 0.0, top)
    others = tl.sum(sums * exp(tops - shift[None, :], True), 0)
    rest = tl.where(a_y == top, log1p(others), tl.log(others + exp(a_y - top, True)))
    rest = tl.where(top == float("inf"), float("nan"), rest)  # also where ∞ is the target's own, which no sum holds
    log_p = a_y - top - rest
    tl.store(stats_ptr + 2 * row, tl.where(counted, top, 0.0), mask=inside)
    tl.store(stats_ptr + 2 * row + 1, tl.where(counted, rest, 0.0), mask=inside)
    tl.store(log_prob_ptr + row, tl.where(counted, log_p, 0.0), mask=inside)


@jit
def _factors(hot_ptr, warm_ptr, row, inside):
    """hot, warm, and whether both are 0: such a row's gradient is 0 whatever its logits."""
    hot = tl.load(hot_ptr + row, mask=inside, other=0.0)
    warm = tl.zeros_like(hot)
    if warm_ptr is not None:
        warm = tl.load(warm_ptr + row, mask=inside, other=0.0)
    return hot, warm, (hot == 0.0) & (warm == 0.0)


@jit
def _head_gradient_kernel(
    x_desc, w_desc, g_desc, stats_ptr, hot_ptr, warm_ptr, N, V, H, ceiling,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(N, BM), tl.cdiv(V, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        pid_m, pid_n = _place(tile, tiles_m, tiles_n, GROUP)
        m0, n0 = pid_m * BM, pid_n * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, H, BK):
            acc = tl.dot(x_desc.load([m0, k]), w_desc.load([n0, k]).T, acc)
        row = m0 + tl.arange(0, BM)
        inside = row < N
        lse = tl.load(stats_ptr + 2 * row, mask=inside, other=0.0) + tl.load(stats_ptr + 2 * row + 1, mask=inside, other=0.0)
        hot, warm, idle = _factors(hot_ptr, warm_ptr, row, inside)
        # The sum of both parts is rounded at the size of the logits, as the accumulators are; here that is far below the result's 16 bits.
        shift = lse * 1.4426950408889634
        g = tl.exp2(acc * (ceiling * 1.4426950408889634) - shift[:, None]) * (hot + warm)[:, None]
        g = tl.where(idle[:, None], 0.0, g)
        left, right = tl.split(tl.permute(tl.reshape(g, (BM, 2, BN // 2)), (0, 2, 1)))  # half the shared memory for both
        g_desc.store([m0, n0], left.to(g_desc.dtype))
        g_desc.store([m0, n0 + BN // 2], right.to(g_desc.dtype))


@jit
def _head_targets_kernel(g_ptr, target_ptr, log_prob_ptr, hot_ptr, warm_ptr, stride, first, V, N, R: tl.constexpr):
    """The elements of g whose column is their row's target."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = row < N
    y = tl.load(target_ptr + row, mask=inside, other=-1) - first
    log_p = tl.load(log_prob_ptr + row, mask=inside, other=0.0)
    hot, warm, idle = _factors(hot_ptr, warm_ptr, row, inside)
    g = hot * expm1(log_p, True)
    if warm_ptr is not None:
        g += warm * exp(log_p, True)
    g = tl.where(idle, 0.0, g)
    tl.store(g_ptr + row.to(tl.int64) * stride + y, g.to(g_ptr.dtype.element_ty), mask=inside & (y >= 0) & (y < V))


# --- launches ---------------------------------------------------------------------------------------------------------------------------


@cache
def _hopper(device: torch.device) -> bool:
    """Is `device` what the kernels are for, and can this Triton build them?"""
    known = HAS_TRITON and not INTERPRETED and TensorDescriptor is not None and not torch.version.hip
    return known and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _aligned(t: Tensor) -> bool:
    """Can the copy engine read and write the rows of `t`?"""
    each = t.element_size()
    return t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.stride(0) * each % ALIGNED == 0 and t.data_ptr() % ALIGNED == 0


def fits(x: Tensor, weight: Tensor) -> bool:
    """Are the logits of `x` `[n, H]` and `weight` `[V, H]` for the kernels of this file?"""
    return (
        _hopper(x.device)
        and x.dtype is weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[0] >= LEAST_ROWS
        and x.shape[1] * x.element_size() % ALIGNED == 0  # so that rows that are gathered start there too
        and weight.shape[0] >= LEAST_CLASSES
        and _aligned(x)
        and _aligned(weight)
    )


def rows_in(buffer: Tensor, n: int, columns: int) -> Tensor:
    """`[n, columns]` in the memory of `buffer`, whose start is aligned, with rows that start where `gradient` can write them."""
    stride = cdiv(columns * buffer.element_size(), ALIGNED) * ALIGNED // buffer.element_size()
    return buffer[: n * stride].view(n, stride)[:, :columns]


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """`device` is current inside: Triton launches on the one that is."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _product(kernel: Any, tile: Tile, x: Tensor, weight: Tensor, out: Tensor | None, ceiling: float, *tensors: Tensor | None) -> None:
    """Launch over the tiles of x weightᵀ. A descriptor holds sizes as numbers of the launch, so no length compiles anew."""
    (n, h), v, programs = x.shape, weight.shape[0], processors(x.device)
    read = [TensorDescriptor.from_tensor(t, [rows, tile.bk]) for t, rows in ((x, tile.bm), (weight, tile.bn))]
    write = [] if out is None else [TensorDescriptor.from_tensor(out, [tile.bm, tile.bn // 2])]
    grid = (min(cdiv(n, tile.bm) * cdiv(v, tile.bn), programs),)
    with _current(x.device):
        kernel[grid](
            *read, *write, *tensors, n, v, h, ceiling, BM=tile.bm, BN=tile.bn, BK=tile.bk, GROUP=tile.group, PROGRAMS=programs,
            FLATTEN=tile.flatten, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def statistics(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, ceiling: float, stats: Tensor, log_prob: Tensor
) -> None:  # fmt: skip
    """The statistics of every row of `ceiling · x weightᵀ`, as `_loss_rows` defines them.

    Args:
        x: `[n, H]`. weight: `[V, H]`, for which see `fits`. target: `[n]`, int64, contiguous. ceiling: above 0.
        stats: `[n, 2]`, fp32, contiguous; written: m and s. log_prob: `[n]`, likewise: log p_y. All three are 0 where the target is
            `ignore_index`; s and log p_y are NaN where it is no class.
    """
    n, v, tile = x.shape[0], weight.shape[0], STATISTICS
    parts = cdiv(v, tile.bn)
    blocks = cut(n, max(tile.bm, PARTIALS // (8 * parts) // tile.bm * tile.bm))
    for at in blocks:
        some, rows = x[at], at.stop - at.start
        # Each by itself: of one tensor, whether 16 bytes divide where the second starts would be the rows' number's to say.
        tops, sums, a_y = stats.new_empty(parts, rows), stats.new_empty(parts, rows), stats.new_empty(rows)
        _product(_head_statistics_kernel, tile, some, weight, None, ceiling, target[at], a_y, tops, sums)
        launch(
            _head_merge_kernel, (cdiv(rows, 32),), x.device, tops, sums, a_y, target[at], stats[at], log_prob[at], rows, v,
            parts, ignore_index, R=32, AT_ONCE=64, num_warps=8,
        )  # fmt: skip


def gradient(
    x: Tensor, weight: Tensor, target: Tensor, first: int, out: Tensor, stats: Tensor, log_prob: Tensor, hot: Tensor, warm: Tensor | None,
    ceiling: float,
) -> None:  # fmt: skip
    """The gradient of the classes from `first` on, whose weight is `weight`, into `out`.

    Args:
        x: `[n, H]`. weight: `[S, H]`, rows of what `fits` was asked for. target: `[n]`, int64, contiguous, of all classes.
        out: `[n, S]`, of x's dtype, from `rows_in`; written. stats, log_prob: what `statistics` wrote.
        hot, warm: `[n]`, fp32, contiguous; no warm is 0. A row where both are 0 has a gradient of 0, whatever its logits; NaN makes NaN.
    """
    if out.shape[0] == 0:
        return
    if not _aligned(out):
        raise ValueError(
            f"gradient: the rows of out must start at multiples of {ALIGNED} bytes with unit stride in them, got strides "
            f"{list(out.stride())} of {out.dtype}; take it from rows_in(buffer, {out.shape[0]}, {out.shape[1]})"
        )
    n, s = out.shape
    _product(_head_gradient_kernel, GRADIENT, x, weight, out, ceiling, stats, hot, warm)
    launch(
        _head_targets_kernel, (cdiv(n, 128),), x.device, out, target, log_prob, hot, warm, out.stride(0), first, s, n, R=128, num_warps=4
    )
