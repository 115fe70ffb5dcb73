r"""The log-probability of each target under a head, without the head's logits: what preference and reinforcement losses are made of.

    a = x wᵀ + b        log_prob = a_y − lse        lse = log Σ_j exp(a_j)        entropy = −Σ_j p_j log p_j        p = softmax(a)
    da_j = ([j = y] − p_j) d log_prob + p_j d lse − p_j (log p_j + entropy) d entropy

a as `_loss_rows` scales and caps them; dx, dw, db from da as in `linear_cross_entropy`. Each row has cotangents of its own, so the logits
are made again in backward. Residuals: x, w, b, target, and three numbers for each row.
Source: Wijmans et al. 2024, arXiv:2411.09009, for the memory at stake.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._backend import in_own_dtypes
from ._check import dense
from ._head import ACCUMULATE, Accumulate, Head, budget, head_arguments, walk
from ._kept_rows import Chunk
from ._loss_options import number, shifted
from ._loss_rows import Part, Terms, check_targets, formed, valid
from ._vjp import Args, Needs, custom_vjp
from .cross_entropy import KERNELS, PLAIN, Parts

OP = "linear_log_prob"


class Residuals(NamedTuple):
    """What the backward of `linear_log_prob` needs."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    stats: Tensor
    disorder: Tensor  # the entropy of each row
    ignore_index: int
    softcap: float
    logit_scale: float
    temperature: float
    accumulate: str
    memory_budget: int

    @property
    def terms(self) -> Terms:
        return Terms(None, 0.0, 0.0, self.softcap, self.logit_scale, 1.0 / self.temperature)


class LogProbAux(NamedTuple):
    """What else is known of each row, of target's shape, fp32, differentiable; 0 where a row does not count."""

    lse: Tensor  # log Σ_j exp(a_j)
    entropy: Tensor  # −Σ_j p_j log p_j, in nats


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, softcap: float, logit_scale: float,
    temperature: float, accumulate: str, memory_budget: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    counted, wrong, column = valid(target, ignore_index, weight.shape[0])
    logits = _check.wide(F.linear(x, weight, bias)).masked_fill(~counted.unsqueeze(-1), 0.0)
    log_p = formed(logits, Terms(None, 0.0, 0.0, softcap, logit_scale, 1.0 / temperature))
    lse = log_p.logsumexp(-1)
    log_p = log_p.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    each = log_p.gather(-1, column.unsqueeze(-1)).squeeze(-1), lse, entropy
    return tuple(t.masked_fill(~counted, 0.0).masked_fill(wrong, torch.nan) for t in each)


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


def _outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, softcap: float, logit_scale: float,
    temperature: float, accumulate: str, memory_budget: int, needs: Needs,
) -> Args:  # fmt: skip
    each = [x.new_empty(target.shape, dtype=_check.wide_dtype(x)) for _ in range(3)]
    return *each, each[0].new_empty(target.numel(), 2), each[0].new_empty(target.numel())


def _gradients(res: Residuals, dy: Args, needs: Needs) -> tuple[Tensor | None, ...]:
    return tuple(dense(t) if t is not None and n else None for t, n in zip(res[:3], needs, strict=True))


def _fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, softcap: float, logit_scale: float,
    temperature: float, accumulate: str, memory_budget: int, needs: Needs, parts: Parts,
) -> tuple[tuple[Tensor, ...], Residuals]:  # fmt: skip
    flat = target.reshape(-1)
    check_targets(OP, flat, ignore_index, weight.shape[0])
    found = x.new_empty(4, len(flat), dtype=_check.wide_dtype(x))
    stats, loss = found.new_empty(len(flat), 2), torch.empty_like(found[0])
    lse, log_prob, entropy = found[0], found[1], found[2]
    res = Residuals(
        x, weight, bias, target, stats, torch.empty_like(loss), ignore_index, softcap, logit_scale, temperature, accumulate, memory_budget
    )

    def turn(a: Tensor, chunk: Chunk, part: Part | None, grad: bool) -> None:
        parts.rows(
            a, chunk.own(flat), ignore_index, res.terms, stats=chunk.own(stats), loss=chunk.own(loss), aux=chunk.own(found.T).T,
            index=chunk.index,
        )  # fmt: skip

    walk(OP, _head(res), flat, ignore_index, turn, (False,) * 3, accumulate, memory_budget, forward=True, found=(found, stats.T))
    res.disorder.copy_(entropy)
    return tuple(t.clone().view(target.shape) for t in (log_prob, lse, entropy)), res


def _head(res: Residuals) -> Head:
    return Head(res.x.reshape(-1, res.x.shape[-1]), res.weight, res.bias)


def _bwd(res: Residuals, dy: Args, needs: Needs, donate: bool, parts: Parts) -> tuple[Tensor | None, ...]:
    flat = res.target.reshape(-1)
    d_log_prob, d_lse, d_entropy = (d.reshape(-1) for d in dy)
    scale, bend = -d_log_prob, torch.stack((d_lse - d_entropy * res.disorder, -d_entropy), 1)

    def turn(a: Tensor, chunk: Chunk, part: Part | None, grad: bool) -> None:
        parts.rows(
            a, chunk.own(flat), res.ignore_index, res.terms, stats=chunk.own(res.stats), grad=a, scale=chunk.own(scale),
            bend=chunk.own(bend), index=chunk.index, part=part,
        )  # fmt: skip

    dx, dweight, dbias = walk(OP, _head(res), flat, res.ignore_index, turn, needs, res.accumulate, res.memory_budget, forward=False)
    return None if dx is None else dx.view(res.x.shape), dweight, dbias


# --- public function --------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(in_own_dtypes(partial(_fwd, parts=KERNELS)), in_own_dtypes(partial(_bwd, parts=KERNELS))),
    plain=(partial(_fwd, parts=PLAIN), partial(_bwd, parts=PLAIN)),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: (res.target.shape,) * 3,
    diff=3,
    n_out=3,
    shaped=lambda log_prob, lse, entropy: (log_prob, LogProbAux(lse, entropy)),
)
def linear_log_prob(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    shift: bool = False,
    accumulate: Accumulate = "auto",
    memory_budget: int | None = None,
) -> Args:
    r"""`log_softmax(x weightᵀ + bias)[target]`, in nats, without ever holding all the logits, and `(lse, entropy)` beside it.

    Args:
        x: `[..., H]`; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        weight: `[V, H]`, of x's dtype. target: `[...]`, integers in [0, V), or `ignore_index` where a row does not count.
        bias: `[V]`, of x's dtype, or None.
        ignore_index: the target of rows that have no log-probability and no gradient.
        softcap, logit_scale, temperature: the logits are `softcap · tanh(logit_scale · logits / softcap) / temperature`; without a cap,
            `logit_scale · logits / temperature`.
        shift: target belongs to the tokens that x was made of: each row's is the next one along the last axis, and the last row has none.
        accumulate, memory_budget: as in `linear_cross_entropy`, with whose save="recompute" it shares its cost: four matrix products.

    Under autocast, x, weight and bias take part in the dtype that a matrix product would take.

    Returns:
        `(log_prob, LogProbAux(lse, entropy))`, each of target's shape, fp32 (fp64 for fp64 inputs), 0 where a row does not count. All three
        have exact derivatives, with a cotangent for each row. Gradients: x, weight and bias.

    Raises:
        TypeError: a tensor is not of a float dtype, dtypes differ, target is not of an integer dtype.
        ValueError: a shape does not fit, devices differ, an unknown option, a number out of its range; on a CPU also a target outside
            [0, V). On a GPU such a row's values and gradient are NaN.
        torch.OutOfMemoryError: as `linear_cross_entropy`, with a note that names a smaller `memory_budget`.

    Examples:
        >>> liger_fn.linear_log_prob(torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([3, -100]))[0]
        tensor([-2.0794,  0.0000])

    Source: Wijmans et al. 2024, arXiv:2411.09009, for the memory at stake; Rafailov et al. 2023, arXiv:2305.18290, for what it is used in.
    """
    op = OP
    x, weight, bias, target = head_arguments(op, x, weight, bias, target)
    _check.integer(op, "ignore_index", ignore_index)
    if shift:
        _check.rank(op, "x", x, 2)
        target = shifted(target, ignore_index)
    _check.choice(op, "accumulate", accumulate, ACCUMULATE)
    return (
        x,
        weight,
        bias,
        target,
        ignore_index,
        0.0 if softcap is None else number(op, "softcap", softcap, "above 0"),
        number(op, "logit_scale", logit_scale, "above 0"),
        number(op, "temperature", temperature, "above 0"),
        accumulate,
        budget(op, memory_budget),
    )
