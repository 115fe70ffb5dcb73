"""The rows of a cross entropy as one kernel; the math is in `_loss_rows`."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ._elementary import exp, expm1, log1p, over, tanh
from ._launch import Plan, cdiv, jit, next_power_of_2, registers, rows_and_stride, tl, warps
from ._loss_rows import PLAIN, Part, Terms


@jit
def _formed(logits, knee, top, FORM: tl.constexpr, EXACT: tl.constexpr):
    """Logits as the loss takes them: as they are, top · logits, or top · tanh(logits / knee), to the last digit where that is small."""
    if FORM == 2:
        t = top * tanh(over(tl.abs(logits), knee, EXACT), EXACT)
        return tl.where(logits < 0.0, -t, t)
    if FORM == 1:
        return top * logits
    return logits


@jit
def _slope(logits, knee, EXACT: tl.constexpr):
    """tanh'(logits / knee), 4 e / (1 + e)² with e = exp(−2 |logits| / knee); for a small tanh, 1 − tanh² has a rounding or two less."""
    x = over(tl.abs(logits), knee, EXACT)
    e = exp(-2.0 * x, EXACT)
    slope = over(4.0 * e, (1.0 + e) * (1.0 + e), EXACT)
    if EXACT:
        t = tanh(x, EXACT)
        slope = tl.where(t < 0.5, 1.0 - t * t, slope)
    return slope


@jit
def _weights(w_ptr, at, V):
    """Class weights; 1 for each without."""
    if w_ptr is not None:
        return tl.load(w_ptr + at, mask=at < V, other=0.0).to(tl.float32)
    return tl.where(at < V, 1.0, 0.0)


@jit
def _lanes(a, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """A block as [lanes, WIDTH]."""
    return tl.reshape(a, (BLOCK // WIDTH, WIDTH))


@jit
def _gradient(
    a_at, at, w_at, V, top, rest, factor, bend, spread, knee, ceiling, SMOOTH: tl.constexpr, FORM: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """Of a block of columns, as if none were the target's."""
    raw = tl.load(a_at + at, mask=at < V, other=0.0, eviction_policy="evict_first").to(tl.float32)
    x = _formed(raw, knee, ceiling, FORM, EXACT) - top - rest
    g = exp(x, EXACT)
    if bend is None:
        g *= factor
    else:
        g = tl.where(g == 0.0, 0.0, g * (factor + bend * x))
    if SMOOTH:
        g -= spread * _weights(w_at, at, V)
    if FORM == 2:
        g *= _slope(raw, knee, EXACT)
    return g


@jit
def _loss_rows_kernel(
    logits_ptr, target_ptr, index_ptr, stats_ptr, loss_ptr, aux_ptr, grad_ptr, scale_ptr, divisor_ptr, bend_ptr, w_ptr, whole_ptr,
    stride, target_stride, grad_stride, scale_stride, V, N, ignore_index, smoothing, z, knee, ceiling, first, classes,
    SMOOTH: tl.constexpr, FORM: tl.constexpr, SLICE: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr
):  # fmt: skip
    line = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    a_at = logits_ptr + line * stride
    row = line
    if index_ptr is not None:
        row = tl.load(index_ptr + line)
    y = tl.load(target_ptr + row * target_stride).to(tl.int64)
    counted = y != ignore_index
    legal = (y >= 0) & (y < classes)
    mine_is_here = legal
    absent = float("nan")
    w_at = w_ptr
    if SLICE:
        y -= first
        mine_is_here = (y >= 0) & (y < V)
        absent = tl.where(legal, float("-inf"), float("nan"))
        if w_ptr is not None:
            w_at = w_ptr + first
    block = tl.arange(0, BLOCK)
    nan = float("nan")
    none = float("-inf")
    a_y = tl.load(a_at + y, mask=counted & mine_is_here, other=absent).to(tl.float32)  # before the gradient may overwrite it
    slope_y = 1.0
    if FORM == 2:
        slope_y = _slope(a_y, knee, EXACT)
    a_y = _formed(a_y, knee, ceiling, FORM, EXACT)
    if SLICE:
        a_y = tl.where(mine_is_here, a_y, absent)  # which a cap would have made finite
    w_y = 1.0
    if w_ptr is not None:
        w_y = tl.load(w_at + y, mask=counted & legal, other=0.0).to(tl.float32)
    share = smoothing / classes
    whole = smoothing
    if whole_ptr is not None:
        whole = share * tl.load(whole_ptr)
    mine = (1.0 - smoothing) * w_y

    # The block of the target is apart, so that no other block compares columns: first for the loss, last for the gradient, which goes the
    # same way backwards, from what is still in the cache.
    blocks = tl.cdiv(V, BLOCK)
    place = tl.where(mine_is_here, y, 0).to(tl.int32)
    home = place // BLOCK
    col = home * BLOCK + block
    if SLICE:
        place = tl.where(mine_is_here, place, -1)

    if loss_ptr is not None:
        top = 0.0
        rest = 0.0
        loss = 0.0
        log_p = 0.0
        entropy = 0.0
        anchor = a_y
        if SLICE and SMOOTH:
            anchor = _formed(tl.load(a_at).to(tl.float32), knee, ceiling, FORM, EXACT)
        if counted:
            # Every WIDTH columns have statistics of their own until the end: a thread's, so that no warp waits for another.
            a = tl.load(a_at + col, mask=col < V, other=none).to(tl.float32)
            if FORM:
                a = tl.where(col < V, _formed(a, knee, ceiling, FORM, EXACT), none)
            if SMOOTH:
                spreads = tl.sum(_lanes(tl.where(col < V, _weights(w_at, col, V) * (a - anchor), 0.0), BLOCK, WIDTH), 1)
            a = _lanes(a, BLOCK, WIDTH)
            tops = tl.max(a, 1)
            shift = tl.where(tops == none, 0.0, tops)
            e = exp(a - shift[:, None], EXACT)
            rests = tl.sum(tl.where(_lanes(col, BLOCK, WIDTH) == place, 0.0, e), 1)
            if aux_ptr is not None:
                totals = tl.sum(e, 1)
                tilts = tl.sum(tl.where(e > 0.0, e * (a - shift[:, None]), 0.0), 1)  # Σ exp(a − m) (a − m)
            for i in range(1, blocks):
                at = home + i
                at = tl.where(at < blocks, at, at - blocks) * BLOCK + block
                a = tl.load(a_at + at, mask=at < V, other=none).to(tl.float32)
                if FORM:
                    a = tl.where(at < V, _formed(a, knee, ceiling, FORM, EXACT), none)
                if SMOOTH:
                    spreads += tl.sum(_lanes(tl.where(at < V, _weights(w_at, at, V) * (a - anchor), 0.0), BLOCK, WIDTH), 1)
                a = _lanes(a, BLOCK, WIDTH)
                new = tl.maximum(tops, tl.max(a, 1))
                shift = tl.where(new == none, 0.0, new)
                e = exp(a - shift[:, None], EXACT)
                more = tl.sum(e, 1)
                fade = exp(tops - shift, EXACT)
                rests = rests * fade + more
                if aux_ptr is not None:
                    sunk = tl.where(tops == none, 0.0, tops - shift)
                    tilts = (tilts + sunk * totals) * fade + tl.sum(tl.where(e > 0.0, e * (a - shift[:, None]), 0.0), 1)
                    totals = totals * fade + more
                tops = new
            top = tl.max(tops, 0)
            shift = tl.where(top == none, 0.0, top)
            fade = exp(tops - shift, EXACT)
            others = tl.sum(rests * fade, 0)
            rest = tl.where(a_y == top, log1p(others), tl.log(others + exp(a_y - top, EXACT)))
            nll = rest - (a_y - top)
            log_p = -nll
            if SLICE:
                log_p = a_y - top
                if SMOOTH:
                    loss = tl.sum(spreads, 0) + tl.load(whole_ptr) * (anchor - top)
            else:
                loss = mine * nll
                if SMOOTH:
                    loss += whole * nll - share * tl.sum(spreads, 0)
                loss += z * (top + rest) * (top + rest)
            if aux_ptr is not None:
                sunk = tl.where(tops == none, 0.0, tops - shift)
                entropy = rest - tl.sum((tilts + sunk * totals) * fade, 0) / tl.sum(totals * fade, 0)
        tl.store(stats_ptr + 2 * row, top)
        tl.store(stats_ptr + 2 * row + 1, rest)
        rows = N.to(tl.int64)
        if SLICE:
            tl.store(loss_ptr + row, log_p)
            tl.store(loss_ptr + rows + row, loss)
        else:
            tl.store(loss_ptr + row, loss)
        if aux_ptr is not None:
            tl.store(aux_ptr + row, top + rest)
            tl.store(aux_ptr + rows + row, log_p)
            tl.store(aux_ptr + 2 * rows + row, entropy)
            tl.store(aux_ptr + 3 * rows + row, tl.where(counted & (a_y == top) & (loss == loss), 1.0, 0.0))
    else:
        top = tl.load(stats_ptr + 2 * row)
        rest = tl.load(stats_ptr + 2 * row + 1)

    if grad_ptr is not None:
        scale = 1.0
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + row * scale_stride).to(tl.float32)
        if divisor_ptr is not None:
            scale = scale / tl.load(divisor_ptr).to(tl.float32)
        scale = tl.where(legal, scale, nan)
        chain = 1.0
        if FORM == 1:
            chain = ceiling
        if FORM == 2:
            chain = over(ceiling, knee, EXACT)
        scale *= chain
        pull = 2.0 * z * (top + rest)
        mass = mine + whole
        factor = (mass + pull) * scale
        spread = share * scale
        bend = None
        lift = 0.0
        if bend_ptr is not None:
            lift = tl.load(bend_ptr + 2 * row) * chain
            bend = tl.load(bend_ptr + 2 * row + 1) * chain
            factor += lift
        g_at = grad_ptr + line * grad_stride
        tl.debug_barrier()  # every read of the target's logit is done
        for i in range(tl.where(part == 0, PARTS, part), blocks, PARTS):
            at = home - i
            at = tl.where(at < 0, at + blocks, at) * BLOCK + block
            if counted:
                g = _gradient(a_at, at, w_at, V, top, rest, factor, bend, spread, knee, ceiling, SMOOTH, FORM, EXACT)
            else:
                g = tl.zeros((BLOCK,), tl.float32)
            tl.store(g_at + at, g.to(grad_ptr.dtype.element_ty), mask=at < V, cache_modifier=".cs")
        if part == 0:
            if counted:
                g = _gradient(a_at, col, w_at, V, top, rest, factor, bend, spread, knee, ceiling, SMOOTH, FORM, EXACT)
                x = a_y - top - rest
                p_y = exp(x, EXACT)
                g_y = (expm1(x, EXACT) * mass + p_y * pull + whole - share * w_y) * scale
                if bend_ptr is not None:
                    g_y += tl.where(p_y == 0.0, 0.0, p_y * (lift + bend * x))
                g = tl.where(col == place, g_y * slope_y, g)
            else:
                g = tl.zeros((BLOCK,), tl.float32)
            tl.store(g_at + col, g.to(grad_ptr.dtype.element_ty), mask=col < V, cache_modifier=".cs")


@lru_cache(1024)
def _plan(
    n: int, v: int, size: int, reads: bool, writes: bool, aux: bool, slices: bool, terms: tuple[float, ...], ignore_index: int, first: int,
    classes: int, *strides: int
) -> Plan:  # fmt: skip
    """For `n` rows of `v` logits of `size` bytes, by whether the loss is read from them, and the gradient written. Chosen on an H100.

    Statistics are of as many columns as a thread loads at once. A gradient alone is cut in parts of two blocks, so that the last rows do
    not leave the GPU half empty. A long row's loss and gradient in one launch need two programs on a multiprocessor at once, for 16-bit
    logits 32 registers a thread, which leave none for such statistics, and rows of theirs that L2 still holds at the second reading. An
    entropy may be small, a sum of what is rounded elsewhere: with it, everything is exact.
    """
    columns = 8192 if not writes or (reads and 16384 < v <= 65536) else 16384
    block = min(next_power_of_2(v), columns)
    width = block if reads and writes and v > columns else min(block, 16 // size)
    parts = 1 if reads else max(1, cdiv(v, block) // 2)
    limit = registers(32 if writes and size == 2 and v > columns else None)
    smoothing, z, cap, inner, outer = terms
    form = 2 if cap else 1 if inner * outer != 1.0 else 0
    knee, ceiling = (cap / inner, cap * outer) if cap else (0.0, inner * outer)
    return Plan(
        _loss_rows_kernel, (n * parts,), *strides[:4], v, strides[4], ignore_index, smoothing, z, knee, ceiling, first, classes,
        SMOOTH=smoothing != 0.0, FORM=form, SLICE=slices, EXACT=size == 4 or aux, BLOCK=block, WIDTH=width, PARTS=parts,
        num_warps=warps(block, 512, least=4), **limit,
    )  # fmt: skip


def kernel_rows(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    terms: Terms = PLAIN,
    *,
    stats: Tensor,
    loss: Tensor | None = None,
    aux: Tensor | None = None,
    grad: Tensor | None = None,
    scale: Tensor | None = None,
    divisor: Tensor | None = None,
    bend: Tensor | None = None,
    index: Tensor | None = None,
    part: Part | None = None,
) -> None:
    """`Rows` in one Triton launch."""
    (rows, stride), v = rows_and_stride(logits), logits.shape[-1]
    weight, numbers = terms[0], terms[1:]
    first, classes = (0, v) if part is None else part
    whole = None
    if numbers[0] and (weight is not None or part is not None):  # smoothing: the sum of the weights, in a part's loss its own
        whole = (stats.new_ones(classes) if weight is None else weight)[first : first + v] if loss is not None else weight
        whole = None if whole is None else whole.sum(dtype=torch.float32)
    strides = (
        stride, target.stride(0), 0 if grad is None else grad.stride(0), 0 if scale is None or scale.numel() == 1 else scale.stride(0),
        aux.stride(0) if aux is not None else 0 if loss is None or part is None else loss.stride(0),
    )  # fmt: skip
    plan = _plan(
        len(logits), v, logits.element_size(), loss is not None, grad is not None, aux is not None, part is not None, numbers,
        ignore_index, first, classes, *strides,
    )  # fmt: skip
    plan(logits.device, rows, target, index, stats, loss, aux, grad, scale, divisor, bend, weight, whole)
