"""Likely wrong answers of lesson 5."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from einops import rearrange

from course import mistake
from course.solutions.lesson05 import rope, rotate_pairs


@mistake("5.1", "turns the other way")
def other_way(x, cos, sin, layout):
    return rotate_pairs(x, cos, -sin, layout)


@mistake("5.1", "the pairs of the layout 'half'")
def one_layout(x, cos, sin, layout):
    return rotate_pairs(x, cos, sin, "half")


@mistake("5.1", "columns 6 to 9", "stay")
def forgets_the_rest(x, cos, sin, layout):
    r = cos.shape[-1]
    y = torch.zeros_like(x)
    y[:, : 2 * r] = rotate_pairs(x[:, : 2 * r], cos, sin, layout)
    return y


@mistake("5.1", "x was changed")
def in_place(x, cos, sin, layout):
    return x.copy_(rotate_pairs(x, cos, sin, layout))


@mistake("5.2", "unchanged")
def as_it_is(weight, heads):
    return weight


@mistake("5.2", "other way", "halves to interleaved")
def other_order(weight, heads):
    return rearrange(weight, "(h pair d) w -> (h d pair) w", h=heads, pair=2)


@mistake("5.2", "Rows of different heads")
def over_heads(weight, heads):
    return rearrange(weight, "(d pair) w -> (pair d) w", pair=2)


@mistake("5.3", "a view", "are its strides")
def as_if_contiguous(q, cos, sin):
    B, H, T, D = q.shape
    flat = q.as_strided(q.shape, (H * T * D, T * D, D, 1))
    return rope(flat.clone(), cos, sin)


@mistake("5.3", "overwritten")
def over_q(q, cos, sin):
    return q.copy_(rope(q, cos, sin))


@mistake("5.3", "turns the other way")
def minus_forgotten(q, cos, sin):
    return rope(q, cos, -sin)


@mistake("5.3", "was copied")
def a_copy_first(q, cos, sin):
    return rope(q.contiguous(), cos, sin)


@triton.jit
def _first_row_kernel(q_ptr, cos_ptr, sin_ptr, y_ptr, b_stride, h_stride, t_stride, H, T, HALF: tl.constexpr):
    i, t = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = tl.arange(0, HALF)
    q = q_ptr + (i // H) * b_stride + (i % H) * h_stride + t * t_stride + j
    first, second = tl.load(q), tl.load(q + HALF)
    cos, sin = tl.load(cos_ptr + j), tl.load(sin_ptr + j)  # of position 0, whatever t is
    y = y_ptr + (i * T + t) * 2 * HALF + j
    tl.store(y, first * cos - second * sin)
    tl.store(y + HALF, second * cos + first * sin)


@mistake("5.3", "angles of position 0")
def one_row_of_the_tables(q, cos, sin):
    B, H, T, D = q.shape
    y = torch.empty(B, H, T, D, device=q.device)
    _first_row_kernel[(B * H, T)](q, cos, sin, y, q.stride(0), q.stride(1), q.stride(2), H, T, HALF=D // 2)
    return y


@mistake("5.4", "forward again")
def forward_again(cos, sin, dy, layout):
    return rotate_pairs(dy, cos, sin, layout)


@mistake("5.4", "the inverse")
def inverse(cos, sin, dy, layout):
    size = cos**2 + sin**2
    return rotate_pairs(dy, cos / size, -sin / size, layout)


@mistake("5.4", "passed through")
def rest_forgotten(cos, sin, dy, layout):
    r = cos.shape[-1]
    out = torch.zeros_like(dy)
    out[:, : 2 * r] = rotate_pairs(dy[:, : 2 * r], cos, -sin, layout)
    return out
