"""exp, expm1, log1p and tanh to the last digit, for kernels: the hardware's are off by several roundings, which fp32 results would show.

Beside them, a product and a division as exact as the rest. `EXACT` is for values that are not rounded to half precision afterwards; without
it, exp and division are the hardware's.
"""

from __future__ import annotations

from ._launch import jit, tl


@jit
def rounded(a, b):
    """a b, rounded once: no compiler makes it one with what follows, so that equals cancel."""
    return tl.fma(a, b, 0.0)


@jit
def _reduced(x):
    """(2ᵏ, exp(x − k ln 2) − 1) for x ≤ 0, k the integer that leaves least: ln 2 is taken off in two parts, what is left has a series."""
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(k, -0.693145751953125, x)
    r = tl.fma(k, -1.428606765330187e-06, r)
    p = tl.fma(r, 2.48015873015873e-05, 0.0001984126984126984)
    p = tl.fma(r, p, 0.001388888888888889)
    p = tl.fma(r, p, 0.008333333333333333)
    p = tl.fma(r, p, 0.041666666666666664)
    p = tl.fma(r, p, 0.16666666666666666)
    p = tl.fma(r, p, 0.5)
    return tl.exp2(k), tl.fma(r * r, p, r)


@jit
def exp(x, EXACT: tl.constexpr):
    """exp(x) for x ≤ 0, NaN and −inf included."""
    if EXACT:
        power, rest = _reduced(tl.where(x < -104.0, -104.0, x))  # exp is 0 there, and −inf would make NaN
        return tl.fma(power, rest, power)
    return tl.exp(x)


@jit
def expm1(x, EXACT: tl.constexpr):
    """exp(x) − 1 for x ≤ 0."""
    if EXACT:
        power, rest = _reduced(tl.where(x < -104.0, -104.0, x))
        return tl.fma(power, rest, power - 1.0)
    series = x * (1.0 + x * (0.5 + x * (0.16666666666666666 + x * (0.041666666666666664 + x * 0.008333333333333333))))
    return tl.where(x > -0.1, series, tl.exp(x) - 1.0)


@jit
def log1p(x):
    """log(1 + x) for x ≥ 0; for a small x, whose digits 1 + x would lose, the series of 2 artanh(x / (2 + x))."""
    z = x / (2.0 + x)
    z2 = z * z
    series = 2.0 * z * (1.0 + z2 * (0.3333333333333333 + z2 * (0.2 + z2 * 0.14285714285714285)))
    return tl.where(x < 0.1, series, tl.log(1.0 + x))


@jit
def over(a, b, EXACT: tl.constexpr):
    """a / b, correctly rounded where that shows."""
    return tl.div_rn(a, b) if EXACT else a / b


@jit
def tanh(x, EXACT: tl.constexpr):
    """tanh(x) for x ≥ 0, from what is small: 1 − tanh for a large x, exp(−2x) − 1 for a small one."""
    d = expm1(-2.0 * x, EXACT)
    t = over(-d, 2.0 + d, EXACT)
    if EXACT:
        e = exp(-2.0 * x, EXACT)
        t = tl.where(e < 0.3, 1.0 - tl.div_rn(2.0 * e, 1.0 + e), t)
    return t
