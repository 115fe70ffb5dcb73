r"""The rows of a cross entropy: statistics, loss and gradient of each row of logits, as cross entropy and linear cross entropy share them.

    m = max_j a_j        s = log Σ_j exp(a_j − m)        loss = s − (a_y − m)        da_j = scale (exp(a_j − m − s) − [j = y])

The log-sum-exp m + s is kept in its two parts: their sum would be rounded at the size of the logits, and every exp by as much. Where the
target has the maximum, s = log1p(Σ_{j≠y} exp(a_j − m)), and p_y − 1 = expm1(a_y − m − s): a model that is nearly certain, whose p_y rounds
to 1, keeps every digit of its small loss and gradient.

A row whose target y is `ignore_index` has loss 0 and gradient 0, whatever its logits. A row whose target is outside [0, V) has loss and
gradient NaN: never a read out of bounds, never a plausible number. Scale is a cotangent, over a count where the loss is a mean.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import wide
from ._launch import as_rows, jit, launch, next_power_of_2, registers, tl, warps

_FP64 = ("cpu", "cuda", "meta")  # devices that have fp64; Apple's and some of Intel's have not


class Rows(Protocol):
    """One implementation of the row functions, which write to `loss`, `stats` and `grad`."""

    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        ignore_index: int,
        *,
        stats: Tensor,
        loss: Tensor | None = None,
        grad: Tensor | None = None,
        scale: Tensor | None = None,
        n_valid: Tensor | None = None,
    ) -> None:
        """
        Args:
            logits: `[N, V]`. target: `[N]`.
            stats: `[N, 2]`, the parts m and s; written when `loss` is given, else read.
            loss: `[N]`, written.
            grad: `[N, V]`, written; may be `logits` itself.
            scale: `[N]` or one element, the cotangent; 1 when absent. n_valid: one element, the number of rows that count, divides it.
        """


class Valid(NamedTuple):
    """Which rows count: `counted` and `wrong` are masks, `column` is the target, made legal."""

    counted: Tensor
    wrong: Tensor
    column: Tensor


def _valid(target: Tensor, ignore_index: int, v: int) -> Valid:
    counted = target != ignore_index
    wrong = counted & ((target < 0) | (target >= v))
    return Valid(counted, wrong, target.clamp(0, v - 1))


def losses(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The definition: `[N]` losses, differentiable plain PyTorch."""
    counted, wrong, column = _valid(target, ignore_index, logits.shape[-1])
    a = torch.where(counted.unsqueeze(-1), wide(logits), 0.0)
    return F.cross_entropy(a, column, reduction="none").masked_fill(~counted, 0.0).masked_fill(wrong, torch.nan)


def plain_rows(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    *,
    stats: Tensor,
    loss: Tensor | None = None,
    grad: Tensor | None = None,
    scale: Tensor | None = None,
    n_valid: Tensor | None = None,
) -> None:
    """`Rows` in plain PyTorch."""
    a = wide(logits)
    counted, wrong, column = _valid(target, ignore_index, a.shape[-1])
    at = column.unsqueeze(-1)
    a_y = a.gather(-1, at).squeeze(-1)
    if loss is not None:
        top = a.amax(-1)
        others = torch.exp(a - top.unsqueeze(-1)).scatter_(-1, at, 0.0).sum(-1)
        stats[:, 0] = top
        stats[:, 1] = torch.where(a_y == top, others.log1p(), torch.log(others + torch.exp(a_y - top)))
        loss.copy_(stats[:, 1] - (a_y - top)).masked_fill_(~counted, 0.0).masked_fill_(wrong, torch.nan)
    if grad is not None:
        p = torch.exp(a - stats[:, :1] - stats[:, 1:])
        p.scatter_(-1, at, torch.expm1(a_y - stats[:, 0] - stats[:, 1]).unsqueeze(-1))
        if scale is not None:
            p *= scale.unsqueeze(-1)
        if n_valid is not None:
            p /= n_valid
        p.masked_fill_(wrong.unsqueeze(-1), torch.nan).masked_fill_(~counted.unsqueeze(-1), 0.0)
        grad.copy_(p)


@jit
def _exp(x, EXACT: tl.constexpr):
    """exp(x) for x ≤ 0. The hardware's exp2 of the rounded product x log₂e is off by |x| roundings, which fp32 logits would show."""
    if EXACT:
        x = tl.where(x < -120.0, -120.0, x)  # exp is 0 there, and -inf would make NaN below
        t = x * 1.4426950408889634
        rest = tl.fma(x, 1.4426950216293335, -t) + x * 1.92596298909109e-08
        return tl.exp2(t) * (1.0 + rest * 0.6931471805599453)
    return tl.exp(x)


@jit
def _log1p(x):
    """log(1 + x) for x ≥ 0; for a small x, whose digits 1 + x would lose, the series of 2 artanh(x / (2 + x))."""
    z = x / (2.0 + x)
    z2 = z * z
    series = 2.0 * z * (1.0 + z2 * (0.3333333333333333 + z2 * (0.2 + z2 * 0.14285714285714285)))
    return tl.where(x < 0.1, series, tl.log(1.0 + x))


@jit
def _expm1(x, EXACT: tl.constexpr):
    """exp(x) − 1 for x ≤ 0; for a small one, where that cancels, the series."""
    series = x * (1.0 + x * (0.5 + x * (0.16666666666666666 + x * (0.041666666666666664 + x * 0.008333333333333333))))
    return tl.where(x > -0.1, series, _exp(x, EXACT) - 1.0)


@jit
def _rows_kernel(
    logits_ptr, target_ptr, stats_ptr, loss_ptr, grad_ptr, scale_ptr, n_valid_ptr, stride, target_stride, grad_stride, scale_stride,
    V, ignore_index, EXACT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + row * target_stride).to(tl.int64)
    counted = y != ignore_index
    legal = (y >= 0) & (y < V)
    a_at = logits_ptr + row * stride
    block = tl.arange(0, BLOCK)
    nan = float("nan")
    a_y = tl.load(a_at + y, mask=counted & legal, other=nan).to(tl.float32)  # before the gradient may overwrite it

    # The block of the target is apart, so that no other block compares columns: first for the loss, last for the gradient, which goes the
    # same way backwards, from what is still in the cache.
    blocks = tl.cdiv(V, BLOCK)
    place = tl.where(legal, y, 0).to(tl.int32)
    home = place // BLOCK
    col = home * BLOCK + block

    if loss_ptr is not None:
        top = 0.0
        rest = 0.0
        loss = 0.0
        if counted:
            a = tl.load(a_at + col, mask=col < V, other=float("-inf")).to(tl.float32)
            top = tl.max(a, 0)
            e = _exp(a - tl.where(top == float("-inf"), 0.0, top), EXACT)
            others = tl.sum(tl.where(col == place, 0.0, e), 0)
            for i in range(1, blocks):
                at = home + i
                at = tl.where(at < blocks, at, at - blocks) * BLOCK + block
                a = tl.load(a_at + at, mask=at < V, other=float("-inf")).to(tl.float32)
                new = tl.maximum(top, tl.max(a, 0))
                shift = tl.where(new == float("-inf"), 0.0, new)
                others = others * _exp(top - shift, EXACT) + tl.sum(_exp(a - shift, EXACT), 0)
                top = new
            rest = tl.where(a_y == top, _log1p(others), tl.log(others + _exp(a_y - top, EXACT)))
            loss = rest - (a_y - top)
        tl.store(stats_ptr + 2 * row, top)
        tl.store(stats_ptr + 2 * row + 1, rest)
        tl.store(loss_ptr + row, loss)
    else:
        top = tl.load(stats_ptr + 2 * row)
        rest = tl.load(stats_ptr + 2 * row + 1)

    if grad_ptr is not None:
        scale = 1.0
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + row * scale_stride).to(tl.float32)
        if n_valid_ptr is not None:
            scale = scale / tl.load(n_valid_ptr).to(tl.float32)
        scale = tl.where(legal, scale, nan)
        g_at = grad_ptr + row * grad_stride
        tl.debug_barrier()  # every read of the target's logit is done
        for i in range(1, blocks):
            at = home - i
            at = tl.where(at < 0, at + blocks, at) * BLOCK + block
            if counted:
                a = tl.load(a_at + at, mask=at < V, other=0.0, eviction_policy="evict_first").to(tl.float32)
                g = _exp(a - top - rest, EXACT) * scale
            else:
                g = tl.zeros((BLOCK,), tl.float32)
            tl.store(g_at + at, g.to(grad_ptr.dtype.element_ty), mask=at < V, cache_modifier=".cs")
        if counted:
            a = tl.load(a_at + col, mask=col < V, other=0.0, eviction_policy="evict_first").to(tl.float32)
            p = _exp(a - top - rest, EXACT)
            g = tl.where(col == place, _expm1(a_y - top - rest, EXACT), p) * scale
        else:
            g = tl.zeros((BLOCK,), tl.float32)
        tl.store(g_at + col, g.to(grad_ptr.dtype.element_ty), mask=col < V, cache_modifier=".cs")


class _Tile(NamedTuple):
    """Columns that a program holds at a time, how many of them a warp holds, and the most registers a thread may have (None: any)."""

    columns: int
    per_warp: int
    registers: int | None


def _tile(v: int, size: int, writes: bool) -> _Tile:
    """For rows of `v` logits of `size` bytes. H100: rows are read at 1.01, written at 1.04 of a copy's rate; both in one launch, 8192 ×
    128256 in bf16 take 1.29 and 8192 × 32000 take 1.15 of a copy, since the second reading finds most of a row in L2.
    """
    if not writes:
        return _Tile(8192, 1024, None)
    columns = 16384 if v > 65536 or v <= 16384 else 8192
    return _Tile(columns, 512, 32 if size == 2 and v > columns else None)


def kernel_rows(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    *,
    stats: Tensor,
    loss: Tensor | None = None,
    grad: Tensor | None = None,
    scale: Tensor | None = None,
    n_valid: Tensor | None = None,
) -> None:
    """`Rows` in one Triton launch."""
    logits = as_rows(logits)
    n, v = logits.shape
    tile = _tile(v, logits.element_size(), grad is not None)
    block = min(next_power_of_2(v), tile.columns)
    launch(
        _rows_kernel, (n,), logits.device,
        logits, target, stats, loss, grad, scale, n_valid, logits.stride(0), target.stride(0),
        0 if grad is None else grad.stride(0), 0 if scale is None or scale.numel() == 1 else scale.stride(0), v, ignore_index,
        EXACT=logits.dtype is torch.float32, BLOCK=block, num_warps=warps(block, tile.per_warp, least=4), **registers(tile.registers),
    )  # fmt: skip


def check_targets(op: str, target: Tensor, ignore_index: int, v: int) -> None:
    """On a CPU, where looking costs nothing: every target is a class or `ignore_index`. On a GPU such a row's loss is NaN instead."""
    if target.device.type != "cpu" or target.numel() == 0:
        return
    wrong = target[_valid(target, ignore_index, v).wrong]
    if wrong.numel():
        raise ValueError(
            f"{op}: every target must be in [0, {v}) or be ignore_index={ignore_index}, got {wrong[0].item()} "
            f"({wrong.numel()} such targets); check the tokenizer's vocabulary size against the logits"
        )


def reduced(each: Tensor, n_valid: Tensor | None, reduction: str, shape: torch.Size) -> Tensor:
    """`[N]` losses as the reduction wants them, summed in fp64: one rounding is all that is added. The mean over no valid row is 0."""
    if reduction == "none":
        return each.view(shape)
    total = each.sum(dtype=torch.float64 if each.device.type in _FP64 else None)
    return (total if n_valid is None else total / n_valid.clamp(min=1)).to(each.dtype)


def valid_rows(target: Tensor, ignore_index: int, reduction: str) -> Tensor | None:
    """How many targets a mean divides by, as a tensor so that no device has to wait; None for the other reductions."""
    return (target != ignore_index).sum() if reduction == "mean" else None
