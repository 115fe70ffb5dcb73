"""RMSNorm from naive to fast: the kernels that lesson 11 shows, runs, times and compiles, and what launches them.

Each kernel uses `tl` and its arguments alone: `course.offline` compiles it from its text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import liger_fn


@triton.jit
def two_walks(x_ptr, w_ptr, y_ptr, r_ptr, stride, H, eps, BLOCK: tl.constexpr):
    """A block that is small for any row: the row is read for its squares, and once more for y."""
    row = tl.program_id(0).to(tl.int64)
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
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + col, mask=col < H, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 0) / H + eps)
    tl.store(y_ptr + row * H + col, (x * r * w).to(y_ptr.dtype.element_ty), mask=col < H)
    tl.store(r_ptr + row, r)


@triton.jit
def hinted(x_ptr, w_ptr, y_ptr, r_ptr, stride, H, eps, BLOCK: tl.constexpr):
    """As one_pass; x may leave the cache first, and y is not kept there: what is left of the cache is w's."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + col, mask=col < H, other=0.0, eviction_policy="evict_first").to(tl.float32)
    w = tl.load(w_ptr + col, mask=col < H, other=0.0, eviction_policy="evict_last").to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 0) / H + eps)
    tl.store(y_ptr + row * H + col, (x * r * w).to(y_ptr.dtype.element_ty), mask=col < H, cache_modifier=".cs")
    tl.store(r_ptr + row, r)


@triton.jit
def several_rows(x_ptr, w_ptr, y_ptr, r_ptr, stride, N, H, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS short rows a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    keep = (row < N)[:, None] & (col < H)
    x = tl.load(x_ptr + row[:, None] * stride + col, mask=keep, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 1) / H + eps)
    tl.store(y_ptr + row[:, None] * H + col, (x * r[:, None] * w).to(y_ptr.dtype.element_ty), mask=keep)
    tl.store(r_ptr + row, r, mask=row < N)


@triton.jit(do_not_specialize=["col_stride"])
def strided(x_ptr, w_ptr, y_ptr, r_ptr, stride, col_stride, H, eps, BLOCK: tl.constexpr):
    """As one_pass, for any stride of the columns: the compiler must not assume that it is 1."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + col * col_stride, mask=col < H, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 0) / H + eps)
    tl.store(y_ptr + row * H + col, (x * r * w).to(y_ptr.dtype.element_ty), mask=col < H)
    tl.store(r_ptr + row, r)


@triton.jit
def hidden_mask(x_ptr, w_ptr, y_ptr, r_ptr, stride, H, eps, BLOCK: tl.constexpr):
    """As one_pass; its mask is the same, `col < H`, said in another way."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    keep = col <= H - 1
    x = tl.load(x_ptr + row * stride + col, mask=keep, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, mask=keep, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 0) / H + eps)
    tl.store(y_ptr + row * H + col, (x * r * w).to(y_ptr.dtype.element_ty), mask=keep)
    tl.store(r_ptr + row, r)


@triton.jit
def chase(next_ptr, end_ptr, HOPS: tl.constexpr):
    """One load after the other: each address is what the last load brought."""
    i = 0
    for _ in range(HOPS):
        i = tl.load(next_ptr + i)
    tl.store(end_ptr, i)


@triton.jit
def backward_atomic(dy_ptr, x_ptr, w_ptr, r_ptr, dx_ptr, dw_ptr, H, BLOCK: tl.constexpr):
    """One row a program; its share of dw is added to the sum in memory, in whatever order programs end."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * H + col, mask=col < H, other=0.0).to(tl.float32) * tl.load(r_ptr + row)
    dy = tl.load(dy_ptr + row * H + col, mask=col < H, other=0.0).to(tl.float32)
    g = dy * tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)
    dx = tl.load(r_ptr + row) * (g - x * (tl.sum(g * x, 0) / H))
    tl.store(dx_ptr + row * H + col, dx.to(dx_ptr.dtype.element_ty), mask=col < H)
    tl.atomic_add(dw_ptr + col, dy * x, mask=col < H)


@triton.jit
def backward_shares(dy_ptr, x_ptr, w_ptr, r_ptr, dx_ptr, shares_ptr, N, H, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Programs take turns through the rows, keep the weight and a share of dw in registers, and load STAGES - 1 rows ahead."""
    col = tl.arange(0, BLOCK)
    w = tl.load(w_ptr + col, mask=col < H, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0), num_stages=STAGES):
        r = tl.load(r_ptr + row)
        x = tl.load(x_ptr + row * H + col, mask=col < H, other=0.0).to(tl.float32) * r
        dy = tl.load(dy_ptr + row * H + col, mask=col < H, other=0.0).to(tl.float32)
        g = dy * w
        tl.store(dx_ptr + row * H + col, (r * (g - x * (tl.sum(g * x, 0) / H))).to(dx_ptr.dtype.element_ty), mask=col < H)
        dw += dy * x
    tl.store(shares_ptr + tl.program_id(0).to(tl.int64) * H + col, dw, mask=col < H)


# --- launches ---------------------------------------------------------------------------------------------------------------------------


def launch(kernel: Any, x: Tensor, w: Tensor, *, warps: int = 4, block: int | None = None, eps: float = 1e-6) -> Tensor:
    """y of a forward with one row a program."""
    y, r = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(len(x), device=x.device)
    block = block or triton.next_power_of_2(x.shape[1])
    kernel[(len(x),)](x, w, y, r, x.stride(0), x.shape[1], eps, BLOCK=block, num_warps=warps)
    return y


def launch_rows(x: Tensor, w: Tensor, rows: int, warps: int, eps: float = 1e-6) -> Tensor:
    """y of a forward with `rows` rows a program."""
    (n, h), y, r = x.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(len(x), device=x.device)
    block = triton.next_power_of_2(h)
    several_rows[(triton.cdiv(n, rows),)](x, w, y, r, x.stride(0), n, h, eps, ROWS=rows, BLOCK=block, num_warps=warps)
    return y


def by_atomics(dy: Tensor, x: Tensor, w: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dw) of contiguous rows."""
    dx, dw = torch.empty_like(x), torch.zeros(x.shape[1], device=x.device)
    backward_atomic[(len(x),)](dy, x, w, r, dx, dw, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=8)
    return dx, dw


def by_shares(dy: Tensor, x: Tensor, w: Tensor, r: Tensor, programs: int, stages: int) -> tuple[Tensor, Tensor]:
    """(dx, dw) of contiguous rows, by so many programs, which have rows in so many stages: computed now, or loaded ahead."""
    dx, shares = torch.empty_like(x), torch.empty(programs, x.shape[1], device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    backward_shares[(programs,)](dy, x, w, r, dx, shares, *x.shape, BLOCK=block, STAGES=stages, num_warps=8)
    return dx, shares.sum(0)


# --- what is compared, and inputs of a size to time -------------------------------------------------------------------------------------


def truth(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    """y in fp64, on the CPU."""
    x, w = x.cpu().double(), w.cpu().double()
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps) * w


def plain(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    """y by plain PyTorch, with statistics in fp32."""
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * w


def several(n: int, what: str) -> str:
    """`1 warp`, `2 warps`."""
    return f"{n} {what}{'s' * (n > 1)}"


def forward_of(fn: Callable[[Tensor, Tensor], object], n: int, h: int, begin: int = 0) -> Callable[[], Callable[[], object]]:
    """For `course.timed`: `fn(x, w)` on n rows of h, in bf16, which begin `begin` elements into wider ones."""

    def prepare() -> Callable[[], object]:
        x, w = torch.randn(n, h + begin, device="cuda").bfloat16()[:, begin:], torch.ones(h, device="cuda").bfloat16()
        return lambda: fn(x, w)

    return prepare


def backward_of(fn: Callable[..., object], n: int, h: int) -> Callable[[], Callable[[], object]]:
    """For `course.timed`: `fn(dy, x, w, r)` on n rows of h, in bf16."""

    def prepare() -> Callable[[], object]:
        dy, x = torch.randn(2, n, h, device="cuda").bfloat16()
        w, r = torch.ones(h, device="cuda").bfloat16(), torch.rand(n, device="cuda")
        return lambda: fn(dy, x, w, r)

    return prepare


def library_backward(n: int, h: int) -> Callable[[], Callable[[], object]]:
    """For `course.timed`: the backward of `liger_fn.rms_norm`, with the weight's gradient."""

    def prepare() -> Callable[[], object]:
        x, dy = torch.randn(2, n, h, device="cuda").bfloat16()
        _, residuals = liger_fn.rms_norm.fwd(x, torch.ones(h, device="cuda").bfloat16())
        return lambda: liger_fn.rms_norm.bwd(residuals, dy, needs=(True, True))

    return prepare


def chasing(hops: int) -> Callable[[], Callable[[], object]]:
    """For `course.timed`: so many loads, one after the other, 4 KB apart."""

    def prepare() -> Callable[[], object]:
        following = ((torch.arange(2**26, device="cuda") + 1024) % 2**26).int()
        end = torch.empty(1, device="cuda", dtype=torch.int32)
        return lambda: chase[(1,)](following, end, HOPS=hops, num_warps=1)

    return prepare
