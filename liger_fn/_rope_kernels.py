"""Kernels of `rope`: one program turns all heads of one token, so that cos and sin are read once."""

from __future__ import annotations

from ._launch import jit, tl


@jit
def _along(channel, step, DENSE: tl.constexpr):
    """The offset of a channel whose neighbours lie `step` apart."""
    if DENSE:
        return channel
    else:
        return channel.to(tl.int64) * step


@jit
def _pairs(at, keep, HALF, step, PAIRS: tl.constexpr, DENSE: tl.constexpr, H: tl.constexpr, D: tl.constexpr):
    """The first and second channels of the pairs of H rows, which start at `at`."""
    if PAIRS:
        e = tl.arange(0, 2 * D)[None, :]
        x = tl.load(at + _along(e, step, DENSE), mask=keep & (e < 2 * HALF), other=0.0).to(tl.float32)
        lo, hi = tl.split(tl.reshape(x, (H, D, 2)))
    else:
        d = tl.arange(0, D)[None, :]
        lo = tl.load(at + _along(d, step, DENSE), mask=keep & (d < HALF), other=0.0).to(tl.float32)
        hi = tl.load(at + _along(HALF + d, step, DENSE), mask=keep & (d < HALF), other=0.0).to(tl.float32)
    return lo, hi


@jit
def _section(pair, first, second, stride, THREES: tl.constexpr):
    """Where the table of this pair's section starts: time, height or width."""
    if THREES:
        which = tl.where((pair % 3 == 1) & (pair < first), 1, tl.where((pair % 3 == 2) & (pair < second), 2, 0))
    else:
        which = (pair >= first).to(tl.int32) + (pair >= second).to(tl.int32)
    return which.to(tl.int64) * stride


@jit
def _table(
    at, HALF, step, section, first, second,
    PAIRS: tl.constexpr, DENSE: tl.constexpr, WHOLE: tl.constexpr, SECTIONS: tl.constexpr, THREES: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """What a table holds of one token for the first and second channels of the pairs: one number for both where it is not WHOLE."""
    d = tl.arange(0, D)[None, :]
    if WHOLE:
        if SECTIONS:
            if PAIRS:
                at += _section(tl.arange(0, 2 * D)[None, :] // 2, first, second, section, THREES)
            else:
                at += _section(d, first, second, section, THREES)
        lo, hi = _pairs(at, True, HALF, step, PAIRS, DENSE, 1, D)
    else:
        if SECTIONS:
            at += _section(d, first, second, section, THREES)
        lo = tl.load(at + _along(d, step, DENSE), mask=d < HALF, other=0.0).to(tl.float32)
        hi = lo
    return lo, hi


@jit
def _turn(
    x_ptr, y_ptr, xb, xh, xt, xd, yb, yh, yt, b, t, heads, HALF, rest, c1, c2, s1, s2,
    BACKWARD: tl.constexpr, PAIRS: tl.constexpr, DENSE: tl.constexpr, H: tl.constexpr, D: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    """Turn all heads of one token."""
    head = tl.arange(0, H)[:, None]
    x_at = x_ptr + b * xb + t * xt + head.to(tl.int64) * xh
    y_at = y_ptr + b * yb + t * yt + head.to(tl.int64) * yh
    lo, hi = _pairs(x_at, head < heads, HALF, xd, PAIRS, DENSE, H, D)
    if BACKWARD:
        y_lo, y_hi = lo * c1 + hi * s2, hi * c2 - lo * s1
    else:
        y_lo, y_hi = lo * c1 - hi * s1, hi * c2 + lo * s2
    y_lo, y_hi = y_lo.to(y_ptr.dtype.element_ty), y_hi.to(y_ptr.dtype.element_ty)
    if PAIRS:
        e = tl.arange(0, 2 * D)[None, :]
        tl.store(y_at + e, tl.interleave(y_lo, y_hi), mask=(head < heads) & (e < 2 * HALF))
    else:
        d = tl.arange(0, D)[None, :]
        tl.store(y_at + d, y_lo, mask=(head < heads) & (d < HALF))
        tl.store(y_at + (HALF + d), y_hi, mask=(head < heads) & (d < HALF))
    if REST:
        r = tl.arange(0, REST)[None, :]
        keep = (head < heads) & (r < rest)
        tl.store(y_at + (2 * HALF + r), tl.load(x_at + _along(2 * HALF + r, xd, DENSE), mask=keep), mask=keep)


@jit
def _rope_kernel(
    q_ptr, k_ptr, yq_ptr, yk_ptr, cos_ptr, sin_ptr, qb, qh, qt, qd, kb, kh, kt, kd, yqb, yqh, yqt, ykb, ykh, ykt,
    cb, ct, cd, sb, st, sd, c_section, s_section, T, q_heads, k_heads, HALF, rest, first, second,
    BACKWARD: tl.constexpr, PAIRS: tl.constexpr, DENSE: tl.constexpr, WHOLE: tl.constexpr, SECTIONS: tl.constexpr, THREES: tl.constexpr,
    QH: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    c1, c2 = _table(cos_ptr + b * cb + t * ct, HALF, cd, c_section, first, second, PAIRS, DENSE, WHOLE, SECTIONS, THREES, D)
    s1, s2 = _table(sin_ptr + b * sb + t * st, HALF, sd, s_section, first, second, PAIRS, DENSE, WHOLE, SECTIONS, THREES, D)
    if q_ptr is not None:
        _turn(
            q_ptr, yq_ptr, qb, qh, qt, qd, yqb, yqh, yqt, b, t, q_heads, HALF, rest, c1, c2, s1, s2, BACKWARD, PAIRS, DENSE, QH, D, REST
        )  # fmt: skip
    if k_ptr is not None:
        _turn(
            k_ptr, yk_ptr, kb, kh, kt, kd, ykb, ykh, ykt, b, t, k_heads, HALF, rest, c1, c2, s1, s2, BACKWARD, PAIRS, DENSE, KH, D, REST
        )  # fmt: skip
