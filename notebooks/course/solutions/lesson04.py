"""Answers of lesson 4."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from course import solution


@triton.jit
def forward_kernel(x_ptr, w_ptr, y_ptr, r_ptr, stride, H, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + col, mask=col < H, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 0) / H + eps)
    tl.store(y_ptr + row * H + col, (x * r * w).to(y_ptr.dtype.element_ty), mask=col < H)
    tl.store(r_ptr + row, r)


@solution("4.1")
def forward(x, w, eps):
    N, H = x.shape
    y, r = torch.empty(N, H, dtype=x.dtype, device=x.device), torch.empty(N, device=x.device)
    forward_kernel[(N,)](x, w, y, r, x.stride(0), H, eps, BLOCK=triton.next_power_of_2(H))
    return y, r


@triton.jit
def dx_kernel(dy_ptr, x_ptr, w_ptr, r_ptr, dx_ptr, H, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    keep = col < H
    x = tl.load(x_ptr + row * H + col, mask=keep, other=0.0)
    g = tl.load(dy_ptr + row * H + col, mask=keep, other=0.0) * tl.load(w_ptr + col, mask=keep, other=0.0)
    r = tl.load(r_ptr + row)
    tl.store(dx_ptr + row * H + col, r * g - x * r * r * r * (tl.sum(g * x, 0) / H), mask=keep)


@solution("4.2")
def dx(dy, x, w, r):
    out = torch.empty_like(x)
    dx_kernel[(len(x),)](dy, x, w, r, out, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return out


@triton.jit
def shares_kernel(dy_ptr, x_ptr, r_ptr, shares_ptr, N, H, P, BLOCK: tl.constexpr):
    col = tl.arange(0, BLOCK)
    keep = col < H
    total = tl.zeros((BLOCK,), tl.float32)
    for n in range(tl.program_id(0), N, P):
        x = tl.load(x_ptr + n * H + col, mask=keep, other=0.0)
        dy = tl.load(dy_ptr + n * H + col, mask=keep, other=0.0)
        total += dy * x * tl.load(r_ptr + n)
    tl.store(shares_ptr + tl.program_id(0) * H + col, total, mask=keep)


@solution("4.3")
def dw(dy, x, r, programs):
    N, H = x.shape
    shares = torch.empty(programs, H, device=x.device)
    shares_kernel[(programs,)](dy, x, r, shares, N, H, programs, BLOCK=triton.next_power_of_2(H))
    return shares.sum(0)
