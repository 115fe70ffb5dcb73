r"""Gated linear units: an activation of one half gates the other.

    SwiGLU:  s = sigmoid(gate)       y = gate s up
             dgate = dy up s (1 + gate (1 − s))          dup = dy gate s

Residuals: gate and up; the activation is computed again. Source: Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._check import wide
from ._launch import as_rows, cdiv, jit, launch, tl
from ._vjp import Args, Needs, custom_vjp

BLOCK, WARPS = 2048, 8  # 8 elements a thread: one 16-byte access for each half-precision tensor


class Residuals(NamedTuple):
    """What the backward of a GLU needs."""

    gate: Tensor
    up: Tensor


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _plain_fwd(gate: Tensor, up: Tensor, needs: Needs) -> tuple[Tensor, Residuals]:
    return _reference(gate, up), Residuals(gate, up)


def _plain_bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None, Tensor | None]:
    gate, up, d = wide(res.gate), wide(res.up), wide(dy)
    s = torch.sigmoid(gate)
    dgate = (d * up * s * (1 + gate * (1 - s))).to(res.gate.dtype) if needs[0] else None
    return dgate, (d * gate * s).to(res.up.dtype) if needs[1] else None


# --- kernels ----------------------------------------------------------------------------------------------------------------------------


@jit
def _place(blocks, BLOCK: tl.constexpr):
    """(row, columns) of this program, whose grid runs over the blocks of each row in turn."""
    pid = tl.program_id(0).to(tl.int64)
    return pid // blocks, (pid % blocks) * BLOCK + tl.arange(0, BLOCK)


@jit
def _fwd_kernel(gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, blocks, H, BLOCK: tl.constexpr):
    row, col = _place(blocks, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=col < H, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask=col < H, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * H + col, y.to(y_ptr.dtype.element_ty), mask=col < H)


@jit
def _bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dy_stride, gate_stride, up_stride, blocks, H, BLOCK: tl.constexpr
):  # fmt: skip
    row, col = _place(blocks, BLOCK)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask=col < H, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask=col < H, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    if dgate_ptr is not None:
        up = tl.load(up_ptr + row * up_stride + col, mask=col < H, other=0.0).to(tl.float32)
        dgate = dy * up * s * (1.0 + gate * (1.0 - s))
        tl.store(dgate_ptr + row * H + col, dgate.to(dgate_ptr.dtype.element_ty), mask=col < H)
    if dup_ptr is not None:
        tl.store(dup_ptr + row * H + col, (dy * gate * s).to(dup_ptr.dtype.element_ty), mask=col < H)


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


def _outputs(gate: Tensor, up: Tensor, needs: Needs) -> tuple[Tensor]:
    return (gate.new_empty(gate.shape),)


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> tuple[Tensor | None, Tensor | None]:
    return tuple(t.new_empty(t.shape) if n else None for t, n in zip(res, needs, strict=True))  # type: ignore[return-value]


def _rows(*tensors: Tensor) -> tuple[int, int, int, tuple[Tensor, ...]]:
    """(programs, blocks in a row, row length, the tensors as rows); contiguous tensors are one long row."""
    if all(t.is_contiguous() for t in tensors):
        rows = tuple(t.view(1, -1) for t in tensors)
    else:
        rows = tuple(as_rows(t) for t in tensors)
    n, h = rows[0].shape
    blocks = cdiv(h, BLOCK)
    return n * blocks, blocks, h, rows


def _fwd(gate: Tensor, up: Tensor, needs: Needs) -> tuple[Tensor, Residuals]:
    (y,) = _outputs(gate, up, needs)
    programs, blocks, h, (g, u) = _rows(gate, up)
    launch(_fwd_kernel, (programs,), gate.device, g, u, y, g.stride(0), u.stride(0), blocks, h, BLOCK=BLOCK, num_warps=WARPS)
    return y, Residuals(gate, up)


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None, Tensor | None]:
    dgate, dup = _gradients(res, dy, needs)
    programs, blocks, h, (d, g, u) = _rows(dy, *res)
    strides = d.stride(0), g.stride(0), u.stride(0)
    launch(_bwd_kernel, (programs,), dy.device, d, g, u, dgate, dup, *strides, blocks, h, BLOCK=BLOCK, num_warps=WARPS)
    return dgate, dup


# --- public function --------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(_fwd, _bwd),
    plain=(_plain_fwd, _plain_bwd),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: (res.gate.shape,),
    diff=2,
)
def swiglu(gate: Tensor, up: Tensor) -> Args:
    r"""SwiGLU: `y = silu(gate) up`, where `silu(a) = a sigmoid(a)`.

    Args:
        gate: any shape, rows of any stride; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        up: of gate's shape and dtype.

    Returns:
        y, of the same shape and dtype; the kernels compute in fp32 and round once. Gradients: gate and up.

    Raises:
        TypeError: a tensor is not of a float dtype, or the two dtypes differ.
        ValueError: shapes or devices differ, or the tensors are 0-dimensional.

    Example:
        >>> liger_fn.swiglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
        tensor([0.0000, 1.4621])

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    _check.floating("swiglu", gate=gate, up=up)
    _check.rank("swiglu", "gate", gate, 1)
    _check.shape("swiglu", "up", up, gate.shape, "the shape of gate")
    _check.same_dtype("swiglu", gate, up=up)
    _check.same_device("swiglu", gate, up=up)
    return gate, up
