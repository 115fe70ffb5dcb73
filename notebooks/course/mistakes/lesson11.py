"""Likely wrong answers of lesson 11."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from course import mistake
from course.kernels11 import two_walks
from course.solutions.lesson11 import programs


def _run(kernel, x, w, eps):
    N, H = x.shape
    y, r = torch.empty(N, H, dtype=x.dtype, device=x.device), torch.empty(N, device=x.device)
    kernel[(N,)](x, w, y, r, x.stride(0), H, eps, BLOCK=triton.next_power_of_2(H))
    return y, r


@mistake("11.1", "the row 2 times")
def walks_twice(x, w, eps):
    return _run(two_walks, x, w, eps)


@triton.jit
def by_block_kernel(x_ptr, w_ptr, y_ptr, r_ptr, stride, H, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + col, mask=col < H, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 0) / BLOCK + eps)
    tl.store(y_ptr + row * H + col, (x * r * w).to(y_ptr.dtype.element_ty), mask=col < H)
    tl.store(r_ptr + row, r)


@mistake("11.1", "divides by the block")
def divides_by_the_block(x, w, eps):
    return _run(by_block_kernel, x, w, eps)


@triton.jit
def hidden_kernel(x_ptr, w_ptr, y_ptr, r_ptr, stride, H, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + col, mask=col <= H - 1, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=col <= H - 1, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 0) / H + eps)
    tl.store(y_ptr + row * H + col, (x * r * w).to(y_ptr.dtype.element_ty), mask=col <= H - 1)
    tl.store(r_ptr + row, r)


@mistake("11.1", "narrow", "col < H")
def hides_its_mask(x, w, eps):
    return _run(hidden_kernel, x, w, eps)


@mistake("11.1", "not averaged")
def sums(x, w, eps):
    r = torch.rsqrt(x.float().square().sum(1) + eps)
    return (x * r[:, None] * w).to(x.dtype), r


@triton.jit
def by_width_kernel(x_ptr, w_ptr, y_ptr, r_ptr, stride, H, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * H + col, mask=col < H, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 0) / H + eps)
    tl.store(y_ptr + row * H + col, (x * r * w).to(y_ptr.dtype.element_ty), mask=col < H)
    tl.store(r_ptr + row, r)


@mistake("11.1", "first row is right", "x.stride(0)")
def takes_rows_for_contiguous(x, w, eps):
    return _run(by_width_kernel, x, w, eps)


@triton.jit(do_not_specialize=["stride", "H"])
def unchanged_kernel(x_ptr, a_ptr, s_ptr, stride, H, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    if EVEN:
        H = H // 16 * 16
    x = tl.load(x_ptr + row * stride + col, mask=col < H, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + row * H + col, mask=col < H, other=0.0).to(tl.float32)
    tl.store(s_ptr + row * H + col, (x + a).to(s_ptr.dtype.element_ty), mask=col < H)


@mistake("11.2", "one of the two loads is still narrow")
def forgets_the_stride(x, a):
    s = torch.empty_like(a)
    even = x.shape[1] % 16 == 0 and x.stride(0) % 16 == 0
    unchanged_kernel[(len(x),)](x, a, s, x.stride(0), x.shape[1], EVEN=even, BLOCK=triton.next_power_of_2(x.shape[1]))
    return s


@triton.jit(do_not_specialize=["stride", "H"])
def always_kernel(x_ptr, a_ptr, s_ptr, stride, H, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    first = tl.multiple_of(row * stride + col, 16)
    x = tl.load(x_ptr + first, mask=col < H // 16 * 16, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + row * H + col, mask=col < H // 16 * 16, other=0.0).to(tl.float32)
    tl.store(s_ptr + row * H + col, (x + a).to(s_ptr.dtype.element_ty), mask=col < H // 16 * 16)


@mistake("11.2", "when EVEN is false")
def always_even(x, a):
    s = torch.zeros_like(a)
    always_kernel[(len(x),)](x, a, s, x.stride(0), x.shape[1], EVEN=True, BLOCK=triton.next_power_of_2(x.shape[1]))
    return s


@triton.jit(do_not_specialize=["stride", "H"])
def promising_kernel(x_ptr, a_ptr, s_ptr, stride, H, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    keep = tl.max_constancy(col < H, 16)
    x = tl.load(x_ptr + tl.multiple_of(tl.max_contiguous(row * stride + col, 16), 16), mask=keep, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + tl.multiple_of(tl.max_contiguous(row * H + col, 16), 16), mask=keep, other=0.0).to(tl.float32)
    tl.store(s_ptr + row * H + col, (x + a).to(s_ptr.dtype.element_ty), mask=keep)


@mistake("11.2", "misaligned address")
def promises_what_is_not_so(x, a):
    s = torch.empty_like(a)
    promising_kernel[(len(x),)](x, a, s, x.stride(0), x.shape[1], EVEN=False, BLOCK=triton.next_power_of_2(x.shape[1]))
    return s


@mistake("11.3", "in eights")
def exact_registers(uses, held, needed):
    def count(use):
        return min(65536 // (use.registers * 32 * use.warps), 2048 // (32 * use.warps), 32, 228 * 1024 // (use.shared + 1024))

    return {w: n for w, use in uses.items() if not use.spilled and (n := count(use) * held) >= needed}


@mistake("11.3", "1 KiB more")
def what_it_asks_for(uses, held, needed):
    def count(use):
        registers = -(-use.registers // 8) * 8
        shared = 228 * 1024 // use.shared if use.shared else 32
        return min(65536 // (registers * 32 * use.warps), 2048 // (32 * use.warps), 32, shared)

    return {w: n for w, use in uses.items() if not use.spilled and (n := count(use) * held) >= needed}


@mistake("11.3", "it spills")
def spills(uses, held, needed):
    return {w: n for w, use in uses.items() if (n := programs(use) * held) >= needed}


@mistake("11.3", "one program's")
def one_program(uses, held, needed):
    return {w: held for w, use in uses.items() if not use.spilled}


@mistake("11.3", "at most 32 programs")
def any_number(uses, held, needed):
    def count(use):
        registers = -(-use.registers // 8) * 8
        return min(65536 // (registers * 32 * use.warps), 2048 // (32 * use.warps), 228 * 1024 // (use.shared + 1024))

    return {w: n for w, use in uses.items() if not use.spilled and (n := count(use) * held) >= needed}
