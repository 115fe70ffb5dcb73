r"""Linear distillation: how far a language model's head is from a teacher's, without the logits of either.

    a = x wᵀ + b        t = x_t w_tᵀ + b_t        loss = the divergence of softmax(a / T) from softmax(t / T), as in `_distill_rows`
    g = dloss/da        dx = g w                  dw = gᵀ x                                                    db = Σ_rows g

Only a chunk of each head's logits exists at a time (`_head`), and only rows whose target counts enter a product (`_kept_rows`). A reduced
loss has one cotangent, a factor: its gradients are made in forward while the logits are at hand (four products in all), and scaled in
backward. Losses by row have a cotangent each, known in backward only: there the logits are made again (six products), as they are on
request. The teacher is constant.

Residuals: the weight and the unscaled gradients; or what those are made from, and each row's statistics.
Source: Hinton et al. 2015, arXiv:1503.02531; for the divergences, see `_distill_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check, _memory
from ._backend import in_own_dtypes
from ._check import dense
from ._distill_kernel import kernel_rows
from ._distill_rows import DIVERGENCES, STATS, Distance, DistillRows, divergences, plain_rows
from ._head import FEW, Gradients, Head, budget, by_tokens, default_budget, late, lift, now, scaled
from ._kept_rows import Chunk, Kept, cut, kept
from ._loss_mean import Reduce, divisor_dtype, kernel_reduce, plain_reduce
from ._loss_options import REDUCTIONS, Reduction, items, number
from ._loss_rows import Part
from ._scale import kernel_scale, plain_scale
from ._vjp import Args, Needs, custom_vjp

Divergence = Literal["kl", "reverse_kl", "jsd", "tvd"]
Save = Literal["grads", "recompute"]
Accumulate = Literal["auto", "weight", "fp32"]
SAVE, ACCUMULATE = ("grads", "recompute"), ("auto", "weight", "fp32")
OP = "linear_distill"


class Parts(NamedTuple):
    """What differs between the backends: the rows, the loss of them all, and the scaling of a gradient that forward made."""

    rows: DistillRows
    reduce: Reduce
    scale: Callable[[Tensor, Tensor, Tensor], None]


KERNELS, PLAIN = Parts(kernel_rows, kernel_reduce, kernel_scale), Parts(plain_rows, plain_reduce, plain_scale)


class Residuals(NamedTuple):
    """What the backward of `linear_distill` needs: the gradients to scale, or the inputs to make them from."""

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


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, x_teacher: Tensor, weight_teacher: Tensor, bias_teacher: Tensor | None,
    target: Tensor | None, token_weight: Tensor | None, num_items: Tensor | None, divergence: str, beta: float, temperature: float,
    ignore_index: int, reduction: str, save: str, accumulate: str, memory_budget: int,
) -> Tensor:  # fmt: skip
    a, t = F.linear(_rows(x), weight, bias), F.linear(_rows(x_teacher), weight_teacher, bias_teacher)
    left_out = None if target is None else target.reshape(-1) == ignore_index
    each = divergences(a, t, None if left_out is None else ~left_out, Distance(divergence, beta, temperature))
    each = _weighted(each, token_weight, left_out)
    y, _ = plain_reduce(each, _shaped(each, x, target), ignore_index, reduction, None, _count(x, target, num_items, reduction))
    assert y is not None  # each is there
    return y


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _shaped(each: Tensor, x: Tensor, target: Tensor | None) -> Tensor:
    """A tensor of target's shape, where there is no target."""
    return each.view(x.shape[:-1]) if target is None else target


def _count(x: Tensor, target: Tensor | None, num_items: Tensor | None, reduction: str) -> Tensor | None:
    """What a mean divides by, unless that is to be counted in the targets."""
    if target is not None or num_items is not None or reduction != "mean":
        return num_items
    return torch.full((), prod(x.shape[:-1]), dtype=torch.int64, device=x.device)


def _lift(res: Residuals) -> Tensor:
    return lift(res.stats, 1.0 / res.temperature, res.token_weight)


def _weighted(each: Tensor, token_weight: Tensor | None, left_out: Tensor | None) -> Tensor:
    """Losses times the weights of their rows; that of a row which does not count may be anything."""
    if token_weight is None:
        return each
    each = each * token_weight.reshape(-1)
    return each if left_out is None else each.masked_fill(left_out, 0.0)


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


def _outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, x_teacher: Tensor, weight_teacher: Tensor, bias_teacher: Tensor | None,
    target: Tensor | None, token_weight: Tensor | None, num_items: Tensor | None, divergence: str, beta: float, temperature: float,
    ignore_index: int, reduction: str, save: str, accumulate: str, memory_budget: int, needs: Needs,
) -> Args:  # fmt: skip
    wide, shape = _check.wide_dtype(x), x.shape[:-1]
    y = x.new_empty(shape if reduction == "none" else (), dtype=wide)
    divisor = x.new_empty((), dtype=divisor_dtype(None, num_items)) if reduction == "mean" else None
    dx, *others = [t if t is not None and n and now(reduction, save) else None for t, n in zip((x, weight, bias), needs, strict=True)]
    # An unscaled sum over many tokens could overflow fp16.
    dweight, dbias = (None if t is None else dense(t, torch.float32 if t.dtype is torch.float16 else t.dtype) for t in others)
    return y, x.new_empty(prod(shape), STATS, dtype=wide), divisor, None if dx is None else dense(dx), dweight, dbias


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    like = (res.dx if now(res.reduction, res.save) else res.x), res.weight, res.bias
    return tuple(dense(t) if t is not None and n else None for t, n in zip(like, needs, strict=True))


def _fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, x_teacher: Tensor, weight_teacher: Tensor, bias_teacher: Tensor | None,
    target: Tensor | None, token_weight: Tensor | None, num_items: Tensor | None, divergence: str, beta: float, temperature: float,
    ignore_index: int, reduction: str, save: str, accumulate: str, memory_budget: int, needs: Needs, parts: Parts,
) -> tuple[Tensor, Residuals]:  # fmt: skip
    each = x.new_empty(prod(x.shape[:-1]), dtype=_check.wide_dtype(x))
    over = _shaped(each, x, target), ignore_index, reduction, None
    divisor = parts.reduce(None, *over, _count(x, target, num_items, reduction))[1]
    res = Residuals(
        x, weight, bias, x_teacher, weight_teacher, bias_teacher, target, token_weight, each.new_zeros(len(each), STATS), divisor,
        None, None, None, divergence, beta, temperature, ignore_index, reduction, save, accumulate, memory_budget,
    )  # fmt: skip
    scale = None if token_weight is None else token_weight.reshape(-1)
    if weight.dtype is torch.float16:
        scale = _lift(res) if scale is None else scale * _lift(res)
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
    """The gradients that `needs` names; and the divergences of all rows, into `loss`, in forward."""
    x, weight, bias, x_teacher, weight_teacher, bias_teacher, target = res[:7]
    assert x is not None  # forward has them, and a backward that comes here kept them
    assert x_teacher is not None
    assert weight_teacher is not None
    student, teacher = Head(_rows(x), weight, bias), Head(_rows(x_teacher), weight_teacher, bias_teacher)
    flat, distance = None if target is None else target.reshape(-1), Distance(res.divergence, res.beta, res.temperature)
    keep, rows, how = _settle(student, teacher, flat, res)
    if loss is not None and flat is not None and keep.index is not None:
        loss.masked_fill_(flat == res.ignore_index, 0.0)  # nobody else writes to these
    divisor = None if res.reduction != "mean" or (loss is not None and late(weight)) else res.divisor
    every = slice(0, weight.shape[0])

    def turn(buffer: Tensor, a: Tensor, chunk: Chunk, part: Part | None, grad: bool) -> None:
        t = teacher.logits(chunk.take(teacher.x), buffer, every)
        parts.rows(
            a, t, chunk.own(flat), res.ignore_index, distance, stats=_own(chunk, res.stats),
            loss=None if loss is None else _own(chunk, loss), grad=grad, scale=chunk.own(scale), divisor=divisor, index=chunk.index,
        )  # fmt: skip

    stored = torch.float32 if loss is not None and weight.dtype is torch.float16 else weight.dtype
    try:
        turns = partial(turn, weight_teacher.new_empty(min(rows, keep.count) * every.stop))
        if not any(needs):
            by_tokens(student, keep, rows, turns, None, grad=False)
            return None, None, None
        made = Gradients(student, needs, keep, sums=torch.float32 if how == "fp32" else stored, runs=keep.count > rows)
        by_tokens(student, keep, rows, turns, made, grad=True, sums=True)
        dx, dw, db = made.dx, made.dweight, made.dbias
        return None if dx is None else dx.view(x.shape), None if dw is None else dw.to(stored), None if db is None else db.to(stored)
    except torch.OutOfMemoryError as error:
        row = 2 * weight.shape[0] * weight.element_size()
        _memory.explain(error, _memory.Pass(OP, student, needs, loss is not None, how, min(rows, keep.count) * row, row, instead="weight"))
        raise


def _own(chunk: Chunk, t: Tensor) -> Tensor:
    """`Chunk.own`, also of one row: rows that are written are never one that stands for all."""
    return t if chunk.index is not None else t[chunk.at]


def _settle(student: Head, teacher: Head, target: Tensor | None, res: Residuals) -> tuple[Kept, int, str]:
    """The rows that count; how many of them are a chunk, whose logits of both heads fit the budget; how the weight's gradient is summed."""
    weight = student.weight
    some, size, logits = res.memory_budget or 2 * default_budget(weight), weight.element_size(), 2 * weight.shape[0]
    at_once = max(1, some // (size * logits))
    keep = Kept(student.x.shape[0], None) if target is None else kept(target, res.ignore_index, at_once)
    copies = 0 if keep.index is None else 2 * student.x.shape[1] + teacher.x.shape[1]
    rows = max(1, some // (size * (logits + copies)))
    chunks = len(cut(keep.count, rows))
    if chunks <= 1 or weight.dtype in (torch.float32, torch.float64):
        return keep, rows, "weight"
    return keep, rows, ("weight" if chunks <= FEW else "fp32") if res.accumulate == "auto" else res.accumulate


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool, parts: Parts) -> tuple[Tensor | None, ...]:
    if not now(res.reduction, res.save):
        weights = res.token_weight
        return _pass(res, needs, dy.reshape(-1) if weights is None else weights.reshape(-1) * dy.reshape(-1), parts)
    factor = dy / _lift(res).squeeze() if res.weight.dtype is torch.float16 else dy
    if late(res.weight) and res.divisor is not None and res.reduction == "mean":
        factor = factor / res.divisor
    return scaled(OP, (res.dx, res.dweight, res.dbias), res.weight.dtype, factor, needs, donate, parts.scale)


# --- public function --------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(in_own_dtypes(partial(_fwd, parts=KERNELS)), in_own_dtypes(partial(_bwd, parts=KERNELS))),
    plain=(partial(_fwd, parts=PLAIN), partial(_bwd, parts=PLAIN)),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: (res.x.shape[:-1] if res.reduction == "none" else (),),
    diff=3,
)
def linear_distill(
    x: Tensor,
    weight: Tensor,
    x_teacher: Tensor,
    weight_teacher: Tensor,
    target: Tensor | None = None,
    bias: Tensor | None = None,
    bias_teacher: Tensor | None = None,
    *,
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
    r"""The divergence of a student's head from a teacher's, in nats, without ever holding all the logits of either.

    With p = softmax((x weightᵀ + bias) / T) and q = softmax((x_teacher weight_teacherᵀ + bias_teacher) / T), for each row:

        kl = Σ q (log q − log p)                         jsd = β KL(q‖m) + (1 − β) KL(p‖m), m = β q + (1 − β) p
        reverse_kl = Σ p (log p − log q)                 tvd = ½ Σ |p − q|

    Nothing is multiplied by T²: do that to the loss where gradients are to keep their size while T grows.

    Args:
        x: `[..., H]`, the student's hidden states; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        weight: `[V, H]`, of x's dtype. bias: `[V]`, of x's dtype, or None.
        x_teacher: `[..., H']`, of the same rows; H' may be another size. weight_teacher: `[V, H']`. bias_teacher: `[V]`, or None.
            The three have no gradient. In another dtype than x's they are converted to it, a copy at each call.
        target: `[...]`, integers, of which only `ignore_index` matters: such a row has no loss and no gradient, and enters no matrix
            product (to count them, a GPU's host waits once for the work queued before, where the logits take several chunks). None: every
            row counts.
        divergence: which of the four.
        beta: β of "jsd", between 0 and 1 and neither; 0.5 makes it symmetric. The others do without.
        temperature: T, above 0.
        ignore_index: the target of rows that do not count.
        token_weight: `[...]`, multiplies each row's loss; a mean divides by what it would without.
        reduction: "mean" over the rows that count (0 when none does), "sum", or "none" for one loss each, whose gradients honour one
            cotangent each.
        num_items: what a mean divides by instead, a number or a 0-dimensional tensor: the rows of all micro-batches together.
        memory_budget: bytes of logits, both heads' together, that may exist at a time (at least one row's). None: of 1024 rows, or
            256 MiB where that is more. Less is slower once a chunk has few hundred rows.
        accumulate: how the chunks' shares of the weight's gradient are summed. "weight": in its dtype, one rounding a chunk. "fp32": in a
            buffer of 4 V H bytes. "auto": "weight" up to 16 chunks, "fp32" beyond. (`linear_cross_entropy`'s "exact" is not offered.) In
            float32 all are sums in float32; in float16 "weight" is "fp32" where forward makes the gradients.
        save: "grads" makes the gradients in forward, four matrix products in all, and holds them until backward. "recompute" holds
            nothing but 24 bytes a row, and makes the logits again in backward: six products. So does reduction="none".

    Under autocast, the heads take part in the dtype that a matrix product would take.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs): a scalar, or of x's shape without its last axis for "none". A logit of −inf is a
        probability of 0, and the loss is inf where its limit is. Gradients: x, weight and bias; what asks for none costs nothing.

    Raises:
        TypeError: a tensor is not of a float dtype, dtypes differ, target is not of an integer dtype.
        ValueError: a shape does not fit, devices differ, an unknown option, a number out of its range, the teacher or a weight of rows
            needs a gradient, `num_items` without a mean.
        torch.OutOfMemoryError: as `linear_cross_entropy`, with a note that names a smaller `memory_budget`.

    Examples:
        >>> teacher = torch.tensor([[2.0], [0.0]])
        >>> liger_fn.linear_distill(torch.ones(3, 4), torch.zeros(2, 4), torch.ones(3, 1), teacher)
        tensor(0.3278)

    Source: Hinton et al. 2015, arXiv:1503.02531 (kl); Agarwal et al. 2023, arXiv:2306.13649 (reverse_kl, jsd); Wen et al. 2023,
    arXiv:2307.15190 (tvd).
    """
    return _arguments(
        OP, x, weight, x_teacher, weight_teacher, target, bias, bias_teacher, divergence, beta, temperature, ignore_index,
        token_weight, reduction, num_items, memory_budget, accumulate, save,
    )  # fmt: skip


def _arguments(
    op: str, x: Tensor, weight: Tensor, x_teacher: Tensor, weight_teacher: Tensor, target: Tensor | None, bias: Tensor | None,
    bias_teacher: Tensor | None, divergence: str, beta: float, temperature: float, ignore_index: int, token_weight: Tensor | None,
    reduction: str, num_items: int | Tensor | None, memory_budget: int | None, accumulate: str, save: str,
) -> Args:  # fmt: skip
    """What `op` was called with, checked, flat."""
    x, weight, bias = _head(op, "", x, weight, bias)
    _check.no_grad_for(op, x_teacher=x_teacher, weight_teacher=weight_teacher, bias_teacher=bias_teacher)
    x_teacher, weight_teacher, bias_teacher = _head(op, "_teacher", x_teacher, weight_teacher, bias_teacher)
    shape, why = x.shape[:-1], "x without its last axis"
    if x_teacher.shape[:-1] != shape:
        raise ValueError(
            f"{op}: x_teacher must have the rows of x, [{', '.join(map(str, (*shape, 'H')))}] with any H, got {list(x_teacher.shape)}; "
            "both are hidden states of the same tokens"
        )
    if weight_teacher.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{op}: weight_teacher must have the {weight.shape[0]} rows of weight, one for each class, got {weight_teacher.shape[0]}; "
            "cut or pad one vocabulary to the other's"
        )
    if target is not None:
        target = _check.classes(op, target, shape, why)
    if token_weight is not None:
        _check.optional(op, token_weight=token_weight)
        _check.shape(op, "token_weight", token_weight, shape, why)
        _check.no_grad_for(op, token_weight=token_weight)
        token_weight = token_weight.to(_check.wide_dtype(x))
    _check.same_device(op, x, x_teacher=x_teacher, target=target, token_weight=token_weight)
    x_teacher, weight_teacher = x_teacher.to(x.dtype), weight_teacher.to(x.dtype)
    bias_teacher = None if bias_teacher is None else bias_teacher.to(x.dtype)
    _check.choice(op, "divergence", divergence, DIVERGENCES)
    beta = number(op, "beta", beta, "from 0 to 1")
    if beta in (0.0, 1.0):
        raise ValueError(
            f'{op}: beta must be between 0 and 1 and neither, got {beta!r}; for what jsd tends to there, use "kl" or "reverse_kl"'
        )
    temperature = number(op, "temperature", temperature, "above 0")
    _check.integer(op, "ignore_index", ignore_index)
    _check.choice(op, "reduction", reduction, REDUCTIONS)
    _check.choice(op, "save", save, SAVE)
    _check.choice(op, "accumulate", accumulate, ACCUMULATE)
    return (
        x, weight, bias, x_teacher, weight_teacher, bias_teacher, target, token_weight, items(op, num_items, reduction, x), divergence,
        beta, temperature, ignore_index, reduction, save, accumulate, budget(op, memory_budget),
    )  # fmt: skip


def _head(op: str, whose: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors of a head, checked, in the dtype that autocast wants; `whose` ends their names."""
    names = [f"{k}{whose}" for k in ("x", "weight", "bias")]
    _check.floating(op, **{names[0]: x, names[1]: weight})
    _check.optional(op, **{names[2]: bias})
    _check.rank(op, names[0], x, 1)
    h = x.shape[-1]
    _check.at_least_one(op, f"the last axis of {names[0]}", h)
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != h:
        raise ValueError(
            f"{op}: {names[1]} must be [V, {h}] (vocabulary, last axis of {names[0]}) with V at least 1, got {list(weight.shape)}"
        )
    if bias is not None:
        _check.shape(op, names[2], bias, weight.shape[:1], f"the first axis of {names[1]}")
    _check.same_device(op, x, **{names[1]: weight, names[2]: bias})
    x, weight, bias = _check.autocast(x), _check.autocast(weight), None if bias is None else _check.autocast(bias)
    _check.same_dtype(op, x, **{names[1]: weight, names[2]: bias})
    return x, weight, bias
