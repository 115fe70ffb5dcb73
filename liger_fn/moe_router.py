r"""Router of a mixture of experts: the k experts of each token, and what their outputs are weighted by.

    s = softmax(l)  or  σ(l)          I = the k greatest of s + bias          w_i = scale · s_i  or  scale · s_i / Σ_{j∈I} s_j,  i ∈ I

Normalised weights are made of the chosen logits alone, with m the greatest of them, so that nothing underflows:

    w_i = scale · softmax(l_I)_i          w_i ∝ exp(min(l_i, 0) − min(m, 0)) / (1 + exp(−|l_i|))

With p = w / scale and g = scale · dw, zero where nothing is chosen,

    dl_i = p_i (g_i − Σ_j p_j g_j) [1 − σ(l_i)]          where the sum is over what p is normalised by: I, every expert, or none

and the bracket is the sigmoid's. Residuals: the logits and the index. Sources: Shazeer et al. 2017, arXiv:1701.06538; groups and the bias
that only selects: DeepSeek-AI 2024, arXiv:2412.19437.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._check import dense, wide
from ._elementary import exp
from ._glu_rows import flag, number
from ._launch import Plan, cdiv, jit, next_power_of_2, rows_and_stride, tl
from ._vjp import Args, Needs, custom_vjp

EXPERTS = 1024  # at most: a warp holds a token's logits in its registers
TILE = 512  # logits that a program of one warp holds, so that no choice waits for another warp
Score = Literal["softmax", "sigmoid"]


class Groups(NamedTuple):
    """Experts in `count` equal groups, of which `keep` can be chosen from: the best by their two best experts, or by their best one."""

    count: int  # type: ignore[assignment]  # which a tuple has as a method
    keep: int
    by: Literal["top2", "max"] = "top2"


class Residuals(NamedTuple):
    """What the backward of `moe_router` needs. `aux` is the index."""

    logits: Tensor
    aux: Tensor
    score: str
    normalize: bool
    scale: float


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(
    logits: Tensor, bias: Tensor | None, k: int, score: str, normalize: bool, scale: float, count: int, keep: int, by: str,
    return_aux: bool,
) -> tuple[Tensor, Tensor] | Tensor:  # fmt: skip
    x = wide(logits)
    index = _choose(x.detach(), bias, k, score, count, keep, by)
    chosen = x.gather(-1, index)
    if score == "softmax":
        weight = torch.softmax(chosen, -1) if normalize else torch.softmax(x, -1).gather(-1, index)
    else:
        weight = torch.softmax(F.logsigmoid(chosen), -1) if normalize else torch.sigmoid(chosen)
    return (scale * weight, index) if return_aux else scale * weight


def _choose(x: Tensor, bias: Tensor | None, k: int, score: str, count: int, keep: int, by: str) -> Tensor:
    """The k greatest; of equals, the first. Logits stand for their scores, whose order is theirs, wherever nothing is added."""
    key = x
    if bias is not None or (count > 1 and by == "top2"):
        key = torch.softmax(x, -1) if score == "softmax" else torch.sigmoid(x)
    if bias is not None:
        key = key + bias.to(key.dtype)
    order = key.sort(dim=-1, descending=True, stable=True).indices
    if count > 1:
        of = key.unflatten(-1, (count, -1))
        best = of.topk(2, -1).values.sum(-1) if by == "top2" else of.amax(-1)
        kept = best.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
        out = torch.ones_like(best, dtype=torch.int32).scatter(-1, kept, 0).repeat_interleave(of.shape[-1], -1)
        order = order.gather(-1, out.gather(-1, order).sort(dim=-1, stable=True).indices)  # those of the kept groups first
    return order[..., :k].contiguous()


def _plain_fwd(
    logits: Tensor, bias: Tensor | None, k: int, score: str, normalize: bool, scale: float, count: int, keep: int, by: str,
    return_aux: bool, needs: Needs,
) -> tuple[Tensor, Residuals]:  # fmt: skip
    weight, index = _reference(logits, bias, k, score, normalize, scale, count, keep, by, True)
    return weight, Residuals(logits, index, score, normalize, scale)


def _plain_bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None]:
    if not needs[0]:
        return (None,)
    logits, index, score, normalize, scale = res
    x, softmax = wide(logits), score == "softmax"
    g = torch.zeros_like(x).scatter(-1, index, scale * dy.to(x.dtype))
    out = torch.ones_like(x, dtype=torch.bool).scatter(-1, index, False)
    if softmax or normalize:
        z = x if softmax else F.logsigmoid(x)
        p = torch.softmax(z.masked_fill(out, -torch.inf) if normalize else z, -1)
        for _ in range(2):  # what is left of equal ones is nothing
            g = g - (p * g).sum(-1, keepdim=True)
    else:
        p = torch.sigmoid(x)
    dx = p * g if softmax else p * g * torch.sigmoid(-x)
    return ((dx if softmax and not normalize else dx.masked_fill(out, 0.0)).to(logits.dtype),)


# --- kernels ----------------------------------------------------------------------------------------------------------------------------

_LEAST = tl.constexpr(-(2**31))  # below what `_ordered` makes of any number: taken, of no kept group, or no expert
_GREATEST = tl.constexpr(2**31 - 1)


@jit
def _ordered(x):
    """Integers in the order of the numbers: −0 is 0, and NaN the greatest, as in PyTorch's sort. A warp compares 32 of them at once."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, _GREATEST, bits ^ ((bits >> 31) & _GREATEST))


@jit
def _number(i):
    """What `_ordered` made `i` of."""
    return (i ^ ((i >> 31) & _GREATEST)).to(tl.float32, bitcast=True)


@jit
def _over_sum(e):
    return tl.div_rn(e, tl.sum(e, 1)[:, None] + tl.zeros_like(e))


@jit
def _sigmoid(x, EXACT: tl.constexpr):
    a = exp(-tl.abs(x), EXACT)
    return tl.div_rn(tl.where(x < 0.0, a, 1.0), 1.0 + a)


@jit
def _probability(x, chosen, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, EXACT: tl.constexpr):
    """p, of every logit of the rows; where it is not of all of them, the values at those not chosen mean nothing."""
    z = tl.where(chosen, x, float("-inf")) if NORMALIZE else x
    if not SIGMOID:
        p = _over_sum(exp(z - tl.max(z, 1)[:, None], EXACT))
    elif NORMALIZE:
        e = exp(tl.minimum(z, 0.0) - tl.minimum(tl.max(z, 1), 0.0)[:, None], EXACT)
        p = _over_sum(tl.div_rn(e, 1.0 + exp(-tl.abs(z), EXACT)))
    else:
        p = _sigmoid(x, EXACT)
    return p


@jit
def _without_weak_groups(
    key, count, keep, TOP2: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`key`, _LEAST where an expert is of a group that is not kept."""
    of = tl.reshape(key, (ROWS, GROUPS, BLOCK))
    group = tl.arange(0, GROUPS)[None, :]
    best = tl.max(of, 2)
    if TOP2:
        member = tl.arange(0, BLOCK)[None, None, :]
        first = tl.min(tl.where(of == best[:, :, None], member, BLOCK), 2)
        second = tl.max(tl.where(member == first[:, :, None], _LEAST, of), 2)
        best = tl.where(group < count, _ordered(_number(best) + _number(second)), _LEAST)
    for _ in range(keep):
        at = tl.min(tl.where(best == tl.max(best, 1)[:, None], group, GROUPS), 1)
        best = tl.where(group == at[:, None], _LEAST, best)
    return tl.reshape(tl.where(best[:, :, None] == _LEAST, of, _LEAST), (ROWS, GROUPS * BLOCK))


@jit
def _moe_router_fwd_kernel(
    x_ptr, b_ptr, w_ptr, i_ptr, stride, N, K, G, count, keep, scale, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
    TOP2: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """G experts to the group: a tile has a group to the row, so that the sizes of neither need be powers of two."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.arange(0, GROUPS)[:, None]
    member = tl.arange(0, BLOCK)[None, :]
    at = group * G + member
    real = (group < count) & (member < G)
    x = tl.load(x_ptr + row[:, None, None] * stride + at[None, :, :], mask=(row < N)[:, None, None] & real[None, :, :], other=float("-inf"))
    x = tl.reshape(x.to(tl.float32), (ROWS, GROUPS * BLOCK))
    expert = tl.reshape(tl.where(real, at, _GREATEST), (1, GROUPS * BLOCK))
    s = x
    if b_ptr is not None or (GROUPS > 1 and TOP2):
        s = _probability(x, x == x, SIGMOID, False, True)
    if b_ptr is not None:
        s += tl.reshape(tl.load(b_ptr + at, mask=real, other=0.0).to(tl.float32), (1, GROUPS * BLOCK))
    key = tl.where(expert < _GREATEST, _ordered(s), _LEAST)
    if GROUPS > 1:
        key = _without_weak_groups(key, count, keep, TOP2, ROWS, GROUPS, BLOCK)
    rank = tl.full((ROWS, GROUPS * BLOCK), -1, tl.int32)
    for i in range(K):
        first = tl.min(tl.where(key == tl.max(key, 1)[:, None], expert, _GREATEST), 1)
        taken = expert == first[:, None]
        rank = tl.where(taken, i, rank)
        key = tl.where(taken, _LEAST, key)
    chosen = rank >= 0
    w = _probability(x, chosen, SIGMOID, NORMALIZE, True) * scale
    keep_it = chosen & (row < N)[:, None]
    to = row[:, None] * K + rank
    tl.store(w_ptr + to, w, mask=keep_it)
    tl.store(i_ptr + to, (expert + tl.zeros_like(rank)).to(tl.int64), mask=keep_it)


@jit
def _moe_router_bwd_kernel(
    dw_ptr, x_ptr, i_ptr, dx_ptr, dw_stride, stride, N, K, E, scale, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
    EXACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK)[None, :]
    keep = (row < N)[:, None] & (expert < E)
    x = tl.load(x_ptr + row[:, None] * stride + expert, mask=keep, other=float("-inf")).to(tl.float32)
    g = tl.zeros((ROWS, BLOCK), tl.float32)
    chosen = g > 0.0
    for i in range(K):
        at = tl.load(i_ptr + row * K + i, mask=row < N, other=0).to(tl.int32)
        dw = tl.load(dw_ptr + row * dw_stride + i, mask=row < N, other=0.0).to(tl.float32) * scale
        taken = expert == at[:, None]
        g = tl.where(taken, dw[:, None], g)
        chosen = chosen | taken
    p = _probability(x, chosen, SIGMOID, NORMALIZE, EXACT)
    if NORMALIZE or not SIGMOID:
        for _ in tl.static_range(2):
            g -= tl.sum(p * g, 1)[:, None]
    dx = p * g
    if SIGMOID:
        dx *= _sigmoid(-x, EXACT)
    if NORMALIZE or SIGMOID:
        dx = tl.where(chosen, dx, 0.0)
    tl.store(dx_ptr + row[:, None] * E + expert, dx.to(dx_ptr.dtype.element_ty), mask=keep)


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


@lru_cache(1024)
def _plan(n: int, e: int, k: int, stride: int, score: str, normalize: bool, scale: float, count: int, keep: int, by: str) -> Plan:
    if keep == count:
        count = keep = 1
    groups, block = next_power_of_2(count), next_power_of_2(e // count)
    rows = max(1, TILE // (groups * block))
    return Plan(
        _moe_router_fwd_kernel, (cdiv(n, rows),), stride, n, k, e // count, count, keep, scale,
        SIGMOID=score == "sigmoid", NORMALIZE=normalize, TOP2=by == "top2", ROWS=rows, GROUPS=groups, BLOCK=block, num_warps=1,
    )  # fmt: skip


@lru_cache(1024)
def _bwd_plan(n: int, e: int, k: int, dw_stride: int, stride: int, score: str, normalize: bool, scale: float, exact: bool) -> Plan:
    block = next_power_of_2(e)
    rows = max(1, TILE // block)
    return Plan(
        _moe_router_bwd_kernel, (cdiv(n, rows),), dw_stride, stride, n, k, e, scale,
        SIGMOID=score == "sigmoid", NORMALIZE=normalize, EXACT=exact, ROWS=rows, BLOCK=block, num_warps=1,
    )  # fmt: skip


def _outputs(
    logits: Tensor, bias: Tensor | None, k: int, score: str, normalize: bool, scale: float, count: int, keep: int, by: str,
    return_aux: bool, needs: Needs,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape, dtype=_check.wide_dtype(logits)), logits.new_empty(shape, dtype=torch.int64)


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> tuple[Tensor | None]:
    return (dense(res.logits) if needs[0] else None,)


def _fwd(
    logits: Tensor, bias: Tensor | None, k: int, score: str, normalize: bool, scale: float, count: int, keep: int, by: str,
    return_aux: bool, needs: Needs,
) -> tuple[Tensor, Residuals]:  # fmt: skip
    weight, index = _outputs(logits, bias, k, score, normalize, scale, count, keep, by, return_aux, needs)
    rows, stride = rows_and_stride(logits)
    plan = _plan(index.numel() // k, logits.shape[-1], k, stride, score, normalize, scale, count, keep, by)
    plan(logits.device, rows, bias if bias is None else bias.contiguous(), weight, index)
    return weight, Residuals(logits, index, score, normalize, scale)


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None]:
    (dx,) = _gradients(res, dy, needs)
    if dx is None:
        return (None,)
    logits, index, score, normalize, scale = res
    (dw, dw_stride), (x, stride), k = rows_and_stride(dy), rows_and_stride(logits), index.shape[-1]
    n, e = index.numel() // k, logits.shape[-1]
    plan = _bwd_plan(n, e, k, dw_stride, stride, score, normalize, scale, logits.dtype is torch.float32)
    plan(logits.device, dw, x, index.contiguous(), dx)
    return (dx,)


# --- public function --------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(_fwd, _bwd),
    plain=(_plain_fwd, _plain_bwd),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: (res.aux.shape,),
    diff=1,
    aux=lambda flat, weight, index: (weight, index),
)
def moe_router(
    logits: Tensor,
    k: int,
    *,
    score: Score = "softmax",
    bias: Tensor | None = None,
    groups: Groups | tuple[int, int] | tuple[int, int, str] | None = None,
    normalize: bool = True,
    scale: float = 1.0,
) -> Args:
    r"""The k experts of each token, and their weights: `w = scale · s[index]`, over the sum of the chosen s if `normalize`.

    s is the softmax or the sigmoid of the logits. Chosen are the k greatest s + bias, in that order; of equals the lower index, so that the
    same logits always choose the same. Where nothing is added to s, the logits are compared, whose order is the same and which do not round
    to equals. A NaN counts as the greatest, as in PyTorch: its own weight is NaN, and every weight of a token that is normalised with it;
    indices are distinct and in range whatever the logits are.

    Args:
        logits: `[..., E]`, any strides, E from 1 to 1024; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        k: how many are chosen, from 1 to E, and at most what the kept groups hold. Each costs a pass over a token's logits in registers.
        score: "softmax" (Mixtral, Qwen, OLMoE, DeepSeek-V2, gpt-oss, Granite, …) or "sigmoid" (DeepSeek-V3, GLM, Llama 4, LFM2, …).
        bias: `[E]`, added to s for the choice alone; it has no gradient.
        groups: `Groups(count, keep, by)` or a tuple of these: experts are cut into `count` equal groups, and those of the `keep` best can
            be chosen. A group's score is the sum of its two best s + bias ("top2", the default; DeepSeek-V3) or its best ("max";
            DeepSeek-V2); of equals the first.
        normalize: divide by the sum of the chosen s. With a softmax this is the softmax of the chosen logits (gpt-oss, Granite). The sum is
            never added to and does not underflow: scores as small as σ(−1000) still have weights that sum to `scale`.
        scale: what weights are multiplied by (`routed_scaling_factor`).

    Returns:
        `(weight, index)`, both `[..., k]`: weight float32 (float64 of float64), index int64.
        Gradient: logits.

    Raises:
        TypeError: logits or bias are not of a float dtype, normalize is no bool, scale not a number.
        ValueError: logits have no axis or not 1 to 1024 experts, k outside its range, bias is not `[E]` or on another device, unknown
            score, groups that do not divide E, keep more than there are, or compare two experts of one.

    Examples:
        >>> weight, index = liger_fn.moe_router(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), 2)
        >>> weight, index
        (tensor([[0.5000, 0.5000]]), tensor([[1, 3]]))

    Source: Shazeer et al. 2017, arXiv:1701.06538; DeepSeek-AI 2024, arXiv:2405.04434 (groups), arXiv:2412.19437 (bias).
    """
    op = "moe_router"
    _check.floats(op, "logits", logits)
    _check.optional(op, bias=bias)
    e = logits.shape[-1]
    if not 1 <= e <= EXPERTS:
        raise ValueError(f"{op}: the last axis of logits must have 1 to {EXPERTS} experts, got shape {list(logits.shape)}; reshape logits")
    count, keep, by = _grouped(op, groups, e)
    most = e // count * keep
    if _check.integer(op, "k", k, 1) > most:
        raise ValueError(f"{op}: k must be at most {most}, the experts that can be chosen, got {k}; choose fewer or keep more groups")
    if bias is not None:
        _check.shape(op, "bias", bias, (e,), "the last axis of logits")
        _check.same_device(op, logits, bias=bias)
        bias = bias.detach()
    _check.choice(op, "score", score, ("softmax", "sigmoid"))
    rest = flag(op, "normalize", normalize), number(op, "scale", scale), count, keep, by, True
    return logits, bias, k, score, *rest


def _grouped(op: str, groups: Any, e: int) -> Groups:
    """`groups`, checked; one group of all where there are none."""
    if groups is None:
        return Groups(1, 1, "max")
    if not isinstance(groups, tuple) or not 2 <= len(groups) <= 3:
        raise ValueError(f"{op}: groups must be None or (count, keep, by), got {groups!r}")
    count, keep, by = Groups(*groups)
    _check.choice(op, "groups' by", by, ("top2", "max"))
    if e % _check.integer(op, "groups' count", count, 1):
        raise ValueError(f"{op}: groups' count must divide the {e} experts, got {count}; add logits of -inf to fill the last group")
    if _check.integer(op, "groups' keep", keep, 1) > count:
        raise ValueError(f"{op}: groups' keep must be at most their count, {count}, got {keep}")
    if by == "top2" and count == e > 1:
        raise ValueError(f'{op}: groups by "top2" must have at least 2 experts, got {count} groups of {e} experts; take fewer or by="max"')
    return Groups(count, keep, by)
