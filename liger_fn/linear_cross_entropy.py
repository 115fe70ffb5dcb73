r"""Linear cross entropy: the loss of a language model's head, without its logits.

    a = x wᵀ + b                  loss = lse(a) − a_y               g = scale (softmax(a) − onehot(y))
    dx = g w                      dw = gᵀ x                         db = Σ_rows g

The rows of x go by in chunks, so that only one chunk's logits exist at a time. A reduced loss has one cotangent, a factor: its gradients
are made in forward while the chunk's logits are at hand (three matrix products in all) and scaled in backward. Per-token losses have a
cotangent each, known in backward only: there the logits are made again (four products). Chunks of dw are summed in fp32.

Residuals: weight, and the unscaled gradients (reduced), or x, bias, target and lse (per token).
Source: chunks of tokens as in github.com/mgmalek/efficient_cross_entropy; Wijmans et al. 2024, arXiv:2411.09009, for the memory at stake.
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
from ._launch import cdiv
from ._loss_mean import plain_reduce
from ._loss_rows import check_targets, losses
from ._vjp import Args, Needs, custom_vjp
from .cross_entropy import KERNELS, PLAIN, REDUCTIONS, Parts, Reduction

RUN = 512  # terms an fp32 product of a chunk sums one after another
LIFT = 1024.0  # fp16 keeps small probabilities as subnormals, or not at all: its unscaled gradients are made this much larger
MEMORY_BUDGET = 256 * 2**20  # bytes of logits at a time: cuBLAS is near its ceiling there (H100)


class Residuals(NamedTuple):
    """What the backward of `linear_cross_entropy` needs: the gradients to scale, or the inputs to make them from."""

    x: Tensor | None
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    stats: Tensor
    divisor: Tensor | None
    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    ignore_index: int
    reduction: str
    memory_budget: int


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, reduction: str, memory_budget: int
) -> Tensor:  # fmt: skip
    flat = target.reshape(-1)
    each = losses(F.linear(x.reshape(-1, x.shape[-1]), weight, bias), flat, ignore_index)
    y, _ = plain_reduce(each, target, ignore_index, reduction)
    assert y is not None  # each is there
    return y


# --- chunks -----------------------------------------------------------------------------------------------------------------------------


def _chunks(n: int, weight: Tensor, memory_budget: int) -> list[slice]:
    """Slices of rows, even in size, whose logits fit the budget; one row where not even that fits."""
    fit = max(1, memory_budget // (weight.shape[0] * weight.element_size()))
    rows = cdiv(n, cdiv(n, fit)) if n else 1
    rows = min(fit, cdiv(rows, 64) * 64)  # a multiple of a matrix product's tile, where that still fits
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    out = buffer[: len(x)]
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def _buffer(chunks: list[slice], weight: Tensor) -> Tensor:
    return weight.new_empty(chunks[0].stop if chunks else 0, weight.shape[0])


def _lift(t: Tensor) -> float:
    return LIFT if t.dtype is torch.float16 else 1.0


def _storage(t: Tensor) -> torch.dtype:
    """The dtype that an unscaled gradient is kept in: its own, but fp32 for fp16, which a sum over many tokens could overflow."""
    return torch.float32 if t.dtype is torch.float16 else t.dtype


def _product(a: Tensor, b: Tensor, out: Tensor, *, add: bool, single: bool) -> None:
    """`out = a b`, or `out += a b`.

    In fp32 the order of a long sum shows. A library splits one large product's sum into runs by itself; the smaller products of chunks it
    may not, so their runs are made short here, for an error no larger than the large product's.
    """
    run = a.shape[1] if single or a.dtype is not torch.float32 else RUN
    for i in range(0, a.shape[1], run):
        torch.addmm(out, a[:, i : i + run], b[i : i + run], beta=1 if add or i else 0, out=out)


class _Sums:
    """The gradients of one call, gathered chunk by chunk: dx by rows, dweight and dbias as sums in fp32, rounded once at the end."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs, single: bool) -> None:
        self.x, self.weight, self.single = x, weight, single
        self.dx = torch.empty_like(x) if needs[0] else None
        self.dweight = torch.zeros_like(weight, dtype=_storage(weight) if single else _check.wide_dtype(weight)) if needs[1] else None
        self.dbias = None if bias is None or not needs[2] else torch.zeros_like(bias, dtype=_check.wide_dtype(bias))

    def add(self, at: slice, g: Tensor) -> None:
        """Take in the gradient `g` of the logits of the rows `at`."""
        if self.dx is not None:
            _product(g, self.weight, self.dx[at], add=False, single=self.single)
        if self.dweight is not None:
            if self.dweight.dtype is g.dtype:
                _product(g.T, self.x[at], self.dweight, add=True, single=self.single)
            elif g.device.type == "cuda":
                torch.addmm(self.dweight, g.T, self.x[at], out=self.dweight, out_dtype=torch.float32)
            else:
                self.dweight.addmm_(g.T.float(), self.x[at].float())
        if self.dbias is not None:
            self.dbias += g.sum(0, dtype=self.dbias.dtype)


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


def _outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, reduction: str, memory_budget: int, needs: Needs
) -> Args:  # fmt: skip
    wide = _check.wide_dtype(x)
    y = x.new_empty(target.shape if reduction == "none" else (), dtype=wide)
    divisor = target.new_empty((), dtype=torch.int64) if reduction == "mean" else None
    made = [None if t is None or not n or reduction == "none" else t for t, n in zip((x, weight, bias), needs, strict=True)]
    dx, dweight, dbias = (t if t is None else t.new_empty(t.shape, dtype=_storage(t) if i else t.dtype) for i, t in enumerate(made))
    return y, x.new_empty(target.numel(), 2, dtype=wide), divisor, dx, dweight, dbias


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    like = (res.x if res.reduction == "none" else res.dx), res.weight, res.bias
    return tuple(dense(t) if t is not None and n else None for t, n in zip(like, needs, strict=True))


def _fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, reduction: str, memory_budget: int, needs: Needs,
    parts: Parts,
) -> tuple[Tensor, Residuals]:  # fmt: skip
    rows, flat = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    check_targets("linear_cross_entropy", flat, ignore_index, weight.shape[0])
    chunks = _chunks(len(rows), weight, memory_budget)
    buffer = _buffer(chunks, weight)
    each = rows.new_empty(len(rows), dtype=_check.wide_dtype(x))
    stats = each.new_empty(len(rows), 2)
    lift = None if _lift(x) == 1.0 else each.new_full((1,), _lift(x))
    now = any(needs) and reduction != "none"  # the gradients are made here, and only scaled in backward
    sums = _Sums(rows, weight, bias, needs if now else (False,) * 3, len(chunks) == 1)
    for at in chunks:
        a = _logits(rows[at], weight, bias, buffer)
        parts.rows(a, flat[at], ignore_index, stats=stats[at], loss=each[at], grad=a if now else None, scale=lift)
        if now:
            sums.add(at, a)
    y, divisor = parts.reduce(each, target, ignore_index, reduction)
    assert y is not None  # each is there
    dx = None if sums.dx is None else sums.dx.view(x.shape)
    dweight = None if sums.dweight is None else sums.dweight.to(_storage(weight))
    dbias = None if sums.dbias is None or bias is None else sums.dbias.to(_storage(bias))
    res = Residuals(
        x if reduction == "none" else None, weight, bias, target, stats, divisor, dx, dweight, dbias, ignore_index, reduction, memory_budget
    )  # fmt: skip
    return y, res


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool, parts: Parts) -> tuple[Tensor | None, ...]:
    if res.reduction == "none":
        return _bwd_each(res, dy, needs, parts)
    factor = dy if res.divisor is None or res.reduction == "sum" else dy / res.divisor
    factor = factor / _lift(res.weight)
    grads = []
    for made, like, need in zip((res.dx, res.dweight, res.dbias), (res.dx, res.weight, res.bias), needs, strict=True):
        out = None
        if need and made is not None and like is not None:
            out = made if donate and made.dtype is like.dtype else torch.empty_like(made, dtype=like.dtype)
            parts.scale(made, factor, out)
        grads.append(out)
    return tuple(grads)


def _bwd_each(res: Residuals, dy: Tensor, needs: Needs, parts: Parts) -> tuple[Tensor | None, ...]:
    """A cotangent for each token: make the logits again, and from them the gradients."""
    x, weight, bias, target, stats = res[:5]
    assert x is not None  # kept for this
    rows, flat, scale = x.reshape(-1, x.shape[-1]), target.reshape(-1), dy.reshape(-1)
    chunks = _chunks(len(rows), weight, res.memory_budget)
    buffer = _buffer(chunks, weight)
    sums = _Sums(rows, weight, bias, needs, len(chunks) == 1)
    for at in chunks:
        a = _logits(rows[at], weight, bias, buffer)
        parts.rows(a, flat[at], res.ignore_index, stats=stats[at], grad=a, scale=scale[at])
        sums.add(at, a)
    dx = None if sums.dx is None else sums.dx.view(x.shape)
    dweight = None if sums.dweight is None else sums.dweight.to(weight.dtype)
    return dx, dweight, None if sums.dbias is None or bias is None else sums.dbias.to(bias.dtype)


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
)
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    memory_budget: int = MEMORY_BUDGET,
) -> Args:
    r"""`cross_entropy(x weightᵀ + bias, target)`, in nats, without ever holding all the logits.

    Args:
        x: `[..., H]`; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        weight: `[V, H]`, of x's dtype. target: `[...]`, integers in [0, V), or `ignore_index` where a row does not count.
        bias: `[V]`, of x's dtype, or None.
        ignore_index: the target of rows that have no loss and no gradient.
        reduction: "mean" over the rows that count (0 when none does), "sum", or "none" for one loss each, whose gradients honour one
            cotangent each and cost a fourth matrix product.
        memory_budget: bytes of logits that may exist at a time (at least one row's). Less is slower once a chunk has few hundred rows.

    Under autocast, x, weight and bias take part in the dtype that a matrix product would take.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs): a scalar, or of target's shape for "none". Gradients: x, weight and bias; what asks for none
        costs nothing.

    Raises:
        TypeError: a tensor is not of a float dtype, dtypes differ, target is not of an integer dtype.
        ValueError: a shape does not fit, devices differ, unknown reduction, memory_budget below 1; on a CPU also a target outside [0, V).
            On a GPU, where looking would make the host wait, such a row's loss and gradient are NaN.

    Example:
        >>> liger_fn.linear_cross_entropy(torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([3, -100]))
        tensor(2.0794)

    Source: Wijmans et al. 2024, arXiv:2411.09009, for the memory at stake; chunks of tokens as in efficient_cross_entropy (M. Malek).
    """
    op = "linear_cross_entropy"
    _check.floating(op, x=x, weight=weight)
    _check.optional(op, bias=bias)
    _check.rank(op, "x", x, 1)
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: weight must be [V, {x.shape[-1]}] (vocabulary, last axis of x) with V at least 1, got {list(weight.shape)}"
        )
    if bias is not None:
        _check.shape(op, "bias", bias, weight.shape[:1], "the first axis of weight")
    target = _check.classes(op, target, x.shape[:-1], "x without its last axis")
    _check.same_device(op, x, weight=weight, bias=bias, target=target)
    _check.choice(op, "reduction", reduction, REDUCTIONS)
    _check.integer(op, "memory_budget (bytes)", memory_budget, 1)
    _check.integer(op, "ignore_index", ignore_index)
    _check.at_least_one(op, "the last axis of x", x.shape[-1])
    x, weight, bias = _check.autocast(x), _check.autocast(weight), None if bias is None else _check.autocast(bias)
    _check.same_dtype(op, x, weight=weight, bias=bias)
    return x, weight, bias, target, ignore_index, reduction, memory_budget
