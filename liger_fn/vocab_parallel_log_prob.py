r"""The log-probability of each target over a process group that has the vocabulary cut in shards: tensor parallel.

    a_r = x w_rᵀ + b_r        log_prob, lse, entropy: as in `linear_log_prob`, of the logits of all ranks r together
    dx = Σ_r da_r w_r         dw_r = da_rᵀ x        db_r = Σ_rows da_r

How whole rows come of shards is in `_vocab_parallel`. A rank alone is `linear_log_prob`, bit for bit. Residuals: its own, and the shard.
Source: Shoeybi et al. 2019, arXiv:1909.08053, for the cross entropy of shards; Wijmans et al. 2024, arXiv:2411.09009, for the memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check
from ._backend import in_own_dtypes
from ._head import ACCUMULATE, Accumulate, Head, blank, budget, head_arguments
from ._kept_rows import Chunk
from ._loss_options import number, shifted
from ._loss_parts import put
from ._loss_rows import Part, Terms, check_targets
from ._vjp import Args, Needs, custom_vjp
from ._vocab_parallel import Shard, alone, layout, shard_of, some, statistics, walk, whole
from .cross_entropy import KERNELS, PLAIN, Parts
from .linear_log_prob import LogProbAux, linear_log_prob

OP = "vocab_parallel_linear_log_prob"


class Residuals(NamedTuple):
    """What the backward of `vocab_parallel_linear_log_prob` needs: that of `linear_log_prob`, and the shard."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    stats: Tensor
    disorder: Tensor
    ignore_index: int
    softcap: float
    logit_scale: float
    temperature: float
    accumulate: str
    memory_budget: int
    group: str
    vocab_start: int
    vocab_size: int

    @property
    def terms(self) -> Terms:
        terms: Terms = linear_log_prob.residuals(*self[:-3]).terms
        return terms

    @property
    def shard(self) -> Shard:
        return Shard(*self[-3:])


# --- definition: the whole weight, of which this rank's rows are differentiable -----------------------------------------------------------


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, softcap: float, logit_scale: float,
    temperature: float, accumulate: str, memory_budget: int, group: str, vocab_start: int, vocab_size: int,
) -> Any:  # fmt: skip
    return linear_log_prob._reference(
        x, *whole(Shard(group, vocab_start, vocab_size), weight, bias), target, ignore_index, softcap, logit_scale, temperature,
        accumulate, memory_budget,
    )  # fmt: skip


# --- forward and backward -----------------------------------------------------------------------------------------------------------------


def _outputs(*args: Any, needs: Needs) -> Args:
    outputs: Args = linear_log_prob.outputs(*args[:-3], needs=needs)
    return outputs


def _gradients(res: Residuals, dy: Any, needs: Needs) -> tuple[Tensor | None, ...]:
    gradients: tuple[Tensor | None, ...] = linear_log_prob.gradients(linear_log_prob.residuals(*res[:-3]), dy, needs)
    return gradients


def _fwd(*args: Any, needs: Needs, parts: Parts) -> tuple[tuple[Tensor, ...], Residuals]:
    (x, weight, bias, target, ignore_index), shard = args[:5], Shard(*args[-3:])
    flat = target.reshape(-1)
    check_targets(OP, flat, ignore_index, shard.classes)
    if not shard.group:
        y, own = alone(linear_log_prob, parts).fwd(*args[:-3], needs=needs)
        return y, Residuals._make((*own, *shard))
    found = x.new_empty(4, len(flat), dtype=_check.wide_dtype(x))
    res = Residuals(x, weight, bias, target, found.new_empty(len(flat), 2), found[2], ignore_index, *args[5:])
    blank((found, res.stats.T), flat == ignore_index)
    terms, of = res.terms, layout(OP, shard, weight, Terms())

    def turn(a: Tensor, chunk: Chunk, part: Part | None, grad: bool) -> None:
        row = statistics(a, chunk.take(flat), ignore_index, terms, shard, of, parts.rows, aux=True)
        assert row.aux is not None  # as asked
        put(res.stats, chunk, row.stats)
        put(found.T, chunk, row.aux.T)

    walk(OP, _head(res), flat, ignore_index, turn, (False,) * 3, res.accumulate, res.memory_budget, shard, forward=True)
    return tuple(found[i].clone().view(target.shape) for i in (1, 0, 2)), res


def _head(res: Residuals) -> Head:
    return Head(res.x.reshape(-1, res.x.shape[-1]), res.weight, res.bias)


def _bwd(res: Residuals, dy: Args, needs: Needs, donate: bool, parts: Parts) -> tuple[Tensor | None, ...]:
    if not res.group:
        return alone(linear_log_prob, parts).bwd(linear_log_prob.residuals(*res[:-3]), dy, needs=needs, donate=donate)
    flat, terms, shard = res.target.reshape(-1), res.terms, res.shard
    d_log_prob, d_lse, d_entropy = (d.reshape(-1) for d in dy)
    scale, bend = -d_log_prob, torch.stack((d_lse - d_entropy * res.disorder, -d_entropy), 1)

    def turn(a: Tensor, chunk: Chunk, part: Part | None, grad: bool) -> None:
        parts.rows(
            a, chunk.take(flat), res.ignore_index, terms, stats=chunk.take(res.stats), grad=a, scale=some(scale, chunk),
            bend=chunk.take(bend), part=shard.within(part),
        )  # fmt: skip

    dx, *rest = walk(OP, _head(res), flat, res.ignore_index, turn, needs, res.accumulate, res.memory_budget, shard, forward=False)
    return None if dx is None else dx.view(res.x.shape), *rest


# --- public function ----------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(in_own_dtypes(partial(_fwd, parts=KERNELS)), in_own_dtypes(partial(_bwd, parts=KERNELS))),
    plain=(partial(_fwd, parts=PLAIN), partial(_bwd, parts=PLAIN)),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=linear_log_prob.cotangents,
    diff=3,
    n_out=3,
    shaped=lambda log_prob, lse, entropy: (log_prob, LogProbAux(lse, entropy)),
)
def vocab_parallel_linear_log_prob(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    shift: bool = False,
    accumulate: Accumulate = "auto",
    memory_budget: int | None = None,
) -> Args:
    r"""`linear_log_prob` where each rank of a process group has its own rows of the weight; every rank gets the same numbers.

    Args:
        x, weight, target, bias, group, vocab_start, vocab_size: as in `vocab_parallel_linear_cross_entropy`, and with the same duties: what
            is not a shard is the same on every rank, the cotangents too.
        ignore_index, softcap, logit_scale, temperature, shift, accumulate: as in `linear_log_prob`.
        memory_budget: as in `vocab_parallel_linear_cross_entropy`.

    Returns:
        `(log_prob, LogProbAux(lse, entropy))`, as `linear_log_prob` returns them: the same bits on every rank. Gradients of all three: x,
        complete and the same bits on every rank; weight and bias, this rank's rows.

    Raises:
        TypeError: as `linear_log_prob`; `group` is no process group that this rank is in.
        ValueError: as `linear_log_prob`; rows of weight beyond `vocab_size`; one of `vocab_start` and `vocab_size` without the other; on a
            CPU also shards that are not every class once. On a GPU such shards make all values and gradients NaN.
        torch.OutOfMemoryError: as `linear_cross_entropy`; the other ranks wait for this one. A smaller `memory_budget` must be that of all.

    Examples:
        >>> liger_fn.vocab_parallel_linear_log_prob(torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([3, -100]))[0]
        tensor([-2.0794,  0.0000])

    Source: Shoeybi et al. 2019, arXiv:1909.08053.
    """
    op = OP
    x, weight, bias, target = head_arguments(op, x, weight, bias, target)
    shard = shard_of(op, group, weight, vocab_start, vocab_size)
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
        *shard,
    )
