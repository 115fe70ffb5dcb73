"""Answers of lesson 5."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from einops import rearrange

from course import solution


@solution("5.1")
def rotate_pairs(x, cos, sin, layout):
    r = cos.shape[-1]
    y = x.clone()
    first, second = (slice(0, r), slice(r, 2 * r)) if layout == "half" else (slice(0, 2 * r, 2), slice(1, 2 * r, 2))
    y[:, first] = x[:, first] * cos - x[:, second] * sin
    y[:, second] = x[:, second] * cos + x[:, first] * sin
    return y


@solution("5.2")
def to_halves(weight, heads):
    return rearrange(weight, "(h d pair) w -> (h pair d) w", h=heads, pair=2)


@triton.jit
def rope_kernel(q_ptr, cos_ptr, sin_ptr, y_ptr, b_stride, h_stride, t_stride, H, T, HALF: tl.constexpr):
    i, t = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = tl.arange(0, HALF)
    q = q_ptr + (i // H) * b_stride + (i % H) * h_stride + t * t_stride + j
    first, second = tl.load(q), tl.load(q + HALF)
    cos, sin = tl.load(cos_ptr + t * HALF + j), tl.load(sin_ptr + t * HALF + j)
    y = y_ptr + (i * T + t) * 2 * HALF + j
    tl.store(y, first * cos - second * sin)
    tl.store(y + HALF, second * cos + first * sin)


@solution("5.3")
def rope(q, cos, sin):
    B, H, T, D = q.shape
    y = torch.empty(B, H, T, D, device=q.device)
    rope_kernel[(B * H, T)](q, cos, sin, y, q.stride(0), q.stride(1), q.stride(2), H, T, HALF=D // 2)
    return y


@solution("5.4")
def backward(cos, sin, dy, layout):
    return rotate_pairs(dy, cos, -sin, layout)
