"""A gradient that forward made, times a cotangent that backward brings: `out = made · factor`, in place where that is wanted."""

from __future__ import annotations

from torch import Tensor

from ._check import wide
from ._launch import cdiv, jit, launch, processors, tl

BLOCK, RESIDENT = 4096, 8  # elements at a time; programs to a multiprocessor


@jit
def _scale_kernel(made_ptr, factor_ptr, out_ptr, L, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    end = L
    if IN_PLACE:
        end = tl.where(factor == 1.0, 0, L)  # `loss.backward()` sends 1: nothing to read, nothing to write
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, end, tl.num_programs(0).to(tl.int64) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        made = tl.load(made_ptr + at, mask=at < L, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (made * factor).to(out_ptr.dtype.element_ty), mask=at < L)


def kernel_scale(made: Tensor, factor: Tensor, out: Tensor) -> None:
    """In one Triton launch. `made` is contiguous."""
    n = made.numel()
    launch(
        _scale_kernel, (min(cdiv(n, BLOCK), RESIDENT * processors(made.device)),), made.device, made, factor, out, n,
        IN_PLACE=out is made, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def plain_scale(made: Tensor, factor: Tensor, out: Tensor) -> None:
    """In plain PyTorch."""
    out.copy_(wide(made) * factor)  # a 0-dimensional factor would be rounded to made's dtype, were that half precision
