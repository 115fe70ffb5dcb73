"""Likely wrong answers of lesson 6."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from course import mistake
from course.solutions.lesson06 import MLP
from course.solutions.lesson06 import in_place as right_in_place
from course.solutions.lesson06 import packed_backward as right


def _grads(gate, up, dy, approximate="none"):
    leaf = gate.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(leaf, approximate=approximate).sum(), leaf)
    return dy * up * slope, dy * F.gelu(gate, approximate=approximate)


@mistake("6.1", "second term")
def no_product_rule(gate, up, dy):
    return dy * up * 0.5 * (1 + torch.erf(gate / 2**0.5)), dy * F.gelu(gate)


@mistake("6.1", "tanh approximation")
def by_tanh(gate, up, dy):
    return _grads(gate, up, dy, "tanh")


@mistake("6.1", "factor up")
def without_up(gate, up, dy):
    return _grads(gate, torch.ones_like(up), dy)


@mistake("6.1", "dup = dy gelu(gate)")
def up_without_gelu(gate, up, dy):
    return _grads(gate, up, dy)[0], dy * gate


@mistake("6.2", "4 arrays", "silu(g) and h")
def eager(x, w_gate, w_up, w_down):
    return (F.silu(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T


class _KeepsH(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_gate, w_up, w_down):
        g, u = x @ w_gate.T, x @ w_up.T
        h = F.silu(g) * u
        ctx.save_for_backward(x, w_gate, w_up, w_down, g, u, h)
        return h @ w_down.T

    @staticmethod
    def backward(ctx, dy):
        x, w_gate, w_up, w_down, g, u, h = ctx.saved_tensors
        s, dh = torch.sigmoid(g), dy @ w_down
        dg, du = dh * u * (s + g * s * (1 - s)), dh * g * s
        return dg @ w_gate + du @ w_up, dg.T @ x, du.T @ x, dy.T @ h


@mistake("6.2", "3 arrays", "make it again")
def keeps_h(x, w_gate, w_up, w_down):
    return _KeepsH.apply(x, w_gate, w_up, w_down)


class _Attribute(MLP):
    @staticmethod
    def forward(ctx, x, w_gate, w_up, w_down):
        y = MLP.forward(ctx, x, w_gate, w_up, w_down)
        ctx.h = F.silu(x @ w_gate.T) * (x @ w_up.T)
        return y


@mistake("6.2", "ctx.h", "save_for_backward")
def on_ctx(x, w_gate, w_up, w_down):
    return _Attribute.apply(x, w_gate, w_up, w_down)


class _HalfOfDx(MLP):
    @staticmethod
    def backward(ctx, dy):
        x, w_gate, w_up, w_down, g, u = ctx.saved_tensors
        s = torch.sigmoid(g)
        dg = dy @ w_down * u * (s + g * s * (1 - s))
        return dg @ w_gate, *MLP.backward(ctx, dy)[1:]


@mistake("6.2", "gradient of x", "a sum of both")
def one_path(x, w_gate, w_up, w_down):
    return _HalfOfDx.apply(x, w_gate, w_up, w_down)


@mistake("6.3", "concatenation")
def by_cat(gate_up, dy):
    return torch.cat(right(gate_up, dy).chunk(2, -1), -1)


@mistake("6.3", "exchanged")
def other_order(gate_up, dy):
    out = right(gate_up, dy)
    half = out.shape[1] // 2
    return out.roll(half, 1)


@mistake("6.3", "overwritten")
def over_its_input(gate_up, dy):
    return gate_up.copy_(right(gate_up, dy))


@triton.jit
def _stores_early_kernel(gate_ptr, up_ptr, dh_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < n
    a = tl.load(gate_ptr + i, mask=keep, other=0.0)
    dh = tl.load(dh_ptr + i, mask=keep, other=0.0)
    s = tl.sigmoid(a)
    tl.store(gate_ptr + i, dh * tl.load(up_ptr + i, mask=keep, other=0.0) * (s + a * s * (1.0 - s)), mask=keep)
    again = tl.load(gate_ptr + i, mask=keep, other=0.0)
    value = again * tl.sigmoid(again)
    up = tl.load(up_ptr + i, mask=keep, other=0.0)
    tl.store(up_ptr + i, dh * value, mask=keep)
    tl.store(dh_ptr + i, value * up, mask=keep)


@mistake("6.4", "what dgate left", "before the first store")
def stores_early(gate, up, dh):
    _stores_early_kernel[(triton.cdiv(gate.numel(), 64),)](gate, up, dh, gate.numel(), BLOCK=64)
    return gate, up, dh


@mistake("6.4", "not in the memory of gate")
def new_memory(gate, up, dh):
    return right_in_place(gate.clone(), up.clone(), dh.clone())


@mistake("6.4", "h of 64", "as it came")
def h_forgotten(gate, up, dh):
    kept = dh.clone()
    right_in_place(gate, up, dh)
    return gate, up, dh.copy_(kept)


@triton.jit
def _no_mask_kernel(gate_ptr, up_ptr, dh_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, up, dh = tl.load(gate_ptr + i), tl.load(up_ptr + i), tl.load(dh_ptr + i)
    s = tl.sigmoid(a)
    tl.store(gate_ptr + i, dh * up * (s + a * s * (1.0 - s)))
    tl.store(up_ptr + i, dh * a * s)
    tl.store(dh_ptr + i, a * s * up)


@mistake("6.4", "beyond the 37", "mask")
def without_masks(gate, up, dh):
    _no_mask_kernel[(triton.cdiv(gate.numel(), 64),)](gate, up, dh, BLOCK=64)
    return gate, up, dh
