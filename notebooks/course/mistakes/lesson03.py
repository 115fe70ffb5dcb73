"""Likely wrong answers of lesson 3."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from course import mistake
from course.solutions.lesson03 import scale_add_kernel


@mistake("3.1", "elements behind z were overwritten")
def rounds_up(x, y, a):
    """Every program writes a whole block."""
    z = torch.empty_like(x)
    room = (x.numel() + 31) // 32 * 32
    grow = [torch.nn.functional.pad(t, (0, room - x.numel())) for t in (x, y)]
    if x.numel() and z.untyped_storage().nbytes() >= 4 * room:
        whole = z.as_strided((room,), (1,))
        scale_add_kernel[(room // 32,)](*grow, whole, a, room, BLOCK=32)
    else:
        z.copy_(a * x + y)
    return z


@triton.jit
def first_block_kernel(x_ptr, y_ptr, z_ptr, a, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(z_ptr + i, a * tl.load(x_ptr + i, mask=i < n) + tl.load(y_ptr + i, mask=i < n), mask=i < n)


@mistake("3.1", "Do all programs add their own offset")
def first_block_alone(x, y, a):
    z = torch.zeros_like(x)
    if x.numel():
        first_block_kernel[(triton.cdiv(x.numel(), 32),)](x, y, z, a, x.numel(), BLOCK=32)
    return z


@mistake("3.1", "an input was changed")
def in_place(x, y, a):
    return y.add_(x, alpha=a)


@triton.jit
def softmax_other(x_ptr, y_ptr, stride, C, OTHER: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + col, mask=col < C, other=OTHER)
    e = tl.exp(x - tl.max(x, 0)) if SHIFT else tl.exp(x)
    tl.store(y_ptr + row * C + col, e / tl.sum(e, 0), mask=col < C)


def _softmax(x, stride, other, shift):
    R, C = x.shape
    y = torch.empty(R, C, device=x.device)
    softmax_other[(R,)](x, y, stride, C, OTHER=other, SHIFT=shift, BLOCK=triton.next_power_of_2(C))
    return y


@mistake("3.2", "all values near -30", "`other` must be -inf")
def zeros_beyond_the_row(x):
    return _softmax(x, x.stride(0), 0.0, True)


@mistake("3.2", "large values", "subtract the row's maximum")
def no_maximum(x):
    return _softmax(x, x.stride(0), -float("inf"), False)


@mistake("3.2", "of a slice", "row * stride")
def contiguous_rows(x):
    return _softmax(x.as_strided(x.shape, (x.shape[1], 1)), x.shape[1], -float("inf"), True)


@triton.jit
def transpose_wrong(x_ptr, y_ptr, row_stride, col_stride, R, C, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    keep = (row < R) & (col < C)
    x = tl.load(x_ptr + row * row_stride + col * col_stride, mask=keep)
    tl.store(y_ptr + col * WIDE + row, x, mask=keep & (col * WIDE + row < R * C))


def _transpose(x, col_stride, wide):
    R, C = x.shape
    y = torch.zeros(C, R, device=x.device)
    transpose_wrong[(triton.cdiv(R, 16), triton.cdiv(C, 16))](x, y, x.stride(0), col_stride, R, C, WIDE=wide, BLOCK=16)
    return y


@mistake("3.3", "a slice", "`col_stride` apart")
def next_to_each_other(x):
    return _transpose(x, 1, x.shape[0])


@mistake("3.3", "16 x 48", "c * R + r")
def rows_as_wide_as_before(x):
    return _transpose(x, x.stride(1), x.shape[1])
