r"""Rows sorted by expert back to the tokens that chose, weighted: the opposite of `moe_permute`.

    y_t = Σ_j w_tj rows_p        p the place of choice (t, j); a choice of no expert adds nothing, and its row is not read
    drows_p = w_tj dy_t          dw_tj = ⟨dy_t, rows_p⟩          both 0 where that choice is no expert

The kernels are those of `moe_permute.py`: backward reads dy_t once for all choices of t, and every row is written by the one choice that
it belongs to. Residuals: place, w, and the rows where dw is wanted. Source: Gale et al. 2022, arXiv:2211.15841.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _check
from ._check import wide
from ._vjp import Args, Needs, custom_vjp
from .moe_permute import Permutation, gather, gathered, spread


class Residuals(NamedTuple):
    """What the backward of `moe_unpermute` needs."""

    rows: Tensor | None
    topk_weight: Tensor | None
    place: Tensor


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(rows: Tensor, topk_weight: Tensor | None, place: Tensor) -> Tensor:
    each = gathered(rows, place)
    if topk_weight is not None:
        each = each * torch.where(place >= 0, wide(topk_weight), 0).unsqueeze(-1)
    return each.sum(-2).to(rows.dtype)


def _plain_fwd(rows: Tensor, topk_weight: Tensor | None, place: Tensor, needs: Needs) -> tuple[Tensor, Residuals]:
    return _reference(rows, topk_weight, place), _kept(rows, topk_weight, place, needs)


def _plain_bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None, Tensor | None]:
    drows, dw = _gradients(res, dy, needs)
    rows, w, place = res
    d, kept = wide(dy).unsqueeze(-2).expand(*place.shape, -1), (place >= 0).unsqueeze(-1)
    if drows is not None:
        each = torch.where(kept, d if w is None else d * wide(w).unsqueeze(-1), 0).to(drows.dtype)
        row = torch.where(place >= 0, place, ~place).reshape(-1).long()
        drows = drows.index_copy(0, row, each.reshape(drows.shape))
    if dw is not None and rows is not None:
        dw = torch.where(kept, d * gathered(rows, place), 0).sum(-1).to(dw.dtype)
    return drows, dw


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


def _kept(rows: Tensor, topk_weight: Tensor | None, place: Tensor, needs: Needs) -> Residuals:
    return Residuals(rows if needs[1] and topk_weight is not None else None, topk_weight, place)


def _outputs(rows: Tensor, topk_weight: Tensor | None, place: Tensor, needs: Needs) -> tuple[Tensor]:
    return (rows.new_empty(*place.shape[:-1], rows.shape[-1]),)


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> tuple[Tensor | None, Tensor | None]:
    drows = dy.new_empty(res.place.numel(), dy.shape[-1]) if needs[0] else None
    return drows, _check.dense(res.topk_weight) if needs[1] and res.topk_weight is not None else None


def _fwd(rows: Tensor, topk_weight: Tensor | None, place: Tensor, needs: Needs) -> tuple[Tensor, Residuals]:
    (y,) = _outputs(rows, topk_weight, place, needs)
    gather(rows, place, topk_weight, y)
    return y, _kept(rows, topk_weight, place, needs)


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None, Tensor | None]:
    if dy.dtype is torch.float64:  # no residual says that the rows were
        return _plain_bwd(res, dy, needs, donate)
    drows, dw = _gradients(res, dy, needs)
    if drows is not None or dw is not None:
        weight, place = (t if t is None else t.contiguous() for t in res[1:])
        assert place is not None  # it is no option
        spread(dy, place, weight if needs[0] else None, res.rows if dw is not None else None, drows, dw)
    return drows, dw


# --- public function --------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(_fwd, _bwd),
    plain=(_plain_fwd, _plain_bwd),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: ((*res.place.shape[:-1], None if res.rows is None else res.rows.shape[-1]),),
    diff=2,
)
def moe_unpermute(rows: Tensor, plan: Permutation | Tensor, topk_weight: Tensor | None = None) -> Args:
    r"""The weighted sum of each token's rows: `y[t] = Σ_j topk_weight[t, j] rows[place of (t, j)]`.

    Args:
        rows: `[T k, H]`, what experts made of the rows of `moe_permute` (H may be another); float32, bfloat16, float16 (kernels) or float64
            (plain PyTorch). Rows of no expert are not read.
        plan: what `moe_permute` returned second, or its `place` alone, `[..., k]`: each choice's row, −1 − its row where it is no expert.
            Every row belongs to one choice; the kernels trust that it is so.
        topk_weight: `[..., k]`, of any float dtype, or None for weights of 1.

    Returns:
        y, `[..., H]`, of rows' dtype: summed in fp32 in the order of j, and rounded once. A token without an expert gets 0. Gradients: rows
        and topk_weight, both 0 for choices of no expert.

    Raises:
        TypeError: rows or topk_weight are not of a float dtype, plan is neither a `Permutation` nor a tensor of integers.
        ValueError: rows is not `[T k, H]`, topk_weight not `[..., k]`, H or k is 0, devices differ.

    Examples:
        >>> rows, plan = liger_fn.moe_permute(torch.tensor([[1.0], [2.0]]), torch.tensor([[2, 0], [0, -1]]), 3)
        >>> liger_fn.moe_unpermute(10 * rows, plan, torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
        tensor([[10.],
                [10.]])

    Source: Gale et al. 2022, arXiv:2211.15841.
    """
    op = "moe_unpermute"
    _check.floats(op, "rows", rows)
    _check.optional(op, topk_weight=topk_weight)
    place = plan.place if isinstance(plan, Permutation) else plan
    _check.integers(op, "plan", place)
    _check.rank(op, "plan", place, 1)
    _check.at_least_one(op, "the last axis of plan", place.shape[-1])
    if rows.dim() != 2 or rows.shape[0] != place.numel():
        raise ValueError(
            f"{op}: rows must have shape [{place.numel()}, H] (a row for each choice of plan), got {list(rows.shape)}; "
            "rows of no expert belong to it too"
        )
    _check.at_least_one(op, "the last axis of rows", rows.shape[1])
    if topk_weight is not None:
        _check.shape(op, "topk_weight", topk_weight, tuple(place.shape), "the shape of plan.place")
        topk_weight = topk_weight.contiguous()
    _check.same_device(op, rows, plan=place, topk_weight=topk_weight)
    return rows, topk_weight, place.to(torch.int32).contiguous()
