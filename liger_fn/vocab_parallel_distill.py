r"""Linear distillation over a process group that has both heads' vocabulary cut in shards: tensor parallel, no weight or logits gathered.

    a_r = x w_rᵀ + b_r        t_r = x_t w_trᵀ + b_tr        loss: as in `linear_distill`, of the logits of all ranks r together
    dx = Σ_r g_r w_r          dw_r = g_rᵀ x                 db_r = Σ_rows g_r                               g_r = dloss/da_r

Of a chunk of rows, each rank looks at its own columns twice, and what it finds is gathered: first the maxima m_r and sums of exp s_r of
both heads, then its share of the sums over classes that need those, D and Σ p f (`_distill_rows`). The whole row's are

    m = max_r m_r        s = Σ_r s_r exp((m_r − m) / T)        D = Σ_r D_r        Σ p f = Σ_r P_r (Σ_{j in r} p_j f_j / Σ_{j in r} p_j)

P_r is what rank r has of p, s_r exp((m_r − m) / T) / s. A sum of p f as it is would round at the size of f, and not of f − Σ p f.

Every rank makes the same numbers in the same order, so all have the same bits; dx is summed over the ranks in fp32, chunk by chunk, and
rounded once. A rank alone is `linear_distill`, bit for bit. Residuals: its own, and the shard.
Source: Shoeybi et al. 2019, arXiv:1909.08053, for the statistics of shards; Hinton et al. 2015, arXiv:1503.02531, for distillation.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check, _memory
from ._backend import in_own_dtypes
from ._distill_rows import STATS, Distance
from ._head import Gradients, Head, by_tokens, late, now
from ._kept_rows import Chunk
from ._launch import cdiv, has_fp64
from ._loss_options import Reduction
from ._loss_parts import put
from ._loss_rows import Part, Terms
from ._vjp import Args, Needs, Pair, custom_vjp
from ._vocab_parallel import Shard, Summed, layout, shard_of, some, whole
from .linear_distill import (
    KERNELS,
    PLAIN,
    Accumulate,
    Divergence,
    Parts,
    Save,
    _arguments,
    _count,
    _lift,
    _rows,
    _settle,
    _shaped,
    _weighted,
    linear_distill,
)

OP = "vocab_parallel_linear_distill"


class Residuals(NamedTuple):
    """What the backward of `vocab_parallel_linear_distill` needs: that of `linear_distill`, and the shard."""

    x: Tensor | None
    weight: Tensor
    bias: Tensor | None
    x_teacher: Tensor | None
    weight_teacher: Tensor | None
    bias_teacher: Tensor | None
    target: Tensor | None
    token_weight: Tensor | None
    stats: Tensor
    divisor: Tensor | None
    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    divergence: str
    beta: float
    temperature: float
    ignore_index: int
    reduction: str
    save: str
    accumulate: str
    memory_budget: int
    group: str
    vocab_start: int
    vocab_size: int

    @property
    def own(self) -> Any:
        """Those of `linear_distill`."""
        return linear_distill.residuals(*self[:-3])

    @property
    def shard(self) -> Shard:
        return Shard(*self[-3:])


# --- definition: the whole weights, of which this rank's rows are differentiable ----------------------------------------------------------


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, x_teacher: Tensor, weight_teacher: Tensor, bias_teacher: Tensor | None,
    target: Tensor | None, token_weight: Tensor | None, num_items: Tensor | None, divergence: str, beta: float, temperature: float,
    ignore_index: int, reduction: str, save: str, accumulate: str, memory_budget: int, group: str, vocab_start: int, vocab_size: int,
) -> Any:  # fmt: skip
    shard = Shard(group, vocab_start, vocab_size)
    return linear_distill._reference(
        x, *whole(shard, weight, bias), x_teacher, *whole(shard, weight_teacher, bias_teacher), target, token_weight, num_items, divergence,
        beta, temperature, ignore_index, reduction, save, accumulate, memory_budget,
    )  # fmt: skip


# --- whole rows from the shards' ----------------------------------------------------------------------------------------------------------


def _tops(shard: Shard, mine: Tensor, temperature: float, sound: Tensor | None) -> tuple[Tensor, Tensor]:
    """The first four of `STATS` of whole rows, from those of these columns; and what each rank has of p, `[ranks, n]`.

    Where it is not `sound`, the sums of exp are NaN.
    """
    tops, sums = _sent(shard, mine).unflatten(-1, (2, 2)).unbind(-1)
    top = tops.amax(0)
    fall = torch.where(tops == top, 0.0, tops - top)
    sums = sums * torch.exp(fall / temperature)
    total = sums.sum(0)
    if sound is not None:
        total = total.where(sound, torch.nan)
    return torch.stack((top, total), -1).flatten(1), (sums[..., 0] / total[:, 0]).clamp(min=torch.finfo(sums.dtype).tiny)


def _sums(shard: Shard, mine: Tensor, shares: Tensor, tvd: bool) -> Tensor:
    """`[n, 3]`, of whole rows from what "sums" made of these columns: the loss, and the last two of `STATS`."""
    loss, mean, rest = _sent(shard, mine).unbind(-1)
    if tvd:
        return torch.stack((loss.sum(0), (shares * mean).sum(0), (shares * rest).sum(0)), -1)
    mean = (shares * (mean + rest)).sum(0)
    first = mean.to(mine.dtype)
    return torch.stack((loss.sum(0), mean, torch.where(first.isinf(), 0.0, mean - first)), -1)


def _sent(shard: Shard, mine: Tensor) -> Tensor:
    """By every rank, in fp64 where the device has it."""
    return shard.gather(mine).double() if has_fp64(mine.device) else shard.gather(mine)


# --- forward and backward -----------------------------------------------------------------------------------------------------------------


def _outputs(*args: Any, needs: Needs) -> Args:
    outputs: Args = linear_distill.outputs(*args[:-3], needs=needs)
    return outputs


def _gradients(res: Residuals, dy: Any, needs: Needs) -> tuple[Tensor | None, ...]:
    gradients: tuple[Tensor | None, ...] = linear_distill.gradients(res.own, dy, needs)
    return gradients


def _alone(parts: Parts) -> Pair:
    pair: Pair = linear_distill.pairs["reference" if parts is PLAIN else "triton"]
    return pair


def _fwd(*args: Any, needs: Needs, parts: Parts) -> tuple[Tensor, Residuals]:
    (x, weight), (target, token_weight, num_items), options, shard = args[:2], args[6:9], args[9:-3], Shard(*args[-3:])
    if not shard.group:
        y, own = _alone(parts).fwd(*args[:-3], needs=needs)
        return y, Residuals._make((*own, *shard))
    ignore_index, reduction, save = options[3:6]
    each = x.new_empty(x.shape[:-1].numel(), dtype=_check.wide_dtype(x))
    over = _shaped(each, x, target), ignore_index, reduction, None
    divisor = parts.reduce(None, *over, _count(x, target, num_items, reduction))[1]
    res = Residuals._make((*args[:8], each.new_zeros(len(each), STATS), divisor, None, None, None, *options, *shard))
    scale = None if token_weight is None else token_weight.reshape(-1)
    if weight.dtype is torch.float16:
        scale = _lift(res.own) if scale is None else scale * _lift(res.own)
    makes = now(reduction, save)
    dx, dweight, dbias = _pass(res, needs if makes else (False,) * 3, scale, parts, each)
    left_out = None if target is None or token_weight is None else target.reshape(-1) == ignore_index
    y, _ = parts.reduce(_weighted(each, token_weight, left_out), *over, None, divisor)
    assert y is not None  # each is there
    if makes:
        res = res._replace(x=None, x_teacher=None, weight_teacher=None, bias_teacher=None)
    return y, res._replace(dx=dx, dweight=dweight, dbias=dbias)


def _pass(
    res: Residuals, needs: Needs, scale: Tensor | None, parts: Parts, loss: Tensor | None = None
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients that `needs` names; and the divergences of all rows, into `loss`, in forward.

    Every rank must take the same chunks, whatever its own share of the classes: they are those that equal shards would have.
    """
    x, weight, bias, x_teacher, weight_teacher, bias_teacher, target = res[:7]
    assert x is not None and x_teacher is not None and weight_teacher is not None  # noqa: PT018  forward has them, or kept them for backward
    student, teacher = Head(_rows(x), weight, bias), Head(_rows(x_teacher), weight_teacher, bias_teacher)
    flat, distance, shard = None if target is None else target.reshape(-1), Distance(*res[13:16]), res.shard
    share = cdiv(shard.classes, shard.members.size())
    even = [Head(h.x, torch.empty(share, h.weight.shape[1], dtype=weight.dtype, device="meta")) for h in (student, teacher)]
    keep, rows, how = _settle(even[0], even[1], flat, res.own)
    if loss is not None and flat is not None and keep.index is not None:
        loss.masked_fill_(flat == res.ignore_index, 0.0)  # nobody else writes to these
    divisor = None if res.reduction != "mean" or (loss is not None and late(weight)) else res.divisor
    sound = None if loss is None else layout(OP, shard, weight, Terms()).sound
    every = slice(0, weight.shape[0])

    def turn(buffer: Tensor, dx: Summed | None, a: Tensor, chunk: Chunk, part: Part | None, grad: bool) -> None:
        t = teacher.logits(chunk.take(teacher.x), buffer, every)
        look = partial(parts.rows, a, t, some(flat, chunk), res.ignore_index, distance, scale=some(scale, chunk), divisor=divisor)
        at_once = grad and loss is not None and distance.name == "kl"  # whose gradient needs no second sum
        if loss is not None:
            mine = res.stats.new_empty(len(a), STATS)
            each = mine.new_empty(len(a))
            look(stats=mine, step="tops")
            mine[:, :4], shares = _tops(shard, mine[:, :4].contiguous(), distance.temperature, sound)
            look(stats=mine, loss=each, grad=at_once, step="sums")
            row = _sums(shard, torch.cat((each.unsqueeze(-1), mine[:, 4:]), 1), shares, distance.name == "tvd")
            mine[:, 4:] = row[:, 1:]
            put(loss, chunk, row[:, 0])
            put(res.stats, chunk, mine)
        if grad and not at_once:
            look(stats=chunk.take(res.stats), grad=True)
        if grad and dx is not None:
            dx.add(chunk, a)

    stored = torch.float32 if loss is not None and weight.dtype is torch.float16 else weight.dtype
    try:
        runs, buffer = keep.count > rows, weight_teacher.new_empty(min(rows, keep.count) * every.stop)
        if not any(needs):
            by_tokens(student, keep, rows, partial(turn, buffer, None), None, grad=False)
            return None, None, None
        dx = Summed(student, keep, shard, runs) if needs[0] else None
        made = Gradients(student, (False, *needs[1:]), keep, sums=torch.float32 if how == "fp32" else stored, runs=runs)
        by_tokens(student, keep, rows, partial(turn, buffer, dx), made, grad=True, sums=True)
        if dx is not None:
            dx.finish()
        dw, db = made.dweight, made.dbias
        return None if dx is None else dx.dx.view(x.shape), None if dw is None else dw.to(stored), None if db is None else db.to(stored)
    except torch.OutOfMemoryError as error:
        row = 2 * share * weight.element_size()
        held = min(rows, keep.count) * row
        _memory.explain(error, _memory.Pass(OP, student, needs, loss is not None, how, held, row, instead="weight", ranks=True))
        raise


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool, parts: Parts) -> tuple[Tensor | None, ...]:
    if not res.group or now(res.reduction, res.save):  # what forward made is complete
        return _alone(parts).bwd(res.own, dy, needs=needs, donate=donate)
    weights = res.token_weight
    return _pass(res, needs, dy.reshape(-1) if weights is None else weights.reshape(-1) * dy.reshape(-1), parts)


# --- public function ----------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(in_own_dtypes(partial(_fwd, parts=KERNELS)), in_own_dtypes(partial(_bwd, parts=KERNELS))),
    plain=(partial(_fwd, parts=PLAIN), partial(_bwd, parts=PLAIN)),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=linear_distill.cotangents,
    diff=3,
)
def vocab_parallel_linear_distill(
    x: Tensor,
    weight: Tensor,
    x_teacher: Tensor,
    weight_teacher: Tensor,
    target: Tensor | None = None,
    bias: Tensor | None = None,
    bias_teacher: Tensor | None = None,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    divergence: Divergence = "kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    memory_budget: int | None = None,
    accumulate: Accumulate = "auto",
    save: Save = "grads",
) -> Args:
    r"""`linear_distill` where each rank of a process group has its own rows of both weights; every rank gets the same loss.

    Each rank calls it with the same arguments but weights and biases, and asks for the same gradients: ranks wait for one another, and one
    that does not come is waited for. Ranks that do not agree on x, x_teacher or target get no error, and no meaningful number.

    Args:
        x: `[..., H]`, the same on every rank; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        weight: `[V_r, H]`, of x's dtype, this rank's rows. bias: `[V_r]`, or None; None on all ranks or on none.
        x_teacher: `[..., H']`, the same on every rank. weight_teacher: `[V_r, H']`, of the same classes. bias_teacher: `[V_r]`, or None.
        group: a `torch.distributed.ProcessGroup`; None for all ranks, or for a process alone, which has the whole vocabulary.
        vocab_start, vocab_size: this rank's classes are `[vocab_start, vocab_start + V_r)` of `vocab_size`. None for shards of one size in
            the order of the ranks.
        target, divergence, beta, temperature, ignore_index, token_weight, reduction, num_items, accumulate, save: as in `linear_distill`,
            and the same on every rank.
        memory_budget: bytes of a rank's logits of both heads that may exist at a time, were all shards of one size. Each chunk costs two
            gathers, of 28 bytes (fp64: 56) a row and rank, and where x needs a gradient a sum over the ranks of 4 H bytes a row, while
            other work goes on.

    Returns:
        The loss, as `linear_distill` returns it: the same bits on every rank. Gradients: x, complete and the same bits on every rank;
        weight and bias, this rank's rows. The cotangent must be the same on all ranks.

    Raises:
        TypeError: as `linear_distill`; `group` is no process group that this rank is in.
        ValueError: as `linear_distill`; rows of weight beyond `vocab_size`; one of `vocab_start` and `vocab_size` without the other; on a
            CPU also shards that are not every class once. On a GPU such shards make the loss and all gradients NaN.
        torch.OutOfMemoryError: as `linear_cross_entropy`; the other ranks wait for this one. A smaller `memory_budget` must be that of all.

    Examples:
        >>> teacher = torch.tensor([[2.0], [0.0]])
        >>> liger_fn.vocab_parallel_linear_distill(torch.ones(3, 4), torch.zeros(2, 4), torch.ones(3, 1), teacher)
        tensor(0.3278)

    Source: Shoeybi et al. 2019, arXiv:1909.08053; for the divergences, see `linear_distill`.
    """
    flat = _arguments(
        OP, x, weight, x_teacher, weight_teacher, target, bias, bias_teacher, divergence, beta, temperature, ignore_index, token_weight,
        reduction, num_items, memory_budget, accumulate, save,
    )  # fmt: skip
    return *flat, *shard_of(OP, group, flat[1], vocab_start, vocab_size)
