r"""Experts of a mixture: what they compute for one row, the definition, and an explicit forward and backward in plain PyTorch.

    a = x_t gateᵉᵀ + b      u = x_t upᵉᵀ + c      h = act(a, u)      o = h downᵉᵀ + d      y_t = Σ_j w_tj o_tj
    dw_tj = ⟨dy_t, o_tj⟩ = ⟨dy_t downᵉ, h⟩ + ⟨dy_t, d⟩        dh = w (dy_t downᵉ)        da = dh ∂h/∂a        du = dh ∂h/∂u
    dx_t = Σ_j da gateᵉ + du upᵉ        ddownᵉ = Σ dy_tᵀ (w h)        dgateᵉ = Σ daᵀ x_t        dupᵉ = Σ duᵀ x_t

with e the expert of slot (t, j). The activations, of which those without up have no u:

    silu, gelu_tanh, gelu      act(a) u, as in `_glu_rows.py`
    clamped_swiglu             a σ(α a) (u + 1)
    relu2                      max(a, 0)²

A limit clamps first: a to at most `limit`, u to ± `limit`. gate and up are packed in one weight, and so are a and u.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import wide
from ._glu_rows import _ACTS
from ._moe_routing import Routing

NAMES = {"silu": "silu", "gelu_tanh": "gelu_tanh", "gelu": "gelu", "clamped_swiglu": "silu", "relu2": "relu_squared"}
TERMS = 64  # of a product of fp32 that are summed at a time
Grads = tuple[Tensor | None, ...]  # of x, gate_up, down, topk_weight, gate_up_bias, down_bias


class How(NamedTuple):
    """What experts compute between the products."""

    activation: str
    packed: str
    limit: float  # infinity where there is none
    alpha: float

    @property
    def gated(self) -> bool:
        return self.activation != "relu2"

    @property
    def limited(self) -> float | None:
        """The limit, or None."""
        return None if math.isinf(self.limit) else self.limit


# --- the activation ---------------------------------------------------------------------------------------------------------------------


def _halves(gate_up: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """(a, u) of a packed last axis; without a gate, a alone, twice."""
    if not how.gated:
        return gate_up, gate_up
    if how.packed == "interleaved":
        return gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate_up.chunk(2, -1)
    return gate, up


def _packed(gate: Tensor, up: Tensor, how: How) -> Tensor:
    """The opposite."""
    if not how.gated:
        return gate
    return torch.stack((gate, up), -1).flatten(-2) if how.packed == "interleaved" else torch.cat((gate, up), -1)


def activated(gate_up: Tensor, how: How) -> Tensor:
    """h, by operations that autograd knows."""
    (a, u), act = _halves(gate_up, how), _ACTS[NAMES[how.activation]]
    if how.limited is not None:
        a, u = a.clamp(max=how.limit), u.clamp(-how.limit, how.limit)
    if how.activation == "clamped_swiglu":
        return a * torch.sigmoid(how.alpha * a) * (u + 1)
    return act.value(a) * u if how.gated else act.value(a)


def slopes(gate_up: Tensor, how: How) -> tuple[Tensor, Tensor, Tensor]:
    """h, ∂h/∂a and ∂h/∂u, in fp32 or fp64; without a gate, the second twice."""
    gate, up = _halves(wide(gate_up), how)
    act, shifted = _ACTS[NAMES[how.activation]], how.activation == "clamped_swiglu"
    if not how.gated:
        to_a = act.slope(gate)
        return act.value(gate), to_a, to_a
    a, u = (gate, up) if how.limited is None else (gate.clamp(max=how.limit), up.clamp(-how.limit, how.limit))
    by = how.alpha if shifted else 1.0
    value, slope, u = act.value(by * a) / by, act.slope(by * a), u + 1 if shifted else u
    to_a, to_u = slope * u, value
    if how.limited is not None:
        to_a, to_u = torch.where(gate <= how.limit, to_a, 0.0), torch.where(up.abs() <= how.limit, to_u, 0.0)
    return value * u, to_a, to_u


# --- definition -------------------------------------------------------------------------------------------------------------------------


def reference(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_weight: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    topk_index: Tensor, how: How,
) -> Tensor:  # fmt: skip
    """y: each expert over all tokens, zeros in place of those that did not choose it."""
    y = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        chosen = topk_index == e
        mine, weight = chosen.any(-1, keepdim=True), torch.where(chosen, topk_weight, 0.0).sum(-1, keepdim=True)
        rows = F.linear(torch.where(mine, x, 0.0), gate_up[e], None if gate_up_bias is None else gate_up_bias[e])
        rows = F.linear(activated(rows, how), down[e], None if down_bias is None else down_bias[e])
        y = y + torch.where(mine, rows * weight, 0.0).to(y.dtype)
    return y


# --- forward and backward, by rows sorted by expert -------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """The rows of one expert: those of a slice; or those to keep of all, on a device that the host would have to ask where they are."""

    e: int
    at: slice
    keep: Tensor | None

    def of(self, rows: Tensor) -> Tensor:
        return rows[self.at] if self.keep is None else torch.where(self.keep, rows, 0)

    def put(self, out: Tensor, rows: Tensor) -> None:
        out[self.at] = rows if self.keep is None else torch.where(self.keep, rows, out)


def _each(routing: Routing) -> list[_Rows]:
    """The experts that have rows, or all of them."""
    offsets = routing.offsets
    if offsets.device.type == "cpu":
        return [_Rows(e, slice(*ends), None) for e, ends in enumerate(pairwise(offsets.tolist())) if ends[0] < ends[1]]
    place = torch.arange(len(routing.order), device=offsets.device).unsqueeze(1)
    return [_Rows(e, slice(None), (place >= offsets[e]) & (place < offsets[e + 1])) for e in range(len(offsets) - 1)]


def _by_slot(rows: Tensor, routing: Routing, topk_weight: Tensor) -> Tensor:
    """`[P, …]` by place as `[T, k, …]` by slot; 0 where there is no place."""
    kept = routing.place.view(-1, *[1] * (rows.dim() - 1)) >= 0
    return torch.where(kept, rows[routing.place.clamp(min=0)], 0).view(*topk_weight.shape, *rows.shape[1:])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b. A GPU's libraries choose by the sizes in how many parts they sum, and so how much they round: of fp32, small parts are added."""
    terms = len(b)
    if a.dtype is not torch.float32 or a.device.type == "cpu" or terms <= TERMS:
        return a @ b
    return sum((a[:, k : k + TERMS] @ b[k : k + TERMS] for k in range(TERMS, terms, TERMS)), a[:, :TERMS] @ b[:TERMS])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype is not torch.float32:
        return F.linear(x, weight, bias)
    return _product(x, weight.T) if bias is None else _product(x, weight.T) + bias


def plain_inner(x: Tensor, gate_up: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
    """(a, u) of each place, packed `[P, N]`. x is `[T, H]`."""
    gu, xs = x.new_zeros(len(routing.order), gate_up.shape[1]), x[routing.token]
    for rows in _each(routing):
        rows.put(gu, _linear(rows.of(xs), gate_up[rows.e], None if bias is None else bias[rows.e]))
    return gu


def plain_outer(
    gu: Tensor, down: Tensor, topk_weight: Tensor, bias: Tensor | None, routing: Routing, how: How
) -> Tensor:  # fmt: skip
    """y `[T, H]`. topk_weight is `[T, k]`."""
    out = gu.new_zeros(len(gu), down.shape[1])
    for rows in _each(routing):
        h = slopes(rows.of(gu), how)[0].to(gu.dtype)
        rows.put(out, _linear(h, down[rows.e], None if bias is None else bias[rows.e]))
    weight = torch.where((routing.place >= 0).view(topk_weight.shape), topk_weight, 0)
    return (wide(_by_slot(out, routing, topk_weight)) * weight.unsqueeze(-1)).sum(1).to(gu.dtype)


def plain_backward(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, topk_weight: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    gu: Tensor, routing: Routing, how: How, needs: tuple[bool, ...],
) -> Grads:  # fmt: skip
    """The gradients that are wanted. dy and x are `[T, H]`, topk_weight `[T, k]`."""
    inputs = x, gate_up, down, topk_weight, gate_up_bias, down_bias
    wanted = [n and t is not None for n, t in zip(needs, inputs, strict=True)]
    _, dgate_up, ddown, _, dgate_up_bias, ddown_bias = (torch.zeros_like(t) if n else None for t, n in zip(inputs, wanted, strict=True))  # type: ignore[arg-type]
    xs, ds, ws = x[routing.token], dy[routing.token], wide(topk_weight).reshape(-1, 1)[routing.order]
    dxs, dws = wide(x).new_zeros(xs.shape), wide(x).new_zeros(len(gu))
    for rows in _each(routing):
        e, d, w = rows.e, rows.of(ds), rows.of(ws)
        h, to_a, to_u = slopes(rows.of(gu), how)
        if ddown is not None:
            ddown[e] = _product(d.T, (w * h).to(x.dtype))
        if ddown_bias is not None:
            ddown_bias[e] = (w * wide(d)).sum(0)
        if not any(wanted[i] for i in (0, 1, 3, 4)):
            continue
        dh = _product(wide(d), wide(down[e]))  # of which dw is a sum that plain PyTorch rounds once
        dw = (dh * h).sum(1) if down_bias is None else (dh * h).sum(1) + (wide(d) * wide(down_bias[e])).sum(1)
        rows.put(dws.unsqueeze(1), dw.unsqueeze(1))
        dgu = _packed(w * dh * to_a, w * dh * to_u, how).to(x.dtype)
        if dgate_up is not None:
            dgate_up[e] = _product(dgu.T, rows.of(xs))
        if dgate_up_bias is not None:
            dgate_up_bias[e] = wide(dgu).sum(0)
        if wanted[0]:
            rows.put(dxs, wide(_product(dgu, gate_up[e])))
    dx = _by_slot(dxs, routing, topk_weight).sum(1).to(x.dtype) if wanted[0] else None
    dtopk = _by_slot(dws, routing, topk_weight).to(topk_weight.dtype) if wanted[3] else None
    return dx, dgate_up, ddown, dtopk, dgate_up_bias, ddown_bias
