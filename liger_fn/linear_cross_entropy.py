r"""Linear cross entropy: the loss of a language model's head, without its logits.

    a = x wᵀ + b                  loss = the cross entropy of a, as in `_loss_rows`                  g = dloss/da
    dx = g w                      dw = gᵀ x                                                          db = Σ_rows g

Only a chunk of the logits exists at a time (`_head`), and only rows whose target counts enter a product (`_kept_rows`). A reduced loss has
one cotangent, a factor: its gradients are made in forward while the logits are at hand (three products in all), and scaled in backward.
Per-token losses have a cotangent each, known in backward only: there the logits are made again (four products), as they are on request.

Residuals: the weight and the unscaled gradients; or what those are made from, and each row's statistics.
Source: chunks of tokens as in github.com/mgmalek/efficient_cross_entropy; Wijmans et al. 2024, arXiv:2411.09009, for the memory at stake.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._backend import in_own_dtypes
from ._check import dense
from ._head import ACCUMULATE, Accumulate, Fused, Head, Rows, budget, head_arguments, late, lift, now, scaled, walk
from ._head_kernels import fits
from ._kept_rows import Chunk, Kept
from ._loss_mean import divisor_dtype, plain_reduce
from ._loss_options import REDUCTIONS, Reduction, class_weights, items, number, shifted, token_weights
from ._loss_rows import Part, Terms, check_targets, losses, plain_rows, valid
from ._vjp import Args, Needs, custom_vjp
from .cross_entropy import KERNELS, PLAIN, CrossEntropyAux, Parts, aux_of

Save = Literal["grads", "recompute"]
SAVE = ("grads", "recompute")
OP = "linear_cross_entropy"


class Residuals(NamedTuple):
    """What the backward of `linear_cross_entropy` needs: the gradients to scale, or the inputs to make them from."""

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

    @property
    def terms(self) -> Terms:
        return Terms(self.class_weight, self.label_smoothing, self.z_loss, self.softcap, self.logit_scale, 1.0 / self.temperature)


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, token_weight: Tensor | None,
    num_items: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, logit_scale: float,
    temperature: float, reduction: str, save: str, accumulate: str, return_aux: bool, memory_budget: int,
) -> Any:  # fmt: skip
    flat, terms = target.reshape(-1), Terms(class_weight, label_smoothing, z_loss, softcap, logit_scale, 1.0 / temperature)
    logits = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    each = _weighted(losses(logits, flat, ignore_index, terms), token_weight, flat, ignore_index)
    y, _ = plain_reduce(each, target, ignore_index, reduction, class_weight, num_items)
    if not return_aux:
        return y
    aux = each.new_empty(4, len(flat))
    plain_rows(
        logits.detach(), flat, ignore_index, terms._replace(weight=None, smoothing=0.0, z=0.0), stats=aux.new_empty(len(flat), 2),
        loss=torch.empty_like(aux[0]), aux=aux,
    )  # fmt: skip
    return y, aux


def _weighted(each: Tensor, token_weight: Tensor | None, target: Tensor, ignore_index: int) -> Tensor:
    """Losses times the weights of their tokens; that of a token which does not count may be anything."""
    return each if token_weight is None else (each * token_weight.reshape(-1)).masked_fill(target == ignore_index, 0.0)


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


def _storage(t: Tensor) -> torch.dtype:
    """The dtype that an unscaled gradient is kept in: its own, but fp32 for fp16, which a sum over many tokens could overflow."""
    return torch.float32 if t.dtype is torch.float16 else t.dtype


def _lift(res: Residuals) -> Tensor:
    return lift(res.stats, res.logit_scale / res.temperature, res.class_weight, res.token_weight)


def _outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, token_weight: Tensor | None,
    num_items: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, logit_scale: float,
    temperature: float, reduction: str, save: str, accumulate: str, return_aux: bool, memory_budget: int, needs: Needs,
) -> Args:  # fmt: skip
    wide = _check.wide_dtype(x)
    y = x.new_empty(target.shape if reduction == "none" else (), dtype=wide)
    divisor = target.new_empty((), dtype=divisor_dtype(class_weight, num_items)) if reduction == "mean" else None
    made = [t if t is not None and n and now(reduction, save) else None for t, n in zip((x, weight, bias), needs, strict=True)]
    dx, dweight, dbias = (t if t is None else t.new_empty(t.shape, dtype=_storage(t) if i else t.dtype) for i, t in enumerate(made))
    aux = x.new_empty(4, target.numel(), dtype=wide) if return_aux else None
    return y, x.new_empty(target.numel(), 2, dtype=wide), divisor, dx, dweight, dbias, aux


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    like = (res.dx if now(res.reduction, res.save) else res.x), res.weight, res.bias
    return tuple(dense(t) if t is not None and n else None for t, n in zip(like, needs, strict=True))


def _fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, token_weight: Tensor | None,
    num_items: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, logit_scale: float,
    temperature: float, reduction: str, save: str, accumulate: str, return_aux: bool, memory_budget: int, needs: Needs, parts: Parts,
) -> tuple[Tensor, Residuals]:  # fmt: skip
    flat = target.reshape(-1)
    check_targets(OP, flat, ignore_index, weight.shape[0])
    divisor = parts.reduce(None, target, ignore_index, reduction, class_weight, num_items)[1]
    each = x.new_empty(len(flat), dtype=_check.wide_dtype(x))
    makes = any(needs) and now(reduction, save)
    res = Residuals(
        x, weight, bias, target, class_weight, token_weight, each.new_empty(len(flat), 2), divisor, None, None, None,
        each.new_empty(4, len(flat)) if return_aux else None, ignore_index, label_smoothing, z_loss, softcap, logit_scale, temperature,
        reduction, save, accumulate, memory_budget,
    )  # fmt: skip
    scale = None if token_weight is None else token_weight.reshape(-1)
    if makes and weight.dtype is torch.float16:
        scale = _lift(res) if scale is None else scale * _lift(res)
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
    flat, terms = target.reshape(-1), res.terms
    divisor = None if res.reduction != "mean" or (loss is not None and late(weight)) else res.divisor
    aux = None if res.aux is None or loss is None else res.aux.T

    def turn(a: Tensor, chunk: Chunk, part: Part | None, grad: bool) -> None:
        reads = loss is not None and part is None
        seen = chunk.own(aux) if reads else None
        parts.rows(
            a, chunk.own(flat), res.ignore_index, terms, stats=chunk.own(res.stats), loss=chunk.own(loss) if reads else None,
            aux=None if seen is None else seen.T, grad=a if grad else None, scale=chunk.own(scale), divisor=divisor, index=chunk.index,
            part=part,
        )  # fmt: skip

    head = Head(x.reshape(-1, x.shape[-1]), weight, bias)
    dx, dweight, dbias = walk(
        OP, head, flat, res.ignore_index, turn, needs, res.accumulate, res.memory_budget, forward=loss is not None,
        fused=None if loss is None or parts is not KERNELS else _fused(res, head, flat, scale, divisor, loss),
        found=() if loss is None else (loss, res.stats.T, res.aux),
    )  # fmt: skip
    return None if dx is None else dx.view(x.shape), dweight, dbias


def _fused(res: Residuals, head: Head, target: Tensor, scale: Tensor | None, divisor: Tensor | None, loss: Tensor) -> Fused | None:
    """What the fused kernels take, where they can do what is asked."""
    if res.label_smoothing or res.softcap or head.bias is not None or res.aux is not None or not fits(head.x, head.weight):
        return None
    weight, v, ceiling = res.class_weight, head.weight.shape[0], res.logit_scale / res.temperature

    def of(keep: Kept, t: Tensor) -> Tensor:
        return Chunk(slice(0, keep.count), keep.index).take(t)

    def mass(keep: Kept) -> Tensor | float:
        return 1.0 if weight is None else weight.float()[of(keep, target).clamp(0, v - 1)]

    def losses(keep: Kept, rows: Rows) -> None:
        stats, log_prob = rows
        each = torch.where(of(keep, target) == res.ignore_index, 0.0, res.z_loss * stats.sum(1).square() - mass(keep) * log_prob)
        for whole, some in ((loss, each), (res.stats, stats)):
            if keep.index is None:
                whole.copy_(some)
            else:
                whole.index_copy_(0, keep.index, some)

    def known(keep: Kept) -> Rows | None:
        return None if res.z_loss or weight is not None else (of(keep, res.stats), -of(keep, loss))

    def factors(keep: Kept, rows: Rows) -> tuple[Tensor, Tensor | None]:
        counted, wrong, _ = valid(of(keep, target), res.ignore_index, v)
        chain = ceiling * counted if scale is None else ceiling * (scale if scale.numel() == 1 else of(keep, scale))
        chain = chain if divisor is None else chain / divisor
        chain = chain.masked_fill(wrong, torch.nan).masked_fill(~counted, 0.0)
        return chain * mass(keep), chain * (2.0 * res.z_loss * rows[0].sum(1)) if res.z_loss else None

    return Fused(target.contiguous(), res.ignore_index, ceiling, losses, known, factors)


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool, parts: Parts) -> tuple[Tensor | None, ...]:
    if not now(res.reduction, res.save):
        weights = res.token_weight
        scale = dy.reshape(-1) if weights is None else weights.reshape(-1) * dy.reshape(-1)
        return _pass(res, needs, scale, parts)
    factor = dy / _lift(res).squeeze() if res.weight.dtype is torch.float16 else dy
    if late(res.weight) and res.divisor is not None and res.reduction == "mean":
        factor = factor / res.divisor
    return scaled(OP, (res.dx, res.dweight, res.dbias), res.weight.dtype, factor, needs, donate, parts.scale)


def _aux(flat: Args, y: Tensor, rows: Tensor) -> tuple[Tensor, CrossEntropyAux]:
    return y, aux_of(rows, flat[3], flat[7], flat[9])


# --- public function --------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(in_own_dtypes(partial(_fwd, parts=KERNELS)), in_own_dtypes(partial(_bwd, parts=KERNELS))),
    plain=(partial(_fwd, parts=PLAIN), partial(_bwd, parts=PLAIN)),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: (res.target.shape if res.reduction == "none" else (),),
    diff=3,
    aux=_aux,
)
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
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
    r"""`cross_entropy(x weightᵀ + bias, target)`, in nats, without ever holding all the logits.

    Args:
        x: `[..., H]`; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        weight: `[V, H]`, of x's dtype. target: `[...]`, integers in [0, V), or `ignore_index` where a row does not count. Such rows enter
            no matrix product: to count them, a GPU's host waits for the work queued before, once a pass, where there are several chunks.
        bias: `[V]`, of x's dtype, or None.
        class_weight: `[V]`, a weight for each class, as in `torch.nn.functional.cross_entropy`; a mean divides by those of the targets.
        token_weight: `[...]`, multiplies each row's loss; a mean divides by what it would without.
        ignore_index: the target of rows that have no loss and no gradient.
        label_smoothing: the part of the target's probability, 0 to 1, that is spread over all classes.
        z_loss: adds `z_loss · lse²` to each row's loss.
        softcap, logit_scale, temperature: the logits are `softcap · tanh(logit_scale · logits / softcap) / temperature`; without a cap,
            `logit_scale · logits / temperature`.
        reduction: "mean" over the rows that count (0 when none does), "sum", or "none" for one loss each, whose gradients honour one
            cotangent each.
        num_items: what a mean divides by instead, a number or a 0-dimensional tensor: the rows of all micro-batches together.
        shift: target and token_weight belong to the tokens that x was made of: each row's is the next one along the last axis, and the
            last row has none.
        return_aux: return `(loss, CrossEntropyAux)`: lse, log_prob, z_loss, entropy, correct and num_valid, from the same reading of the
            logits. They have no derivative.
        save: "grads" makes the gradients in forward, three matrix products in all, and holds them until backward. "recompute" holds
            nothing but 8 bytes a row, and makes the logits again in backward: four products (five for "exact" where dx is over 256 MiB in
            16 bits). So does reduction="none".
        accumulate: how the chunks' shares of the weight's gradient are summed. "weight": in its dtype, fastest, one rounding a chunk.
            "fp32": in a buffer of 4 V H bytes. "exact": slice by slice of the vocabulary, each summed in fp32 over all tokens and
            rounded once, for a fourth product; beside the logits it takes 4 N H bytes for dx, up to 512 MiB, and leaves them less where
            that would be more together. "auto": "weight" up to 16 chunks; beyond, "fp32" from 4 H rows on, where its buffer is half of
            the logits in 16 bits or less (with a `memory_budget`, where it fits that), and "exact" for fewer. In float32 all are sums in
            float32; in float16 what forward makes is fp32.
        memory_budget: bytes of logits that may exist at a time (at least one row's). None: of 1024 rows, or 128 MiB where that is more;
            of 2048 rows in 512 MiB where "auto" takes "weight", whose every chunk reads and writes the weight's gradient; for "fp32", as
            much as that gradient itself where that is more. Less is slower once a chunk has few hundred rows.

    Under autocast, x, weight and bias take part in the dtype that a matrix product would take.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs): a scalar, or of target's shape for "none". Gradients: x, weight and bias; what asks for none
        costs nothing.

    Raises:
        TypeError: a tensor is not of a float dtype, dtypes differ, target is not of an integer dtype.
        ValueError: a shape does not fit, devices differ, an unknown option, a number out of its range, a weight of classes or tokens needs
            a gradient, `num_items` without a mean; on a CPU also a target outside [0, V). On a GPU such a row's loss and gradient are NaN.
        torch.OutOfMemoryError: PyTorch's own, with a note on what was held and the `memory_budget` or other option that takes less.
            Nothing is lost: no input or gradient has been written to.

    Examples:
        >>> liger_fn.linear_cross_entropy(torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([3, -100]))
        tensor(2.0794)

    Source: Wijmans et al. 2024, arXiv:2411.09009, for the memory at stake; chunks of tokens as in efficient_cross_entropy (M. Malek).
    """
    op = OP
    x, weight, bias, target = head_arguments(op, x, weight, bias, target)
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
        class_weights(op, "class_weight", class_weight, x, weight.shape[0], "the first axis of weight"),
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
    )
