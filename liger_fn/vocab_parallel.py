r"""Linear cross entropy over a process group that has the vocabulary cut in shards: tensor parallel, no weight or logits gathered.

    a_r = x w_rᵀ + b_r        loss: as in `linear_cross_entropy`, of the logits of all ranks r together        g_r = dloss/da_r
    dx = Σ_r g_r w_r          dw_r = g_rᵀ x        db_r = Σ_rows g_r

All ranks have the same x and target, and each its own rows of the weight. Of a chunk's logits, [rows, V_r], 4 numbers a row are gathered,
of which `_vocab_parallel` makes the statistics of whole rows; dx is summed over the ranks in fp32, chunk by chunk, and rounded once. A rank
alone is `linear_cross_entropy`, bit for bit. Residuals: its own, and the shard.
Source: Shoeybi et al. 2019, arXiv:1909.08053, for the cross entropy of shards; Wijmans et al. 2024, arXiv:2411.09009, for the memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check
from ._backend import in_own_dtypes
from ._head import ACCUMULATE, Accumulate, Head, blank, budget, head_arguments, late, lift, now
from ._kept_rows import Chunk
from ._loss_options import REDUCTIONS, Reduction, class_weights, items, number, shifted, token_weights
from ._loss_parts import losses, put
from ._loss_rows import Part, Terms, check_targets
from ._vjp import Args, Needs, custom_vjp
from ._vocab_parallel import Shard, alone, layout, shard_of, some, statistics, walk, whole
from .cross_entropy import KERNELS, PLAIN, Parts, aux_of
from .linear_cross_entropy import SAVE, Save, _weighted, linear_cross_entropy

OP = "vocab_parallel_linear_cross_entropy"


class Residuals(NamedTuple):
    """What the backward of `vocab_parallel_linear_cross_entropy` needs: that of `linear_cross_entropy`, and the shard."""

    x: Tensor | None
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    class_weight: Tensor | None
    token_weight: Tensor | None
    stats: Tensor
    divisor: Tensor | None
    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    aux: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float
    temperature: float
    reduction: str
    save: str
    accumulate: str
    memory_budget: int
    group: str
    vocab_start: int
    vocab_size: int

    @property
    def terms(self) -> Terms:
        terms: Terms = linear_cross_entropy.residuals(*self[:-3]).terms
        return terms

    @property
    def shard(self) -> Shard:
        return Shard(*self[-3:])


# --- definition: the whole weight, of which this rank's rows are differentiable -----------------------------------------------------------


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, token_weight: Tensor | None,
    num_items: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, logit_scale: float,
    temperature: float, reduction: str, save: str, accumulate: str, return_aux: bool, memory_budget: int, group: str, vocab_start: int,
    vocab_size: int,
) -> Any:  # fmt: skip
    return linear_cross_entropy._reference(
        x, *whole(Shard(group, vocab_start, vocab_size), weight, bias), target, class_weight, token_weight, num_items, ignore_index,
        label_smoothing, z_loss, softcap, logit_scale, temperature, reduction, save, accumulate, return_aux, memory_budget,
    )  # fmt: skip


# --- forward and backward -----------------------------------------------------------------------------------------------------------------


def _outputs(*args: Any, needs: Needs) -> Args:
    outputs: Args = linear_cross_entropy.outputs(*args[:-3], needs=needs)
    return outputs


def _gradients(res: Residuals, dy: Any, needs: Needs) -> tuple[Tensor | None, ...]:
    gradients: tuple[Tensor | None, ...] = linear_cross_entropy.gradients(linear_cross_entropy.residuals(*res[:-3]), dy, needs)
    return gradients


def _fwd(*args: Any, needs: Needs, parts: Parts) -> tuple[Tensor, Residuals]:
    (x, weight, _, target, class_weight, token_weight, num_items), options, shard = args[:7], args[7:-3], Shard(*args[-3:])
    ignore_index, reduction, save, return_aux = options[0], options[6], options[7], options[9]
    flat = target.reshape(-1)
    check_targets(OP, flat, ignore_index, shard.classes)
    if not shard.group:
        y, own = alone(linear_cross_entropy, parts).fwd(*args[:-3], needs=needs)
        return y, Residuals._make((*own, *shard))
    divisor = parts.reduce(None, target, ignore_index, reduction, class_weight, num_items)[1]
    each = x.new_empty(len(flat), dtype=_check.wide_dtype(x))
    makes = any(needs) and now(reduction, save)
    made = (divisor, None, None, None, each.new_empty(4, len(flat)) if return_aux else None)
    res = Residuals._make((*args[:6], each.new_empty(len(flat), 2), *made, *options[:9], options[10], *shard))
    blank((each, res.stats.T, res.aux), flat == ignore_index)
    scale = None if token_weight is None else token_weight.reshape(-1)
    if makes and weight.dtype is torch.float16:
        larger = lift(res.stats, res.logit_scale / res.temperature, class_weight, token_weight)
        scale = larger if scale is None else scale * larger
    dx, dweight, dbias = _pass(res, needs if makes else (False,) * 3, scale, parts, each)
    y, _ = parts.reduce(_weighted(each, token_weight, flat, ignore_index), target, ignore_index, reduction, None, None, divisor)
    assert y is not None  # each is there
    return y, res._replace(x=None if now(reduction, save) else x, dx=dx, dweight=dweight, dbias=dbias)


def _pass(
    res: Residuals, needs: Needs, scale: Tensor | None, parts: Parts, loss: Tensor | None = None
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients that `needs` names; and the losses of all rows, into `loss`, in forward."""
    x, weight, bias, target = res[:4]
    assert x is not None  # forward has it, and a backward that comes here kept it
    flat, terms, shard, ignore_index = target.reshape(-1), res.terms, res.shard, res.ignore_index
    divisor = res.divisor if res.reduction == "mean" and not (loss is not None and late(weight)) else None
    of = None if loss is None else layout(OP, shard, weight, terms)

    def turn(a: Tensor, chunk: Chunk, part: Part | None, grad: bool) -> None:
        mine = chunk.take(flat)
        if loss is not None and of is not None and part is None:
            row = statistics(a, mine, ignore_index, terms, shard, of, parts.rows, aux=res.aux is not None)
            put(loss, chunk, losses(row, mine, ignore_index, terms, shard.classes))
            put(res.stats, chunk, row.stats)
            if res.aux is not None and row.aux is not None:
                put(res.aux.T, chunk, row.aux.T)
        if grad:
            parts.rows(
                a, mine, ignore_index, terms, stats=chunk.take(res.stats), grad=a, scale=some(scale, chunk), divisor=divisor,
                part=shard.within(part),
            )  # fmt: skip

    head = Head(x.reshape(-1, x.shape[-1]), weight, bias)
    made = walk(OP, head, flat, ignore_index, turn, needs, res.accumulate, res.memory_budget, shard, forward=loss is not None)
    return None if made[0] is None else made[0].view(x.shape), *made[1:]


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool, parts: Parts) -> tuple[Tensor | None, ...]:
    if not res.group or now(res.reduction, res.save):  # what forward made is complete
        return alone(linear_cross_entropy, parts).bwd(linear_cross_entropy.residuals(*res[:-3]), dy, needs=needs, donate=donate)
    weights = res.token_weight
    return _pass(res, needs, dy.reshape(-1) if weights is None else weights.reshape(-1) * dy.reshape(-1), parts)


def _aux(flat: Args, y: Tensor, rows: Tensor) -> Any:
    return y, aux_of(rows, flat[3], flat[7], flat[9])


# --- public function ----------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(in_own_dtypes(partial(_fwd, parts=KERNELS)), in_own_dtypes(partial(_bwd, parts=KERNELS))),
    plain=(partial(_fwd, parts=PLAIN), partial(_bwd, parts=PLAIN)),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=linear_cross_entropy.cotangents,
    diff=3,
    aux=_aux,
)
def vocab_parallel_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    class_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    shift: bool = False,
    return_aux: bool = False,
    save: Save = "grads",
    accumulate: Accumulate = "auto",
    memory_budget: int | None = None,
) -> Args:
    r"""`linear_cross_entropy` where each rank of a process group has its own rows of the weight; every rank gets the same loss.

    Each rank calls it with the same arguments but weight and bias, and asks for the same gradients: ranks wait for one another, and one
    that does not come is waited for. Ranks that do not agree on x or target get no error, and no meaningful number.

    Args:
        x: `[..., H]`, the same on every rank; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        weight: `[V_r, H]`, of x's dtype, this rank's rows.
        target: `[...]`, integers in [0, V), the number of a class among all, or `ignore_index` where a row does not count.
        bias: `[V_r]`, of x's dtype, or None; None on all ranks or on none.
        group: a `torch.distributed.ProcessGroup`; None for all ranks, or for a process alone, which has the whole vocabulary.
        vocab_start, vocab_size: this rank's classes are `[vocab_start, vocab_start + V_r)` of `vocab_size`. None for shards of one size in
            the order of the ranks.
        class_weight: `[V]`, of all classes. The others, and token_weight, are as in `linear_cross_entropy`.
        memory_budget: bytes of a rank's logits that may exist at a time, were all shards of one size. Each chunk costs a gather of 16 bytes
            a row and rank (32 with `return_aux`), and where x needs a gradient a sum over the ranks of 4 H bytes a row, while other work
            goes on.

    Returns:
        The loss, and with `return_aux` a `CrossEntropyAux`, as `linear_cross_entropy` returns them: the same bits on every rank. Gradients:
        x, complete and the same bits on every rank; weight and bias, this rank's rows. The cotangent must be the same on all ranks.

    Raises:
        TypeError: as `linear_cross_entropy`; `group` is no process group that this rank is in.
        ValueError: as `linear_cross_entropy`; rows of weight beyond `vocab_size`; one of `vocab_start` and `vocab_size` without the other;
            on a CPU also shards that are not every class once. On a GPU such shards make the loss and all gradients NaN.
        torch.OutOfMemoryError: as `linear_cross_entropy`; the other ranks wait for this one. A smaller `memory_budget` must be that of all.

    Examples:
        >>> liger_fn.vocab_parallel_linear_cross_entropy(torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([3, -100]))
        tensor(2.0794)

    Source: Shoeybi et al. 2019, arXiv:1909.08053.
    """
    op = OP
    x, weight, bias, target = head_arguments(op, x, weight, bias, target)
    shard = shard_of(op, group, weight, vocab_start, vocab_size)
    token_weight = token_weights(op, token_weight, target, x)
    _check.integer(op, "ignore_index", ignore_index)
    if shift:
        _check.rank(op, "x", x, 2)
        target, token_weight = shifted(target, ignore_index), None if token_weight is None else shifted(token_weight, 0.0)
    _check.choice(op, "reduction", reduction, REDUCTIONS)
    _check.choice(op, "save", save, SAVE)
    _check.choice(op, "accumulate", accumulate, ACCUMULATE)
    return (
        x,
        weight,
        bias,
        target,
        class_weights(op, "class_weight", class_weight, x, shard.classes, "the classes of all ranks"),
        token_weight,
        items(op, num_items, reduction, x),
        ignore_index,
        number(op, "label_smoothing", label_smoothing, "from 0 to 1"),
        number(op, "z_loss", z_loss, "at least 0"),
        0.0 if softcap is None else number(op, "softcap", softcap, "above 0"),
        number(op, "logit_scale", logit_scale, "above 0"),
        number(op, "temperature", temperature, "above 0"),
        reduction,
        save,
        accumulate,
        bool(return_aux),
        budget(op, memory_budget),
        *shard,
    )
