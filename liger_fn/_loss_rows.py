r"""The rows of a cross entropy: statistics, loss and gradient of each row of logits, as cross entropy and linear cross entropy share them.

    a = outer · cap tanh(inner · logits / cap) under a soft cap, else outer · inner · logits
    m = max_j a_j        s = log Σ_j exp(a_j − m)        lse = m + s
    loss = (1 − ε) w_y (lse − a_y) + (ε/V) Σ_j w_j (lse − a_j) + z lse²
    da_j = (W + 2 z lse) exp(a_j − lse) − (1 − ε) w_y [j = y] − (ε/V) w_j        W = (1 − ε) w_y + (ε/V) Σ_j w_j

and, of da, the derivative of a; with class weights w (1 without), label smoothing ε, z-loss z. The log-sum-exp is kept in its two parts:
their sum would be rounded at the size of the logits, and every exp by as much. Where the target has the maximum, s = log1p(Σ_{j≠y} exp(a_j
− m)), and p_y − 1 = expm1(a_y − m − s): a model that is nearly certain, whose p_y rounds to 1, keeps every digit of its small loss and
gradient.

A row whose target y is `ignore_index` has loss 0 and gradient 0, whatever its logits. A row whose target is outside [0, V) has loss and
gradient NaN: never a read out of bounds, never a plausible number. Here are the definition and plain PyTorch; the kernel is in
`_loss_kernel`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import wide


class Terms(NamedTuple):
    """What a loss has beyond the plain cross entropy."""

    weight: Tensor | None = None  # [V], of the classes
    smoothing: float = 0.0
    z: float = 0.0
    cap: float = 0.0  # 0 for none
    inner: float = 1.0  # multiplies the logits before the cap
    outer: float = 1.0  # and after it


PLAIN = Terms()


class Part(NamedTuple):
    """Where the columns at hand lie among all classes, if they are not all of them."""

    first: int
    classes: int


class Rows(Protocol):
    """One implementation of the row functions, which write to `loss`, `stats` and `grad`."""

    def __call__(
        self,
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
        """
        Args:
            logits: `[n, V]`. target: `[N]`, where N = n without an index.
            stats: `[N, 2]`, the parts m and s; written when `loss` is given, else read.
            loss: `[N]`, written. aux: `[4, N]`, written with it: lse, log p_y, the entropy, 1 where the target has the maximum, alone
                or not; 0 for rows that do not count, and the first three NaN for wrong ones.
            grad: `[n, V]`, written; may be `logits` itself.
            scale: `[N]` or one element, the cotangent; 1 when absent. divisor: one element, divides it.
            bend: `[N, 2]`, adds (b₀ + b₁ log p_j) p_j to da_j: the cotangents of lse and entropy come so.
            index: `[n]`, which of the N rows each row of logits is.
            part: the logits are these columns of all. Statistics are then of them alone, log p_y is a_y − m, −∞ where y is elsewhere, and
                the loss is `[2, N]`, with aux's strides: the same a_y − m, and Σ_j w_j (a_j − m), 0 without label smoothing. A gradient is
                of the whole, whose statistics are given.
        """


class Valid(NamedTuple):
    """Which rows count: `counted` and `wrong` are masks, `column` is the target, made legal."""

    counted: Tensor
    wrong: Tensor
    column: Tensor


def valid(target: Tensor, ignore_index: int, v: int) -> Valid:
    """Sort the rows out."""
    counted = target != ignore_index
    wrong = counted & ((target < 0) | (target >= v))
    return Valid(counted, wrong, target.clamp(0, v - 1))


def formed(logits: Tensor, terms: Terms) -> Tensor:
    """The logits as the loss takes them, differentiable plain PyTorch."""
    a = logits if terms.inner == 1.0 else logits * terms.inner
    a = terms.cap * torch.tanh(a / terms.cap) if terms.cap else a
    return a if terms.outer == 1.0 else a * terms.outer


def losses(logits: Tensor, target: Tensor, ignore_index: int, terms: Terms = PLAIN) -> Tensor:
    """The definition: `[N]` losses, differentiable plain PyTorch."""
    counted, wrong, column = valid(target, ignore_index, logits.shape[-1])
    a = formed(torch.where(counted.unsqueeze(-1), wide(logits), 0.0), terms)
    weight = None if terms.weight is None else terms.weight.to(a.dtype)
    each = F.cross_entropy(a, column, weight, reduction="none", label_smoothing=terms.smoothing)
    if terms.z:
        each = each + terms.z * a.logsumexp(-1).square()
    return each.masked_fill(~counted, 0.0).masked_fill(wrong, torch.nan)


def plain_rows(
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
    """`Rows` in plain PyTorch."""
    if index is not None:  # gather what belongs to the rows, and put back what was written
        mine, own = stats[index], scale if scale is None or scale.numel() == 1 else scale[index]
        made, seen = None if loss is None else loss[..., index], None if aux is None else aux[:, index]
        plain_rows(
            logits, target[index], ignore_index, terms, stats=mine, loss=made, aux=seen, grad=grad, scale=own,
            divisor=divisor, bend=None if bend is None else bend[index], part=part,
        )  # fmt: skip
        if loss is not None and made is not None:
            stats[index], loss[..., index] = mine, made
            if aux is not None and seen is not None:
                aux[:, index] = seen
        return
    raw = wide(logits)
    first, classes = (0, raw.shape[-1]) if part is None else part
    here = slice(first, first + raw.shape[-1])
    weight = None if terms.weight is None else terms.weight.to(raw.dtype)
    counted, wrong, column = valid(target, ignore_index, classes)
    a, at = formed(raw, terms), (column - first).unsqueeze(-1)
    present = (at >= 0) & (at < a.shape[-1])
    at = at.clamp(0, a.shape[-1] - 1)
    a_y = a.gather(-1, at).where(present, -torch.inf).squeeze(-1)
    w_y = 1.0 if weight is None else weight[column]
    smoothing, z = terms.smoothing, terms.z
    share = smoothing / classes * (1.0 if weight is None else weight[here])  # of every class
    whole = smoothing / classes * (classes if weight is None else weight.sum())
    if loss is not None:
        top = a.amax(-1)
        shift = torch.where(top == -torch.inf, 0.0, top).unsqueeze(-1)
        e = torch.exp(a - shift)
        others = e.scatter(-1, at, e.gather(-1, at).where(~present, 0.0)).sum(-1)
        stats[:, 0] = top
        stats[:, 1] = torch.where(a_y == top, others.log1p(), torch.log(others + torch.exp(a_y - top)))
        nll = stats[:, 1] - (a_y - top)
        if part is None:
            each = (1.0 - smoothing) * w_y * nll
            if smoothing:
                each += whole * nll - (share * (a - a_y.unsqueeze(-1))).sum(-1)
            if z:
                each += z * stats.sum(-1).square()
        else:
            each = ((a - top.unsqueeze(-1)) * (1.0 if weight is None else weight[here])).sum(-1) if smoothing else torch.zeros_like(nll)
            each = torch.stack((a_y - top, each))
        loss.copy_(each).masked_fill_(~counted, 0.0).masked_fill_(wrong, torch.nan)
        if aux is not None:
            d = a - top.unsqueeze(-1)
            e = torch.exp(d)
            entropy = stats[:, 1] - torch.where(e > 0, e * d, 0.0).sum(-1) / e.sum(-1)
            log_p = -nll if part is None else a_y - top
            aux.copy_(torch.stack((stats.sum(-1), log_p, entropy, ((a_y == top) & (nll == nll)).to(a.dtype))))
            aux[:3].masked_fill_(~counted, 0.0).masked_fill_(wrong, torch.nan)
            aux[3].masked_fill_(~counted | wrong, 0.0)
    if grad is not None:
        top, rest = stats[:, 0], stats[:, 1]
        mass = (1.0 - smoothing) * w_y + whole
        pull = 2.0 * z * (top + rest)
        x = a - top.unsqueeze(-1) - rest.unsqueeze(-1)
        p = torch.exp(x)
        p_y = p.gather(-1, at)
        g = p * (pull + mass).unsqueeze(-1)
        g_y = torch.expm1(x.gather(-1, at).squeeze(-1)) * mass + p_y.squeeze(-1) * pull + whole
        g.scatter_(-1, at, g_y.unsqueeze(-1).where(present, g.gather(-1, at)))
        if smoothing:
            g -= share
        if scale is not None:
            g *= scale.unsqueeze(-1)
        if divisor is not None:
            g /= divisor
        if bend is not None:
            g += torch.where(p == 0, 0.0, p * (bend[:, :1] + bend[:, 1:] * x))
        if terms.cap:
            u = raw * (terms.inner / terms.cap)
            e = torch.exp(-2.0 * u.abs())
            t = torch.tanh(u)
            g *= torch.where(t.abs() < 0.5, 1.0 - t.square(), 4.0 * e / (1.0 + e).square())  # 1 − tanh² alone would cancel near 1
        if terms.inner * terms.outer != 1.0:
            g *= terms.inner * terms.outer
        g.masked_fill_(wrong.unsqueeze(-1), torch.nan).masked_fill_(~counted.unsqueeze(-1), 0.0)
        grad.copy_(g)


def check_targets(op: str, target: Tensor, ignore_index: int, v: int) -> None:
    """On a CPU, where looking costs nothing: every target is a class or `ignore_index`. On a GPU such a row's loss is NaN instead."""
    if target.device.type != "cpu" or target.numel() == 0:
        return
    wrong = target[valid(target, ignore_index, v).wrong]
    if wrong.numel():
        raise ValueError(
            f"{op}: every target must be in [0, {v}) or be ignore_index={ignore_index}, got {wrong[0].item()} "
            f"({wrong.numel()} such targets); check the tokenizer's vocabulary size against the logits"
        )
