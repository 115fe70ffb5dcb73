"""Answers of lesson 6."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from course import solution


@triton.jit
def geglu_backward_kernel(gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < n
    a = tl.load(gate_ptr + i, mask=keep, other=0.0)
    up = tl.load(up_ptr + i, mask=keep, other=0.0)
    dy = tl.load(dy_ptr + i, mask=keep, other=0.0)
    phi = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
    density = tl.exp(-0.5 * a * a) * 0.3989422804014327
    tl.store(dgate_ptr + i, dy * up * (phi + a * density), mask=keep)
    tl.store(dup_ptr + i, dy * a * phi, mask=keep)


@solution("6.1")
def geglu_backward(gate, up, dy):
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    n = gate.numel()
    geglu_backward_kernel[(triton.cdiv(n, 64),)](gate, up, dy, dgate, dup, n, BLOCK=64)
    return dgate, dup


class MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_gate, w_up, w_down):
        g, u = x @ w_gate.T, x @ w_up.T
        ctx.save_for_backward(x, w_gate, w_up, w_down, g, u)
        return (F.silu(g) * u) @ w_down.T

    @staticmethod
    def backward(ctx, dy):
        x, w_gate, w_up, w_down, g, u = ctx.saved_tensors
        s, dh = torch.sigmoid(g), dy @ w_down
        a = g * s
        dg, du = dh * u * (s + a * (1 - s)), dh * a
        return dg @ w_gate + du @ w_up, dg.T @ x, du.T @ x, dy.T @ (a * u)


@solution("6.2")
def mlp(x, w_gate, w_up, w_down):
    return MLP.apply(x, w_gate, w_up, w_down)


@solution("6.3")
def packed_backward(gate_up, dy):
    gate, up = gate_up.chunk(2, -1)
    out = torch.empty_like(gate_up)
    dgate, dup = out.chunk(2, -1)
    s = torch.sigmoid(gate)
    torch.mul(dy, gate * s, out=dup)
    torch.mul(dy * up, s * (1 + gate * (1 - s)), out=dgate)
    return out


@triton.jit
def in_place_kernel(gate_ptr, up_ptr, dh_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < n
    a = tl.load(gate_ptr + i, mask=keep, other=0.0)
    up = tl.load(up_ptr + i, mask=keep, other=0.0)
    dh = tl.load(dh_ptr + i, mask=keep, other=0.0)
    s = tl.sigmoid(a)
    value = a * s
    tl.store(gate_ptr + i, dh * up * (s + value * (1.0 - s)), mask=keep)
    tl.store(up_ptr + i, dh * value, mask=keep)
    tl.store(dh_ptr + i, value * up, mask=keep)


@solution("6.4")
def in_place(gate, up, dh):
    n = gate.numel()
    in_place_kernel[(triton.cdiv(n, 64),)](gate, up, dh, n, BLOCK=64)
    return gate, up, dh
