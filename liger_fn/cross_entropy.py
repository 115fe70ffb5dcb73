r"""Cross entropy of logits against class indices.

    lse = log Σ_j exp(a_j)        loss = lse − a_y        da_j = dloss (exp(a_j − lse) − [j = y])

over the rows whose target is not ignored, with class weights, label smoothing, z-loss and a soft cap as `_loss_rows` says; a mean divides
by their number, by the sum of their weights, or by `num_items`. Residuals: logits, target, weight, the two parts of lse in fp32 (see
`_loss_rows`), the divisor. Source: Milakov & Gimelshein 2018, arXiv:1805.02867 (softmax in one pass).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check
from ._check import dense
from ._loss_kernel import kernel_rows
from ._loss_mean import Reduce, divisor_dtype, kernel_reduce, plain_reduce
from ._loss_options import REDUCTIONS, Reduction, class_weights, items, number
from ._loss_rows import Rows, Terms, check_targets, losses, plain_rows
from ._scale import kernel_scale, plain_scale
from ._vjp import Args, Needs, custom_vjp


class Parts(NamedTuple):
    """What differs between the backends: the rows, the loss of them all, and the scaling of a gradient that forward made."""

    rows: Rows
    reduce: Reduce
    scale: Callable[[Tensor, Tensor, Tensor], None]


KERNELS, PLAIN = Parts(kernel_rows, kernel_reduce, kernel_scale), Parts(plain_rows, plain_reduce, plain_scale)


class Residuals(NamedTuple):
    """What the backward of `cross_entropy` needs."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    stats: Tensor
    divisor: Tensor | None
    aux: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    reduction: str
    donate: bool


class CrossEntropyAux(NamedTuple):
    """What else a cross entropy knows of each row, of target's shape and without a derivative; 0 (False) where a row does not count."""

    lse: Tensor  # log Σ_j exp(logits_j), of the capped logits under a soft cap
    log_prob: Tensor  # of the target, natural logarithm
    z_loss: Tensor  # the part of the row's loss that is z_loss · lse²
    entropy: Tensor  # −Σ_j p_j log p_j, in nats
    correct: Tensor  # bool: no logit is larger than the target's
    num_valid: Tensor  # int64, of no axes: how many rows count


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(
    logits: Tensor, target: Tensor, weight: Tensor | None, num_items: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, reduction: str, return_aux: bool, donate: bool,
) -> Any:  # fmt: skip
    flat = target.reshape(-1)
    each = losses(logits.reshape(-1, logits.shape[-1]), flat, ignore_index, Terms(weight, label_smoothing, z_loss, softcap))
    y, _ = plain_reduce(each, target, ignore_index, reduction, weight, num_items)
    if not return_aux:
        return y
    aux = each.new_empty(4, len(flat))
    plain_rows(
        logits.detach().reshape(-1, logits.shape[-1]), flat, ignore_index, Terms(None, 0.0, 0.0, softcap),
        stats=aux.new_empty(len(flat), 2), loss=torch.empty_like(aux[0]), aux=aux,
    )  # fmt: skip
    return y, aux


# --- forward and backward: the rows of `_loss_rows`, in plain PyTorch or in one kernel ---------------------------------------------------


def _outputs(
    logits: Tensor, target: Tensor, weight: Tensor | None, num_items: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, reduction: str, return_aux: bool, donate: bool,
    needs: Needs,
) -> Args:  # fmt: skip
    dtype = _check.wide_dtype(logits)
    y = logits.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    divisor = target.new_empty((), dtype=divisor_dtype(weight, num_items)) if reduction == "mean" else None
    aux = logits.new_empty(4, target.numel(), dtype=dtype) if return_aux else None
    return y, logits.new_empty(target.numel(), 2, dtype=dtype), divisor, aux


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> tuple[Tensor | None]:
    return (dense(res.logits) if needs[0] else None,)


def _matrix(t: Tensor) -> Tensor:
    """The rows of the last axis."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _vector(t: Tensor) -> Tensor:
    return t if t.dim() == 1 else t.reshape(-1)


def _fwd(
    logits: Tensor, target: Tensor, weight: Tensor | None, num_items: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, reduction: str, return_aux: bool, donate: bool,
    needs: Needs, parts: Parts,
) -> tuple[Tensor, Residuals]:  # fmt: skip
    v, flat = logits.shape[-1], _vector(target)
    check_targets("cross_entropy", flat, ignore_index, v)
    n = target.numel()
    stats = logits.new_empty(n, 2, dtype=_check.wide_dtype(logits))
    each = stats.new_empty(n)
    aux = stats.new_empty(4, n) if return_aux else None
    over = target, ignore_index, reduction, weight, num_items
    donate = donate and needs[0] and reduction != "none" and logits.is_contiguous() and logits.dtype is not torch.float16
    divisor = parts.reduce(None, *over)[1] if donate else None
    parts.rows(
        _matrix(logits), flat, ignore_index, Terms(weight, label_smoothing, z_loss, softcap), stats=stats, loss=each, aux=aux,
        grad=_matrix(logits) if donate else None, divisor=divisor,
    )  # fmt: skip
    if donate:
        torch.autograd.graph.increment_version(logits)  # whoever kept the logits for a backward of their own must hear of it
    y, divisor = parts.reduce(each, *over, divisor)
    assert y is not None  # each is there
    return y, Residuals(
        logits, target, weight, stats, divisor, aux, ignore_index, label_smoothing, z_loss, softcap, reduction, donate
    )  # fmt: skip


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool, parts: Parts) -> tuple[Tensor | None]:
    if not needs[0]:
        return (None,)
    if res.donate:  # the logits are their gradient since forward
        made = res.logits.detach()
        out = made if donate else torch.empty_like(made)
        parts.scale(made, dy, out)
        return (out,)
    (dlogits,) = _gradients(res, dy, needs)
    assert dlogits is not None
    parts.rows(
        _matrix(res.logits), _vector(res.target), res.ignore_index,
        Terms(res.weight, res.label_smoothing, res.z_loss, res.softcap), stats=res.stats,
        grad=_matrix(dlogits), scale=_vector(dy), divisor=res.divisor if res.reduction == "mean" else None,
    )  # fmt: skip
    return (dlogits,)


def _aux(flat: Args, y: Tensor, rows: Tensor) -> tuple[Tensor, CrossEntropyAux]:
    return y, aux_of(rows, flat[1], flat[4], flat[6])


def aux_of(rows: Tensor, target: Tensor, ignore_index: int, z_loss: float) -> CrossEntropyAux:
    """From the four numbers of each row that the kernel writes, `[4, N]`."""
    lse, log_prob, entropy, correct = (rows[i].view(target.shape) for i in range(4))
    return CrossEntropyAux(lse, log_prob, z_loss * lse.square(), entropy, correct.bool(), (target != ignore_index).sum())


# --- public function --------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(partial(_fwd, parts=KERNELS), partial(_bwd, parts=KERNELS)),
    plain=(partial(_fwd, parts=PLAIN), partial(_bwd, parts=PLAIN)),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: (res.target.shape if res.reduction == "none" else (),),
    diff=1,
    aux=_aux,
)
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    return_aux: bool = False,
    donate: bool = False,
) -> Args:
    r"""Cross entropy: `loss = log Σ_j exp(logits_j) − logits_target`, in nats.

    Args:
        logits: `[..., V]`, rows of any stride; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        target: `[...]`, integers in [0, V), or `ignore_index` where a row does not count.
        weight: `[V]`, a weight for each class, as in `torch.nn.functional.cross_entropy`; a mean divides by the weights of the targets.
        ignore_index: the target of rows that have no loss and no gradient.
        label_smoothing: the part of the target's probability, 0 to 1, that is spread over all classes.
        z_loss: adds `z_loss · lse²` to each row's loss, lse the log-sum-exp of its logits; it keeps logits from drifting.
        softcap: takes `softcap · tanh(logits / softcap)` for the logits, as Gemma 2 does.
        reduction: "mean" over the rows that count (0 when none does), "sum", or "none" for one loss each.
        num_items: what a mean divides by instead, a number or a 0-dimensional tensor: the rows of all micro-batches, where gradients are
            accumulated over several.
        return_aux: return `(loss, CrossEntropyAux)`: lse, log_prob, z_loss, entropy, correct and num_valid, from the same reading of the
            logits. They have no derivative.
        donate: the caller reads the logits no more: forward may write their gradient into their memory, and reads them once less. Whoever
            else kept them for a backward gets PyTorch's error about a modified tensor. Honoured where a gradient is wanted, for "mean" and
            "sum", contiguous logits but float16 (whose small gradients need the loss's scale first), outside compilers and transforms.

    Returns:
        The loss, fp32 (fp64 for fp64 logits): a scalar, or of target's shape for "none". Gradient: logits. No input is written to.

    Raises:
        TypeError: logits or weight are not of a float dtype, target is not of an integer dtype.
        ValueError: target has another shape than logits without their last axis, weight is not `[V]` or needs a gradient, devices differ,
            label_smoothing outside [0, 1], negative z_loss, softcap not above 0, unknown reduction, `num_items` without a mean; on a CPU
            also a target outside [0, V). On a GPU, where looking would make the host wait, such a row's loss and gradient are NaN.

    Examples:
        >>> liger_fn.cross_entropy(torch.zeros(2, 8), torch.tensor([3, -100]))
        tensor(2.0794)

    Source: Milakov & Gimelshein 2018, arXiv:1805.02867 (softmax in one pass); Szegedy et al. 2015, arXiv:1512.00567 (label smoothing);
    Chowdhery et al. 2022, arXiv:2204.02311 (z-loss).
    """
    op = "cross_entropy"
    _check.floating(op, logits=logits)
    _check.rank(op, "logits", logits, 1)
    _check.at_least_one(op, "the last axis of logits", logits.shape[-1])
    target = _check.classes(op, target, logits.shape[:-1], "logits without their last axis")
    _check.same_device(op, logits, target=target)
    _check.choice(op, "reduction", reduction, REDUCTIONS)
    _check.integer(op, "ignore_index", ignore_index)
    weight = class_weights(op, "weight", weight, logits, logits.shape[-1], "the last axis of logits")
    return (
        logits,
        target,
        weight,
        items(op, num_items, reduction, logits),
        ignore_index,
        number(op, "label_smoothing", label_smoothing, "from 0 to 1"),
        number(op, "z_loss", z_loss, "at least 0"),
        0.0 if softcap is None else number(op, "softcap", softcap, "above 0"),
        reduction,
        bool(return_aux),
        bool(donate),
    )
