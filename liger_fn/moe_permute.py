r"""Rows sorted by the expert that was chosen for them: what any computation of experts takes. Its opposite is `moe_unpermute`.

    rows_p = x_t        p the place of choice (t, j)              rows_p = 0   where that choice is no expert
    dx_t = Σ_j drows_p                                            over the choices that are an expert, in the order of j

Choices are sorted by expert, and by (t, j) within one; those of no expert come last. How stands in `_moe_routing.py`; the sum is that of
`_moe_gradients.py`. Residuals: topk_index, for its shape, and where each choice went: x itself is not kept.
Source: Gale et al. 2022, arXiv:2211.15841.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._check import wide
from ._launch import cdiv, jit, launch, next_power_of_2, rows_and_stride, tl
from ._moe_launch import token_sums
from ._moe_routing import Routing, countable, plain_route, route
from ._vjp import Args, Needs, custom_vjp

TILE = 4096  # elements that a program holds of each tensor


class Residuals(NamedTuple):
    """What the backward of `moe_permute` needs. `aux` are the parts of the plan, one behind the other."""

    topk_index: Tensor
    aux: Tensor
    num_experts: int


class Permutation(NamedTuple):
    """Where each choice went, all int32 and without a derivative. Rows of expert e are `offsets[e]` to `offsets[e + 1]`."""

    order: Tensor  # [T k]: the choice t k + j of each row
    token: Tensor  # [T k]: its token t
    place: Tensor  # [..., k]: the row of each choice; −1 − its row, which is 0, where that choice is no expert
    offsets: Tensor  # [E + 1]: the first row of each expert, and the end of the last

    @property
    def k(self) -> int:
        """Choices of a token."""
        return self.place.shape[-1]

    @property
    def counts(self) -> Tensor:
        """How many rows each expert has, `[E]`."""
        return self.offsets.diff()


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(x: Tensor, topk_index: Tensor, num_experts: int, return_aux: bool) -> Tensor | tuple[Tensor, Tensor]:
    e = topk_index.reshape(-1)
    e, order = torch.where((e >= 0) & (e < num_experts), e, num_experts).sort(stable=True)
    rows = torch.where((e < num_experts).unsqueeze(1), _by_token(x)[order // topk_index.shape[-1]], 0)
    return (rows, _plain_aux(topk_index, num_experts)) if return_aux else rows


def _by_token(t: Tensor) -> Tensor:
    """`[..., n]` as `[T, n]`."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _plain_aux(topk_index: Tensor, num_experts: int) -> Tensor:
    order, token, place, offsets, _ = plain_route(_by_token(topk_index), num_experts)
    row = torch.empty_like(place).scatter_(0, order.long(), torch.arange(len(order), device=order.device, dtype=order.dtype))
    place = torch.where(place < 0, ~row, place)
    return torch.cat([*(F.pad(t, (0, _padded(len(t)) - len(t))) for t in (order, token, place)), offsets])


def _plain_fwd(x: Tensor, topk_index: Tensor, num_experts: int, return_aux: bool, needs: Needs) -> tuple[Tensor, Residuals]:
    aux = _plain_aux(topk_index, num_experts)
    token, place = (t.view(-1) for t in parts(aux, topk_index, num_experts)[1:3])
    kept = torch.arange(len(token), device=x.device) < (place >= 0).sum()
    return torch.where(kept.unsqueeze(1), _by_token(x)[token], 0), Residuals(topk_index, aux, num_experts)


def _plain_bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None]:
    if not needs[0]:
        return (None,)
    return (gathered(dy, parts(res.aux, res.topk_index, res.num_experts).place).sum(-2).to(dy.dtype),)


def gathered(rows: Tensor, place: Tensor) -> Tensor:
    """The row of each choice, `[..., k, H]`, in fp32 or fp64; 0 for those of no expert."""
    return torch.where((place >= 0).unsqueeze(-1), wide(rows)[place.clamp(min=0)], 0)


# --- the plan in one tensor -------------------------------------------------------------------------------------------------------------


def _padded(n: int) -> int:
    """So that each part starts at 16 bytes: kernels are compiled anew for pointers that do not."""
    return cdiv(n, 4) * 4


def _memory(topk_index: Tensor, num_experts: int) -> Tensor:
    return topk_index.new_empty(3 * _padded(math.prod(topk_index.shape)) + num_experts + 1, dtype=torch.int32)


def parts(aux: Tensor, topk_index: Tensor, num_experts: int) -> Permutation:
    """Its parts, as views."""
    n, at = math.prod(topk_index.shape), _padded(math.prod(topk_index.shape))
    place = aux[2 * at : 2 * at + n].view(topk_index.shape)
    return Permutation(aux[:n], aux[at : at + n], place, aux[3 * at : 3 * at + num_experts + 1])


# --- kernels ----------------------------------------------------------------------------------------------------------------------------


@jit
def _permute_absent_kernel(order_ptr, offsets_ptr, place_ptr, N, E, BLOCK: tl.constexpr):
    """The place of each choice of no expert: −1 − its row."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    absent = (row >= tl.load(offsets_ptr + E)) & (row < N)
    slot = tl.load(order_ptr + row, mask=absent, other=0)
    tl.store(place_ptr + slot, (-1 - row).to(tl.int32), mask=absent)


@jit
def _permute_rows_kernel(
    x_ptr, place_ptr, weight_ptr, rows_ptr, out_ptr, slope_ptr, stride, rows_stride, H, width,
    K: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For each choice of a token out[place] = w x and slope = ⟨x, rows[place]⟩, each where it is given: `width` columns to the program."""
    pid, across = tl.program_id(0).to(tl.int64), tl.cdiv(H, width)
    token, first = pid // across, (pid % across).to(tl.int32) * width
    j = tl.arange(0, SLOTS)
    slot = token * K + j
    place = tl.load(place_ptr + slot, mask=j < K, other=-1).to(tl.int64)
    kept = place >= 0
    row = tl.where(kept, place, -1 - place)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + slot, mask=kept, other=0.0).to(tl.float32)
    acc = tl.zeros((SLOTS, BLOCK), tl.float32)
    for n in tl.range(first, tl.minimum(first + width, H), BLOCK):
        at = n + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token * stride + at, mask=at < H, other=0.0).to(tl.float32)[None, :]
        if slope_ptr is not None:
            mask = kept[:, None] & (at < H)[None, :]
            acc += x * tl.load((rows_ptr + row * rows_stride)[:, None] + at[None, :], mask=mask, other=0.0).to(tl.float32)
        if out_ptr is not None:
            if weight_ptr is not None:
                x = x * w[:, None]
            out = tl.where(kept[:, None], x, 0.0).to(out_ptr.dtype.element_ty)
            tl.store((out_ptr + row * H)[:, None] + at[None, :], out, mask=(j < K)[:, None] & (at < H)[None, :])
    if slope_ptr is not None:
        slope = tl.where(kept, tl.sum(acc, 1), 0.0)
        tl.store(slope_ptr + slot, slope.to(slope_ptr.dtype.element_ty), mask=j < K)


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


def spread(x: Tensor, place: Tensor, weight: Tensor | None, rows: Tensor | None, out: Tensor | None, slope: Tensor | None) -> None:
    """Write out[place] = w x, and slope = ⟨x, rows[place]⟩, each where it is given. place, weight, out and slope are contiguous."""
    h, k = x.shape[-1], place.shape[-1]
    (x, stride), (rows, rows_stride) = rows_and_stride(x), (None, 1) if rows is None else rows_and_stride(rows)
    slots = next_power_of_2(k)
    block = min(next_power_of_2(h), max(32, TILE // slots))
    width = block if slope is None else h
    launch(
        _permute_rows_kernel, (place.numel() // k * cdiv(h, width),), place.device, x, place, weight, rows, out, slope,
        stride, rows_stride, h, width, K=k, SLOTS=slots, BLOCK=block, num_warps=max(1, min(8, slots * block // 1024)),
    )  # fmt: skip


def gather(rows: Tensor, place: Tensor, weight: Tensor | None, out: Tensor) -> None:
    """Write Σ_j w rows[place] of each token."""
    token_sums(rows.contiguous(), place.view(-1), weight, place.shape[-1], out)


def _outputs(x: Tensor, topk_index: Tensor, num_experts: int, return_aux: bool, needs: Needs) -> tuple[Tensor, Tensor]:
    return x.new_empty(math.prod(topk_index.shape), x.shape[-1]), _memory(topk_index, num_experts)


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> tuple[Tensor | None]:
    return (dy.new_empty(*res.topk_index.shape[:-1], dy.shape[-1]) if needs[0] else None,)


def _fwd(x: Tensor, topk_index: Tensor, num_experts: int, return_aux: bool, needs: Needs) -> tuple[Tensor, Residuals]:
    rows, aux = _outputs(x, topk_index, num_experts, return_aux, needs)
    plan, slots = parts(aux, topk_index, num_experts), len(rows)
    by_size = aux.new_empty(num_experts)
    route(_by_token(topk_index), Routing(plan.order, plan.token, plan.place, plan.offsets, by_size))
    launch(
        _permute_absent_kernel, (cdiv(slots, 1024),), x.device, plan.order, plan.offsets, plan.place, slots, num_experts,
        BLOCK=1024, num_warps=4,
    )  # fmt: skip
    spread(x, plan.place, None, None, rows, None)
    return rows, Residuals(topk_index, aux, num_experts)


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None]:
    if dy.dtype is torch.float64:  # no residual says that x was
        return _plain_bwd(res, dy, needs, donate)
    (dx,) = _gradients(res, dy, needs)
    if dx is not None:
        gather(dy, parts(res.aux.contiguous(), res.topk_index, res.num_experts).place, None, dx)
    return (dx,)


# --- public function --------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(_fwd, _bwd),
    plain=(_plain_fwd, _plain_bwd),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: ((math.prod(res.topk_index.shape), None),),
    diff=1,
    aux=lambda flat, rows, aux: (rows, parts(aux, flat[1], flat[2])),
)
def moe_permute(x: Tensor, topk_index: Tensor, num_experts: int) -> Args:
    r"""Each token's row once for each expert that it chose, sorted by expert: `rows[place of (t, j)] = x[t]`.

    For experts of your own (other kernels, low-rank adapters, experts on other devices): they compute on `rows`, those of expert e from
    `plan.offsets[e]` to `plan.offsets[e + 1]`, and `moe_unpermute(rows, plan, topk_weight)` brings the results back to the tokens.
    `moe_experts` does all of it in one call.

    Args:
        x: `[..., H]`, any strides, H at least 1; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        topk_index: `[..., k]`, the experts that each token chose, of any integer dtype and k at least 1. What is not in [0, num_experts) is
            no expert, as expert parallelism marks those of other ranks.
        num_experts: E.

    Returns:
        `(rows, plan)`. rows: `[T k, H]`, of x's dtype, by expert and by (t, j) within one, T the product
        of x's axes but the last; choices of no expert come last, and their rows are 0. plan: a `Permutation` of int32 tensors: order,
        token, place and offsets, with `k` and `counts`; it is made on the device, and the host waits for nothing. Gradient: x; summed over
        the choices in fp32 and in their order, and rounded once. What comes back to rows of no expert counts for nothing.

    Raises:
        TypeError: x is not of a float dtype, topk_index not of an integer dtype.
        ValueError: topk_index has not the axes of x but the last and k choices, H or k is 0, num_experts is not an integer of at least 1,
            devices differ, T k has no int32.

    Examples:
        >>> rows, plan = liger_fn.moe_permute(torch.tensor([[1.0], [2.0]]), torch.tensor([[2, 0], [0, -1]]), 3)
        >>> rows.T
        tensor([[1., 2., 1., 0.]])
        >>> plan.place.tolist(), plan.offsets.tolist()
        ([[2, 0], [1, -4]], [0, 2, 2, 3])

    Source: Gale et al. 2022, arXiv:2211.15841.
    """
    op = "moe_permute"
    _check.floats(op, "x", x)
    _check.at_least_one(op, "the last axis of x", x.shape[-1])
    _check.integers(op, "topk_index", topk_index)
    _check.rank(op, "topk_index", topk_index, 1)
    _check.at_least_one(op, "the last axis of topk_index", topk_index.shape[-1])
    _check.shape(op, "topk_index", topk_index, (*x.shape[:-1], topk_index.shape[-1]), "the axes of x but the last, and k choices")
    countable(op, topk_index)
    _check.same_device(op, x, topk_index=topk_index)
    _check.integer(op, "num_experts", num_experts, 1)
    kernels = topk_index if topk_index.dtype in (torch.int64, torch.int32) else topk_index.long()
    return x, kernels.contiguous(), num_experts, True
