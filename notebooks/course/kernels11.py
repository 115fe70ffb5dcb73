"""RMSNorm forward and the sum of dw, from naive to fast: the kernels that lesson 11 times and compiles. Imported with or without the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def three_passes(x_ptr, w_ptr, y_ptr, r_ptr, stride, H, eps, BLOCK: tl.constexpr):
    """A block small enough for anything: the row is read once for its squares and again for y."""
    row = tl.program_id(0)
    total = 0.0
    for start in range(0, H, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + col, mask=col < H, other=0.0).to(tl.float32)
        total += tl.sum(x * x, 0)
    r = 1.0 / tl.sqrt(total / H + eps)
    tl.store(r_ptr + row, r)
    for start in range(0, H, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + col, mask=col < H, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * H + col, (x * r * w).to(y_ptr.dtype.element_ty), mask=col < H)


@triton.jit
def one_pass(x_ptr, w_ptr, y_ptr, r_ptr, stride, H, eps, BLOCK: tl.constexpr):
    """The whole row in registers."""
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + col, mask=col < H, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 0) / H + eps)
    tl.store(y_ptr + row * H + col, (x * r * w).to(y_ptr.dtype.element_ty), mask=col < H)
    tl.store(r_ptr + row, r)


@triton.jit
def strided(x_ptr, w_ptr, y_ptr, r_ptr, stride, col_stride, H, eps, BLOCK: tl.constexpr):
    """As one_pass, for any stride of the columns: the compiler cannot know that neighbours are neighbours."""
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + col * col_stride, mask=col < H, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 0) / H + eps)
    tl.store(y_ptr + row * H + col, (x * r * w).to(y_ptr.dtype.element_ty), mask=col < H)
    tl.store(r_ptr + row, r)


@triton.jit
def dw_atomic(dy_ptr, x_ptr, r_ptr, dw_ptr, H, BLOCK: tl.constexpr):
    """One row a program, added to dw in whatever order."""
    row = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * H + col, mask=col < H, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * H + col, mask=col < H, other=0.0).to(tl.float32)
    tl.atomic_add(dw_ptr + col, dy * x * tl.load(r_ptr + row), mask=col < H)


@triton.jit
def dw_shares(dy_ptr, x_ptr, r_ptr, shares_ptr, N, H, P, BLOCK: tl.constexpr):
    """P programs walk the rows and write a share each."""
    col = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0), N, P):
        x = tl.load(x_ptr + row * H + col, mask=col < H, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * H + col, mask=col < H, other=0.0).to(tl.float32)
        total += dy * x * tl.load(r_ptr + row)
    tl.store(shares_ptr + tl.program_id(0) * H + col, total, mask=col < H)
