r"""Cross entropy of logits against class indices.

    lse = log Σ_j exp(a_j)        loss = lse − a_y        da_j = dloss (exp(a_j − lse) − [j = y])

over the rows whose target is not ignored; a mean divides by their number. Residuals: logits, target, the two parts of lse in fp32 (see
`_loss_rows`), the number of valid rows. Source: Milakov & Gimelshein 2018, arXiv:1805.02867 (softmax in one pass).
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _check
from ._loss_rows import Rows, check_targets, kernel_rows, losses, plain_rows, reduced, valid_rows
from ._vjp import Args, Needs, custom_vjp

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


class Residuals(NamedTuple):
    """What the backward of `cross_entropy` needs."""

    logits: Tensor
    target: Tensor
    stats: Tensor
    n_valid: Tensor | None
    ignore_index: int
    reduction: str


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(logits: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    flat = target.reshape(-1)
    each = losses(logits.reshape(-1, logits.shape[-1]), flat, ignore_index)
    return reduced(each, valid_rows(flat, ignore_index, reduction), reduction, target.shape)


# --- forward and backward: the rows of `_loss_rows`, in plain PyTorch or in one kernel ---------------------------------------------------


def _outputs(logits: Tensor, target: Tensor, ignore_index: int, reduction: str, needs: Needs) -> tuple[Tensor, Tensor, Tensor | None]:
    dtype = _check.wide_dtype(logits)
    y = logits.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    n_valid = target.new_empty((), dtype=torch.int64) if reduction == "mean" else None
    return y, logits.new_empty(target.numel(), 2, dtype=dtype), n_valid


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> tuple[Tensor | None]:
    return (res.logits.new_empty(res.logits.shape) if needs[0] else None,)


def _fwd(logits: Tensor, target: Tensor, ignore_index: int, reduction: str, needs: Needs, rows: Rows) -> tuple[Tensor, Residuals]:
    v, flat = logits.shape[-1], target.reshape(-1)
    check_targets("cross_entropy", flat, ignore_index, v)
    _, stats, _ = _outputs(logits, target, ignore_index, reduction, needs)
    each, n_valid = torch.empty_like(stats[:, 0]), valid_rows(flat, ignore_index, reduction)
    rows(logits.reshape(-1, v), flat, ignore_index, stats=stats, loss=each)
    return reduced(each, n_valid, reduction, target.shape), Residuals(logits, target, stats, n_valid, ignore_index, reduction)


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool, rows: Rows) -> tuple[Tensor | None]:
    logits, target, stats, n_valid, ignore_index, reduction = res
    (dlogits,) = _gradients(res, dy, needs)
    if dlogits is not None:
        v = logits.shape[-1]
        n_valid = n_valid if reduction == "mean" else None
        rows(
            logits.reshape(-1, v), target.reshape(-1), ignore_index,
            stats=stats, grad=dlogits.view(-1, v), scale=dy.reshape(-1), n_valid=n_valid,
        )  # fmt: skip
    return (dlogits,)


# --- public function --------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(partial(_fwd, rows=kernel_rows), partial(_bwd, rows=kernel_rows)),
    plain=(partial(_fwd, rows=plain_rows), partial(_bwd, rows=plain_rows)),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: (res.target.shape if res.reduction == "none" else (),),
    diff=1,
)
def cross_entropy(logits: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean") -> Args:
    r"""Cross entropy: `loss = log Σ_j exp(logits_j) − logits_target`, in nats.

    Args:
        logits: `[..., V]`, rows of any stride; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        target: `[...]`, integers in [0, V), or `ignore_index` where a row does not count.
        ignore_index: the target of rows that have no loss and no gradient.
        reduction: "mean" over the rows that count (0 when none does), "sum", or "none" for one loss each.

    Returns:
        The loss, fp32 (fp64 for fp64 logits): a scalar, or of target's shape for "none". Gradient: logits. No input is written to.

    Raises:
        TypeError: logits are not of a float dtype, target is not of an integer dtype.
        ValueError: target has another shape than logits without their last axis, devices differ, unknown reduction; on a CPU also a target
            outside [0, V). On a GPU, where looking would make the host wait, such a row's loss and gradient are NaN.

    Example:
        >>> liger_fn.cross_entropy(torch.zeros(2, 8), torch.tensor([3, -100]))
        tensor(2.0794)

    Source: Milakov & Gimelshein 2018, arXiv:1805.02867 (softmax in one pass).
    """
    _check.floating("cross_entropy", logits=logits)
    _check.rank("cross_entropy", "logits", logits, 1)
    _check.at_least_one("cross_entropy", "the last axis of logits", logits.shape[-1])
    target = _check.classes("cross_entropy", target, logits.shape[:-1], "logits without their last axis")
    _check.same_device("cross_entropy", logits, target=target)
    _check.choice("cross_entropy", "reduction", reduction, REDUCTIONS)
    return logits, target, _check.integer("cross_entropy", "ignore_index", ignore_index), reduction
