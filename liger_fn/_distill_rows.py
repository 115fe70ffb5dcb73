r"""The rows of a distillation: how far each row of student logits a is from its row of teacher logits t, and the gradient of that.

    p = softmax(a / T)        q = softmax(t / T)        δ = log p − log q = (a − t − lead) / T − shift
    kl            D = Σ q (log q − log p) = Σ q φ(δ)                        da = (p − q) / T            φ(s) = exp(s) − 1 − s
    reverse_kl    D = Σ p (log p − log q) = Σ p φ(−δ)                       f = δ
    jsd           D = β KL(q‖m) + (1 − β) KL(p‖m),  m = β q + (1 − β) p     f = (1 − β) log(p / m)
    tvd           D = ½ Σ |p − q|                                           f = ½ sign(δ)

da = p (f − Σ p f) / T for all but the first; Σ p f is over Σ p, 1 but for rounding, and kept in two parts: its error would be the same in a
whole row. So would that of δ, whose lead, max a − max t, large logits leave exact; its shift is what the sums of exp add. For tvd f − Σ p f
is the whole p below q where p is above, and less the whole p above q where p is below. The sums of φ are those of logarithms, since p and q
each sum to 1; but their terms are never negative and of second order, so that where p and q are nearly alike, D keeps its digits. With e =
expm1(−|δ|), p − q is p or q times ∓e. A term of jsd is likewise the larger of p and q, times κ ψ(e) − ψ(κ e), where ψ(y) = (1 + y) log(1 +
y) − y, and κ is the weight of the smaller in m. Each of these has a series where its argument is small.

A logit of −inf is a probability of 0: 0 log 0 is 0; D is inf where a q > 0 meets a p = 0 in kl, a p > 0 a q = 0 in reverse_kl. A row whose
target is `ignore_index` has D = 0 and gradient 0, whatever its logits. Where only some columns of a row are at hand, it takes steps: their
maxima and sums of exp, from which the caller makes the row's; their shares of the other sums, likewise; the gradient. Here are the
definition and plain PyTorch; the kernel is in `_distill_kernel`.
Source: Hinton et al. 2015, arXiv:1503.02531 (kl); Agarwal et al. 2023, arXiv:2306.13649 (reverse_kl, jsd); Wen et al. 2023,
arXiv:2307.15190 (tvd).
"""

from __future__ import annotations

from math import inf
from struct import pack, unpack
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ._check import wide
from ._launch import tl  # noqa: F401  Triton's interpreter wants it in sight of what a kernel calls: `phi` and below

DIVERGENCES = ("kl", "reverse_kl", "jsd", "tvd")
STATS = 6  # numbers of a row: the maximum of a, Σ exp((a − max) / T), the same of t; Σ p f in two parts, or of tvd the p below and above q


Step = Literal["all", "tops", "sums"]
STEPS = ("all", "tops", "sums")


class Distance(NamedTuple):
    """Which divergence, its β, and the temperature T."""

    name: str
    beta: float
    temperature: float


class DistillRows(Protocol):
    """One implementation of the row functions, which write to `loss`, `stats` and, with `grad`, over `a`."""

    def __call__(
        self,
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
        """
        Args:
            a, t: `[n, V]` each, contiguous. target: `[N]`, where N = n without an index; None where every row counts.
            stats: `[N, STATS]`; written when `loss` is given, else read.
            loss: `[N]`, written.
            grad: turn `a` into its gradient.
            scale: `[N]` or one element, the cotangent; 1 when absent. divisor: one element, divides it.
            index: `[n]`, which of the N rows each row of logits is.
            step: of rows of which these are some columns. "tops" writes the first four of `stats`, of these columns (no `loss`, no `grad`).
                "sums" reads them, of whole rows, and writes to `loss` what these columns have of D, and to the last two of `stats` the
                same as of whole rows over their own Σ p, 0 where that is (with `grad` for kl alone, whose gradient does without).
                A gradient without `loss` takes all six of whole rows.
        """


# --- definition, and plain PyTorch ------------------------------------------------------------------------------------------------------


def divergences(a: Tensor, t: Tensor, counted: Tensor | None, distance: Distance) -> Tensor:
    """The definition: `[N]` divergences, differentiable plain PyTorch."""
    name, beta, temperature = distance
    if counted is not None:
        a, t = (torch.where(counted.unsqueeze(-1), z, 0.0) for z in (a, t))
    u, v = (torch.log_softmax(wide(z) / temperature, -1) for z in (a, t))
    p, q = u.exp(), v.exp()
    if name == "kl":
        each = _times(q, torch.where(v == -inf, 0.0, v - u))
    elif name == "reverse_kl":
        each = _times(p, torch.where(u == -inf, 0.0, u - v))
    elif name == "jsd":
        m = torch.lerp(q, p, 1.0 - beta)
        r = torch.where(m == 0.0, 1.0, m).log()
        each = beta * q * torch.where(q == 0.0, 0.0, v - r) + (1.0 - beta) * p * torch.where(p == 0.0, 0.0, u - r)
    else:
        each = 0.5 * (p - q).abs()
    each = each.sum(-1)
    return each if counted is None else each.masked_fill(~counted, 0.0)


def _times(p: Tensor, gap: Tensor) -> Tensor:
    """p · gap; inf where the gap is, also where p is too small for its dtype."""
    lost = (p == 0.0) & (gap == inf)
    return torch.where(lost, inf, p * torch.where(lost, 0.0, gap))


def plain_rows(
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
    """`DistillRows` in plain PyTorch."""
    temperature, rows = distance.temperature, slice(None) if index is None else index
    left_out = None if target is None else target[rows] == ignore_index
    aw, tw = wide(a), wide(t)
    mine = stats[rows]
    if step == "tops" or (loss is not None and step == "all"):
        for i, z in ((0, aw), (2, tw)):
            top = z.amax(-1, keepdim=True)
            mine[:, i : i + 1] = top
            mine[:, i + 1] = torch.exp((z - top.masked_fill(top == -inf, 0.0)) / temperature).sum(-1)
    if step == "tops":
        stats[rows] = mine
        return
    top_a, sum_a, top_t, sum_t, mean, above = (mine[:, i : i + 1] for i in range(STATS))
    p, q = torch.exp((aw - top_a) / temperature) / sum_a, torch.exp((tw - top_t) / temperature) / sum_t
    shift = torch.where(sum_a > sum_t, ((sum_a - sum_t) / sum_t).log1p(), -((sum_t - sum_a) / sum_a).log1p())
    no_p, no_q = aw == -inf, tw == -inf
    delta = torch.where(no_p & no_q, 0.0, (aw - tw - (top_a - top_t)) / temperature - shift)
    each, f, pf, difference = _parts(p, q, delta, no_p, no_q, distance)
    if loss is not None:
        mine[:, 4:] = 0.0
        if f is not None and pf is not None:
            mass = p.sum(-1)
            mass = mass.masked_fill(mass == 0.0, 1.0)  # columns that have nothing of the row
            mine[:, 4] = pf.sum(-1) / mass
            rest = p * (0.5 + f) if distance.name == "tvd" else torch.where(mean.isinf(), 0.0, pf - mean * p)
            mine[:, 5] = rest.sum(-1) / mass
        stats[rows] = mine
        total = each.sum(-1)
        loss[rows] = total if left_out is None else total.masked_fill(left_out, 0.0)
    if grad:
        if f is None:
            g = difference
        elif distance.name == "tvd":
            g = p * ((0.5 + f) * mean - (0.5 - f) * above)
        else:
            g = p * (f - mean - above)
        if scale is not None:
            g *= (scale if scale.numel() == 1 else scale[rows]).unsqueeze(-1)
        if divisor is not None:
            g /= divisor
        g /= temperature
        a.copy_(g if left_out is None else g.masked_fill_(left_out.unsqueeze(-1), 0.0))


def _parts(
    p: Tensor, q: Tensor, delta: Tensor, no_p: Tensor, no_q: Tensor, distance: Distance
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """The terms of D, f, p f (None for kl, whose gradient needs neither; of tvd p where it is below q), and p − q."""
    name, beta = distance[:2]
    near, up, x = 0.005 if p.dtype is torch.float64 else 0.1, delta > 0.0, -delta.abs()
    e = torch.expm1(x)
    difference = torch.where(up, -p * e, q * e)
    if name == "tvd":
        f = 0.5 * delta.sign()
        return 0.5 * difference.abs(), f, p * (0.5 - f), difference
    if name == "jsd":
        kappa = torch.where(up, beta, 1.0 - beta)
        y = kappa * e
        log = torch.log1p(y)
        psi_e = torch.where(x > -near, psi_of_log(x), torch.where(x == -inf, 1.0, (1.0 + e) * x - e))
        psi_y = torch.where(y > -near, psi(y), (1.0 + y) * log - y)
        f = (1.0 - beta) * torch.where(no_p, 0.0, torch.where(up, -log, delta - log))
        each = kappa * psi_e - psi_y
        if p.dtype is torch.float32:
            each += torch.where(up, split(beta)[1], split(1.0 - beta)[1]) * (psi_e - e * log)
        return torch.where(up, p, q) * each, f, p * f, difference
    s, base, none = (delta, q, no_q) if name == "kl" else (-delta, p, no_p)
    dot = torch.where(none, 0.0, torch.where(s == -inf, -inf, base * s))
    each = torch.where(s.abs() < near, base * phi(s), (difference if name == "kl" else -difference) - dot)
    return (each, None, None, difference) if name == "kl" else (each, torch.where(no_p, 0.0, delta), -dot, difference)


def split(x: float) -> tuple[float, float]:
    """x in fp32, and what that leaves of it: where a rounding is the same in every term, sums show it."""
    (there,) = unpack("f", pack("f", x))
    return there, x - there


def phi(s):
    """exp(s) − 1 − s for a small s."""
    return s * s * (0.5 + s * (1 / 6 + s * (1 / 24 + s * (1 / 120 + s * (1 / 720)))))


def psi_of_log(x):
    """ψ(expm1(x)) for a small x."""
    return x * x * (0.5 + x * (1 / 3 + x * (1 / 8 + x * (1 / 30 + x * (1 / 144)))))


def psi(y):
    """ψ(y) for a small y."""
    return y * y * (0.5 - y * (1 / 6 - y * (1 / 12 - y * (1 / 20 - y * (1 / 30 - y * (1 / 42))))))
