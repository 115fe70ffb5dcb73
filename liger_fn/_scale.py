"""A gradient that forward made, times a cotangent that backward brings: `out = made · factor`, in place where that is wanted."""

from __future__ import annotations

from torch import Tensor

from ._check import wide
from ._launch import cdiv, jit, launch, tl


@jit
def _scale_kernel(made_ptr, factor_ptr, out_ptr, N, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    end = N
    if IN_PLACE:
        end = tl.where(factor == 1.0, 0, N)  # `loss.backward()` sends 1: nothing to read, nothing to write
    keep = at < end
    made = tl.load(made_ptr + at, mask=keep, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (made * factor).to(out_ptr.dtype.element_ty), mask=keep)


def kernel_scale(made: Tensor, factor: Tensor, out: Tensor) -> None:
    """In one Triton launch. `made` is contiguous."""
    launch(
        _scale_kernel, (cdiv(made.numel(), 2048),), made.device, made, factor, out, made.numel(),
        IN_PLACE=out is made, BLOCK=2048, num_warps=8,
    )  # fmt: skip


def plain_scale(made: Tensor, factor: Tensor, out: Tensor) -> None:
    """In plain PyTorch."""
    out.copy_(wide(made) * factor)  # a 0-dimensional factor would be rounded to made's dtype, were that half precision
