"""Answers of lesson 7."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from course import solution


@solution("7.1")
def merge(a, b):
    m = torch.maximum(a[0], b[0])
    safe = torch.where(m == -torch.inf, torch.zeros_like(m), m)
    return m, a[1] * torch.exp(a[0] - safe) + b[1] * torch.exp(b[0] - safe)


@triton.jit
def loss_kernel(z_ptr, target_ptr, loss_ptr, lse_ptr, stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m = -float("inf")
    s = 0.0
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * stride + col, mask=col < V, other=-float("inf")).to(tl.float32)
        new = tl.maximum(m, tl.max(z, 0))
        s = s * tl.exp(m - new) + tl.sum(tl.exp(z - new), 0)
        m = new
    lse = m + tl.log(s)
    target = tl.load(target_ptr + row)
    counts = target != -100
    at = tl.load(z_ptr + row * stride + target, mask=counts, other=0.0).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(counts, lse - at, 0.0))
    tl.store(lse_ptr + row, lse)


@solution("7.2")
def loss(z, target):
    N, V = z.shape
    out, lse = torch.empty(2, N, device=z.device)
    loss_kernel[(N,)](z, target, out, lse, z.stride(0), V, BLOCK=16)
    return out, lse


@triton.jit
def gradient_kernel(z_ptr, target_ptr, lse_ptr, g_ptr, dz_ptr, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row)
    z = tl.load(z_ptr + row * V + col, mask=col < V, other=0.0).to(tl.float32)
    p = tl.exp(z - tl.load(lse_ptr + row))
    dz = tl.load(g_ptr + row) * (p - tl.where(col == target, 1.0, 0.0))
    tl.store(dz_ptr + row * V + col, tl.where(target != -100, dz, 0.0).to(dz_ptr.dtype.element_ty), mask=col < V)


@solution("7.3")
def gradient(z, target, lse, g):
    N, V = z.shape
    dz = torch.empty_like(z)
    gradient_kernel[(N, triton.cdiv(V, 16))](z, target, lse, g, dz, V, BLOCK=16)
    return dz
