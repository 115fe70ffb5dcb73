r"""The rows of a cross entropy: statistics, loss and gradient of each row of logits, as cross entropy and linear cross entropy share them.

    a = cap tanh(logits / cap) under a soft cap, else the logits        m = max_j a_j        s = log Σ_j exp(a_j − m)        lse = m + s
    loss = (1 − ε) w_y (lse − a_y) + (ε/V) Σ_j w_j (lse − a_j) + z lse²
    da_j = (W + 2 z lse) exp(a_j − lse) − (1 − ε) w_y [j = y] − (ε/V) w_j        W = (1 − ε) w_y + (ε/V) Σ_j w_j

with class weights w (1 without), label smoothing ε, z-loss z. The log-sum-exp is kept in its two parts: their sum would be rounded at the
size of the logits, and every exp by as much. Where the target has the maximum, s = log1p(Σ_{j≠y} exp(a_j − m)), and p_y − 1 = expm1(a_y −
m − s): a model that is nearly certain, whose p_y rounds to 1, keeps every digit of its small loss and gradient.

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


PLAIN = Terms()


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
    ) -> None:
        """
        Args:
            logits: `[N, V]`. target: `[N]`.
            stats: `[N, 2]`, the parts m and s; written when `loss` is given, else read.
            loss: `[N]`, written. aux: `[4, N]`, written with it: lse, log p_y, the entropy, 1 where the target has the maximum, alone
                or not; 0 for rows that do not count, and the first three NaN for wrong ones.
            grad: `[N, V]`, written; may be `logits` itself.
            scale: `[N]` or one element, the cotangent; 1 when absent. divisor: one element, divides it.
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


def losses(logits: Tensor, target: Tensor, ignore_index: int, terms: Terms = PLAIN) -> Tensor:
    """The definition: `[N]` losses, differentiable plain PyTorch."""
    counted, wrong, column = valid(target, ignore_index, logits.shape[-1])
    a = torch.where(counted.unsqueeze(-1), wide(logits), 0.0)
    if terms.cap:
        a = terms.cap * torch.tanh(a / terms.cap)
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
) -> None:
    """`Rows` in plain PyTorch."""
    (weight, smoothing, z, cap), raw = terms, wide(logits)
    counted, wrong, column = valid(target, ignore_index, raw.shape[-1])
    t = torch.tanh(raw / cap) if cap else raw
    a = cap * t if cap else raw
    at, v = column.unsqueeze(-1), a.shape[-1]
    a_y = a.gather(-1, at).squeeze(-1)
    weight = None if weight is None else weight.to(a.dtype)
    w_y = 1.0 if weight is None else weight[column]
    share = smoothing / v * (1.0 if weight is None else weight)  # of every class
    whole = smoothing / v * (v if weight is None else weight.sum())
    if loss is not None:
        top = a.amax(-1)
        shift = torch.where(top == -torch.inf, 0.0, top).unsqueeze(-1)
        others = torch.exp(a - shift).scatter_(-1, at, 0.0).sum(-1)
        stats[:, 0] = top
        stats[:, 1] = torch.where(a_y == top, others.log1p(), torch.log(others + torch.exp(a_y - top)))
        nll = stats[:, 1] - (a_y - top)
        each = (1.0 - smoothing) * w_y * nll
        if smoothing:
            each += whole * nll - (share * (a - a_y.unsqueeze(-1))).sum(-1)
        if z:
            each += z * stats.sum(-1).square()
        loss.copy_(each).masked_fill_(~counted, 0.0).masked_fill_(wrong, torch.nan)
        if aux is not None:
            d = a - top.unsqueeze(-1)
            e = torch.exp(d)
            entropy = stats[:, 1] - torch.where(e > 0, e * d, 0.0).sum(-1) / e.sum(-1)
            aux.copy_(torch.stack((stats.sum(-1), -nll, entropy, ((a_y == top) & (loss == loss)).to(a.dtype))))
            aux[:3].masked_fill_(~counted, 0.0).masked_fill_(wrong, torch.nan)
            aux[3].masked_fill_(~counted | wrong, 0.0)
    if grad is not None:
        top, rest = stats[:, 0], stats[:, 1]
        mass = (1.0 - smoothing) * w_y + whole
        pull = 2.0 * z * (top + rest)
        p = torch.exp(a - top.unsqueeze(-1) - rest.unsqueeze(-1))
        p_y = p.gather(-1, at)
        p *= (pull + mass).unsqueeze(-1)
        g_y = torch.expm1(a_y - top - rest) * mass + p_y.squeeze(-1) * pull + whole
        p.scatter_(-1, at, g_y.unsqueeze(-1))
        if smoothing:
            p -= share
        if cap:
            e = torch.exp(raw.abs() / (-0.5 * cap))
            p *= torch.where(t.abs() < 0.5, 1.0 - t.square(), 4.0 * e / (1.0 + e).square())  # 1 − tanh² alone would cancel near 1
        if scale is not None:
            p *= scale.unsqueeze(-1)
        if divisor is not None:
            p /= divisor
        p.masked_fill_(wrong.unsqueeze(-1), torch.nan).masked_fill_(~counted.unsqueeze(-1), 0.0)
        grad.copy_(p)


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
