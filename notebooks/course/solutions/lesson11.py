"""Answers of lesson 11."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from course import solution


@triton.jit
def one_pass_kernel(x_ptr, w_ptr, y_ptr, r_ptr, stride, H, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + col, mask=col < H, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 0) / H + eps)
    tl.store(y_ptr + row * H + col, (x * r * w).to(y_ptr.dtype.element_ty), mask=col < H)
    tl.store(r_ptr + row, r)


@solution("11.1")
def one_pass(x, w, eps):
    N, H = x.shape
    y, r = torch.empty(N, H, dtype=x.dtype, device=x.device), torch.empty(N, device=x.device)
    one_pass_kernel[(N,)](x, w, y, r, x.stride(0), H, eps, BLOCK=triton.next_power_of_2(H))
    return y, r


@triton.jit(do_not_specialize=["stride", "H"])
def add_rows_kernel(x_ptr, a_ptr, s_ptr, stride, H, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    if EVEN:
        stride = stride // 16 * 16
        H = H // 16 * 16
    x = tl.load(x_ptr + row * stride + col, mask=col < H, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + row * H + col, mask=col < H, other=0.0).to(tl.float32)
    tl.store(s_ptr + row * H + col, (x + a).to(s_ptr.dtype.element_ty), mask=col < H)


@solution("11.2")
def add_rows(x, a):
    N, H = x.shape
    s = torch.empty_like(a)
    even = H % 16 == 0 and x.stride(0) % 16 == 0
    add_rows_kernel[(N,)](x, a, s, x.stride(0), H, EVEN=even, BLOCK=triton.next_power_of_2(H))
    return s


def programs(use):
    """Programs that a multiprocessor has room for."""
    registers = -(-use.registers // 8) * 8
    by_registers, by_threads = 65536 // (registers * 32 * use.warps), 2048 // (32 * use.warps)
    return min(by_registers, by_threads, 32, 228 * 1024 // (use.shared + 1024))


@solution("11.3")
def worth_timing(uses, held, needed):
    flying = {warps: programs(use) * held for warps, use in uses.items() if not use.spilled}
    return {warps: n for warps, n in flying.items() if n >= needed}
