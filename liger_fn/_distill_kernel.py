"""The rows of a distillation as one kernel; the math is in `_distill_rows`."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from ._distill_rows import DIVERGENCES, STEPS, Distance, Step, phi, psi, psi_of_log, split
from ._elementary import exp, expm1, log1p
from ._launch import Plan, jit, next_power_of_2, tl, warps

_near_phi, _near_psi_of_log, _near_psi = jit(phi), jit(psi_of_log), jit(psi)
_KL, _REVERSE_KL, _JSD, _TVD = (tl.constexpr(i) for i in range(4))
_ALL, _TOPS, _SUMS = (tl.constexpr(i) for i in range(3))


@jit
def _cooled(x, cool, rest, COOL: tl.constexpr):
    """x / T, as a product with 1 / T in two parts: the rounding of one would be in all logits alike, and not average out."""
    if COOL:
        return tl.fma(x, cool, tl.where(tl.abs(x) == float("inf"), 0.0, x) * rest)
    return x


@jit
def _log1p(y):
    """log(1 + y) for −1 < y ≤ 0."""
    z = y / (2.0 + y)
    z2 = z * z
    series = 2.0 * z * (1.0 + z2 * (0.3333333333333333 + z2 * (0.2 + z2 * 0.14285714285714285)))
    return tl.where(y > -0.1, series, tl.log(1.0 + y))


@jit
def _seen(x, tops, totals, cool, rest, COOL: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The maxima and the sums of exp so far, of every WIDTH columns, with a block more: a thread's, so that no warp waits for another."""
    x = tl.reshape(x, (BLOCK // WIDTH, WIDTH))
    new = tl.maximum(tops, tl.max(x, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    totals *= exp(_cooled(tops - shift, cool, rest, COOL), EXACT)
    return new, totals + tl.sum(exp(_cooled(x - shift[:, None], cool, rest, COOL), EXACT), 1)


@jit
def _whole(tops, totals, cool, rest, COOL: tl.constexpr, EXACT: tl.constexpr):
    """The maximum and the sum of exp of a row, or of some columns of it, all of which may be −inf."""
    top = tl.max(tops, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.sum(totals * exp(_cooled(tops - shift, cool, rest, COOL), EXACT), 0)


@jit
def _parts_of(
    a, t, top_a, over_a, top_t, over_t, lead, shift, beta, more, other, less, cool, rest,
    KIND: tl.constexpr, COOL: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """The terms of D, p, f, p f (of kl p − q, twice, in place of these two), as `_parts` makes them."""
    none = float("-inf")
    below = a - top_a
    under = t - top_t
    p = exp(_cooled(below, cool, rest, COOL), EXACT) * over_a
    q = exp(_cooled(under, cool, rest, COOL), EXACT) * over_t
    apart = a - t - lead if EXACT else below - under  # of 16 bits, these differences are exact
    delta = tl.where((a == none) & (t == none), 0.0, _cooled(apart, cool, rest, COOL) - shift)
    up = delta > 0.0
    x = -tl.abs(delta)
    e = expm1(x, EXACT)
    difference = tl.where(up, -p * e, q * e)
    if KIND <= _REVERSE_KL:
        if KIND == _KL:
            s = delta
            base = q
            excess = difference
            absent = t == none
        else:
            s = -delta
            base = p
            excess = -difference
            absent = a == none
        dot = tl.where(absent, 0.0, tl.where(s == none, none, base * s))
        each = tl.where(tl.abs(s) < 0.1, base * _near_phi(s), excess - dot)
        if KIND == _KL:
            return each, p, difference, difference
        return each, p, tl.where(absent, 0.0, delta), -dot
    elif KIND == _JSD:
        kappa = tl.where(up, beta, other)
        y = kappa * e
        log = _log1p(y)
        psi_e = tl.where(x > -0.1, _near_psi_of_log(x), tl.where(x == none, 1.0, (1.0 + e) * x - e))
        psi_y = tl.where(y > -0.1, _near_psi(y), (1.0 + y) * log - y)
        f = other * tl.where(a == none, 0.0, tl.where(up, -log, delta - log))
        each = kappa * psi_e - psi_y + tl.where(up, more, less) * (psi_e - e * log)
        return tl.where(up, p, q) * each, p, f, p * f
    else:
        f = tl.where(up, 0.5, tl.where(delta < 0.0, -0.5, 0.0))
        return 0.5 * tl.abs(difference), p, f, p * (0.5 - f)


@jit
def _distill_rows_kernel(
    a_ptr, t_ptr, target_ptr, index_ptr, stats_ptr, loss_ptr, scale_ptr, divisor_ptr,
    target_stride, scale_stride, V, ignore_index, beta, more, other, less, cool, rest,
    KIND: tl.constexpr, STEP: tl.constexpr, GRAD: tl.constexpr, COOL: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    row = line
    if index_ptr is not None:
        row = tl.load(index_ptr + line)
    counted = True
    if target_ptr is not None:
        counted = tl.load(target_ptr + row * target_stride) != ignore_index
    none = float("-inf")
    a_at = a_ptr + line * V
    t_at = t_ptr + line * V
    s_at = stats_ptr + row * 6
    block = tl.arange(0, BLOCK)
    blocks = tl.cdiv(V, BLOCK)
    live = tl.where(counted, blocks, 0)

    # Each reading goes the other way than the one before, from what is still in the cache.
    mean = 0.0
    above = 0.0
    if STEP == _TOPS or (loss_ptr is not None and STEP == _ALL):
        tops_a = tl.full((BLOCK // WIDTH,), none, tl.float32)
        tops_t = tl.full((BLOCK // WIDTH,), none, tl.float32)
        sums_a = tl.zeros((BLOCK // WIDTH,), tl.float32)
        sums_t = tl.zeros((BLOCK // WIDTH,), tl.float32)
        for i in range(live):
            at = i * BLOCK + block
            a = tl.load(a_at + at, mask=at < V, other=none).to(tl.float32)
            t = tl.load(t_at + at, mask=at < V, other=none).to(tl.float32)
            tops_a, sums_a = _seen(a, tops_a, sums_a, cool, rest, COOL, EXACT, BLOCK, WIDTH)
            tops_t, sums_t = _seen(t, tops_t, sums_t, cool, rest, COOL, EXACT, BLOCK, WIDTH)
        top_a, sum_a = _whole(tops_a, sums_a, cool, rest, COOL, EXACT)
        top_t, sum_t = _whole(tops_t, sums_t, cool, rest, COOL, EXACT)
    else:
        top_a = tl.load(s_at)
        sum_a = tl.load(s_at + 1)
        top_t = tl.load(s_at + 2)
        sum_t = tl.load(s_at + 3)
        if loss_ptr is None:
            mean = tl.load(s_at + 4)
            above = tl.load(s_at + 5)
    over_a = tl.div_rn(1.0, sum_a)
    over_t = tl.div_rn(1.0, sum_t)
    larger = sum_a > sum_t
    gap = log1p(tl.div_rn(tl.abs(sum_a - sum_t), tl.where(larger, sum_t, sum_a)))
    shift = tl.where(larger, gap, -gap)
    lead = top_a - top_t

    terms = tl.zeros((BLOCK // WIDTH,), tl.float32)
    if loss_ptr is not None and (KIND != _KL or not GRAD):
        means = tl.zeros((BLOCK // WIDTH,), tl.float32)
        masses = tl.zeros((BLOCK // WIDTH,), tl.float32)
        for i in range(live):
            at = (live - 1 - i) * BLOCK + block
            a = tl.load(a_at + at, mask=at < V, other=none).to(tl.float32)
            t = tl.load(t_at + at, mask=at < V, other=none).to(tl.float32)
            each, p, f, pf = _parts_of(
                a, t, top_a, over_a, top_t, over_t, lead, shift, beta, more, other, less, cool, rest, KIND, COOL, EXACT
            )
            terms += tl.sum(tl.reshape(each, (BLOCK // WIDTH, WIDTH)), 1)
            if KIND != _KL:
                means += tl.sum(tl.reshape(pf, (BLOCK // WIDTH, WIDTH)), 1)
                if KIND == _TVD:
                    p *= 0.5 + f
                masses += tl.sum(tl.reshape(p, (BLOCK // WIDTH, WIDTH)), 1)
        if KIND != _KL:
            mean = tl.sum(means, 0)
            mass = tl.sum(masses, 0)
            if KIND == _TVD:
                above = mass
                mass += mean
            if STEP == _SUMS:  # columns that have nothing of the row
                mass = tl.where(mass == 0.0, 1.0, mass)
            mean = tl.div_rn(mean, mass)
            if KIND == _TVD:
                above = tl.div_rn(above, mass)
            elif EXACT:  # what its rounding left
                above = tl.where(tl.abs(mean) == float("inf"), 0.0, tl.div_rn(tl.sum(tl.fma(-mean, masses, means), 0), mass))

    if GRAD:
        scale = 1.0
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + row * scale_stride).to(tl.float32)
        if divisor_ptr is not None:
            scale = tl.div_rn(scale, tl.load(divisor_ptr).to(tl.float32))
        scale = _cooled(scale, cool, rest, COOL)
        for i in range(blocks):
            at = i * BLOCK + block
            if KIND == _KL:
                at = (blocks - 1 - i) * BLOCK + block
            a = tl.load(a_at + at, mask=at < V, other=none, eviction_policy="evict_first").to(tl.float32)
            t = tl.load(t_at + at, mask=at < V, other=none, eviction_policy="evict_first").to(tl.float32)
            each, p, f, _ = _parts_of(
                a, t, top_a, over_a, top_t, over_t, lead, shift, beta, more, other, less, cool, rest, KIND, COOL, EXACT
            )
            if KIND == _KL:
                g = f * scale
                if loss_ptr is not None:
                    terms += tl.sum(tl.reshape(each, (BLOCK // WIDTH, WIDTH)), 1)
            elif KIND == _TVD:
                g = p * ((0.5 + f) * mean - (0.5 - f) * above) * scale
            elif EXACT:
                g = p * (f - mean - above) * scale
            else:
                g = p * (f - mean) * scale
            tl.store(a_at + at, tl.where(counted, g, 0.0).to(a_ptr.dtype.element_ty), mask=at < V, cache_modifier=".cs")

    if loss_ptr is not None:
        tl.store(loss_ptr + row, tl.where(counted, tl.sum(terms, 0), 0.0))
    if STEP == _TOPS or (loss_ptr is not None and STEP == _ALL):
        tl.store(s_at, top_a)
        tl.store(s_at + 1, sum_a)
        tl.store(s_at + 2, top_t)
        tl.store(s_at + 3, sum_t)
    if loss_ptr is not None:
        tl.store(s_at + 4, mean)
        tl.store(s_at + 5, above)


@lru_cache(1024)
def _plan(
    n: int, v: int, size: int, ignore_index: int, distance: Distance, step: Step, grad: bool, target_stride: int, scale_stride: int
) -> Plan:  # fmt: skip
    """For `n` rows of `v` logits of `size` bytes: 16 columns a thread, 8 of jsd, whose terms take more registers."""
    name, beta, temperature = distance
    most, each = (4096, 256) if name == "jsd" else (8192, 512)
    block = min(next_power_of_2(v), most)
    return Plan(
        _distill_rows_kernel, (n,), target_stride, scale_stride, v, ignore_index, *split(beta), *split(1.0 - beta),
        *split(1.0 / temperature), KIND=DIVERGENCES.index(name), STEP=STEPS.index(step), GRAD=grad, COOL=temperature != 1.0,
        EXACT=size == 4, BLOCK=block, WIDTH=min(block, 16 // size), num_warps=warps(block, each, least=4),
    )  # fmt: skip


def kernel_rows(
    a: Tensor,
    t: Tensor,
    target: Tensor | None,
    ignore_index: int,
    distance: Distance,
    *,
    stats: Tensor,
    loss: Tensor | None = None,
    grad: bool = False,
    scale: Tensor | None = None,
    divisor: Tensor | None = None,
    index: Tensor | None = None,
    step: Step = "all",
) -> None:
    """`DistillRows` in one Triton launch."""
    strides = 0 if target is None else target.stride(0), 0 if scale is None or scale.numel() == 1 else scale.stride(0)
    plan = _plan(len(a), a.shape[-1], a.element_size(), ignore_index, distance, step, grad, *strides)
    plan(a.device, a, t, target, index, stats, loss, scale, divisor)
