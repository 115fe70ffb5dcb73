"""Kernels of `moe_losses.py`, whose text has the math."""

from __future__ import annotations

from ._elementary import exp, log1p
from ._launch import jit, tl


@jit
def _counts(m_ptr, row, N, T):
    """Whether each token does: T flags serve the N tokens, again and again."""
    counts = row < N
    if m_ptr is not None:
        counts = counts & (tl.load(m_ptr + row % T, mask=counts, other=0) != 0)
    return counts


@jit
def _read(x_ptr, row, counts, stride, E, BLOCK: tl.constexpr):
    """The logits of the tokens. One that does not count has all 0, and is not read."""
    col = tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + col, mask=counts[:, None] & (col < E), other=0.0).to(tl.float32)
    return tl.where(col < E, x, float("-inf"))


@jit
def _softmax_of(x, EXACT: tl.constexpr):
    e = exp(x - tl.max(x, 1)[:, None], EXACT)
    return tl.div_rn(e, tl.sum(e, 1)[:, None] + tl.zeros_like(e))


@jit
def _logsumexp(x, EXACT: tl.constexpr):
    """Infinite where the greatest logit is; NaN, which a maximum passes over, where there is one."""
    top = tl.max(x, 1)
    total = tl.sum(exp(x - top[:, None], EXACT), 1)
    z = tl.where(tl.abs(top) == float("inf"), top, top + log1p(total - 1.0))
    return tl.where(tl.max((x != x).to(tl.int32), 1) > 0, total, z)


@jit
def _balance_parts_kernel(
    x_ptr, i_ptr, m_ptr, p_ptr, c_ptr, n_ptr, stride, i_stride, N, T, K, E, FP64: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program's Σ s and c of every expert, and its n."""
    WIDE: tl.constexpr = tl.float64 if FP64 else tl.float32  # where all s are alike, so is their rounding
    pid = tl.program_id(0)
    col = tl.arange(0, BLOCK)[None, :]
    p = tl.zeros((ROWS, BLOCK), WIDE)
    c = tl.zeros((ROWS, BLOCK), tl.int32)
    n = tl.zeros((ROWS,), tl.int32)
    for start in range(pid * ROWS, N, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        counts = _counts(m_ptr, row, N, T)
        x = _read(x_ptr, row, counts, stride, E, BLOCK)
        if FP64:
            s = exp(x - tl.max(x, 1)[:, None], True).to(WIDE)
            s *= (1.0 / tl.sum(s, 1))[:, None]
        else:
            s = _softmax_of(x, True)
        p += tl.where(counts[:, None], s, 0.0)
        n += counts.to(tl.int32)
        for i in range(K):
            at = tl.load(i_ptr + row * i_stride + i, mask=counts, other=-1)
            c += (col == at[:, None]).to(tl.int32)
    to = pid * E + col
    tl.store(p_ptr + to, tl.sum(p, 0)[None, :], mask=col < E)
    tl.store(c_ptr + to, tl.sum(c, 0)[None, :], mask=col < E)
    tl.store(n_ptr + pid, tl.sum(n, 0))


@jit
def _divide(a, b, FP64: tl.constexpr):
    return a / b if FP64 else tl.div_rn(a, b)


@jit
def _balance_sum_kernel(
    p_ptr, c_ptr, n_ptr, y_ptr, a_ptr, parts, E, experts, FP64: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    WIDE: tl.constexpr = tl.float64 if FP64 else tl.float32  # of a long sum, the last steps round most
    col = tl.arange(0, BLOCK)[None, :]
    p = tl.zeros((ROWS, BLOCK), WIDE)
    c = tl.zeros((ROWS, BLOCK), tl.int32)
    n = tl.zeros((ROWS,), tl.int32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)
        there = (part < parts)[:, None] & (col < E)
        p += tl.load(p_ptr + part[:, None] * E + col, mask=there, other=0.0).to(WIDE)
        c += tl.load(c_ptr + part[:, None] * E + col, mask=there, other=0)
        n += tl.load(n_ptr + part, mask=part < parts, other=0)
    f = tl.sum(c, 0).to(WIDE)
    count = tl.maximum(tl.sum(n, 0), 1).to(WIDE) + tl.zeros_like(f)
    a = _divide(_divide(f, count, FP64) * experts, count, FP64)
    col = tl.arange(0, BLOCK)
    tl.store(a_ptr + col, a.to(tl.float32), mask=col < E)
    tl.store(y_ptr, tl.sum(a * tl.sum(p, 0), 0).to(tl.float32))


@jit
def _z_parts_kernel(x_ptr, m_ptr, z_ptr, n_ptr, stride, N, T, E, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's Σ z² and n."""
    pid = tl.program_id(0)
    z2 = tl.zeros((ROWS,), tl.float32)
    n = tl.zeros((ROWS,), tl.int32)
    for start in range(pid * ROWS, N, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        counts = _counts(m_ptr, row, N, T)
        z = _logsumexp(_read(x_ptr, row, counts, stride, E, BLOCK), True)
        z2 += tl.where(counts, z * z, 0.0)
        n += counts.to(tl.int32)
    tl.store(z_ptr + pid, tl.sum(z2, 0))
    tl.store(n_ptr + pid, tl.sum(n, 0))


@jit
def _z_sum_kernel(z_ptr, n_ptr, y_ptr, count_ptr, parts, FP64: tl.constexpr, BLOCK: tl.constexpr):
    WIDE: tl.constexpr = tl.float64 if FP64 else tl.float32
    z2 = tl.zeros((BLOCK,), WIDE)
    n = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, parts, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z2 += tl.load(z_ptr + at, mask=at < parts, other=0.0).to(WIDE)
        n += tl.load(n_ptr + at, mask=at < parts, other=0)
    count = tl.maximum(tl.sum(n, 0), 1).to(WIDE)
    tl.store(count_ptr, count.to(tl.float32))
    tl.store(y_ptr, _divide(tl.sum(z2, 0), count, FP64).to(tl.float32))


@jit
def _router_losses_bwd_kernel(
    dy_ptr, x_ptr, m_ptr, known_ptr, dx_ptr, stride, N, T, E, Z: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    """Of either loss: a or n is known."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    counts = _counts(m_ptr, row, N, T)
    x = _read(x_ptr, row, counts, stride, E, BLOCK)
    s = _softmax_of(x, EXACT)
    dy = tl.load(dy_ptr).to(tl.float32)
    if Z:
        dx = s * (2.0 * _logsumexp(x, EXACT) * tl.div_rn(dy, tl.load(known_ptr)))[:, None]
    else:
        g = tl.load(known_ptr + col, mask=col < E, other=0.0) + tl.zeros_like(s)
        for _ in tl.static_range(2):
            g -= tl.sum(s * g, 1)[:, None]
        dx = s * g * dy
    dx = tl.where(counts[:, None], dx, 0.0)
    tl.store(dx_ptr + row[:, None] * E + col, dx.to(dx_ptr.dtype.element_ty), mask=(row < N)[:, None] & (col < E))
