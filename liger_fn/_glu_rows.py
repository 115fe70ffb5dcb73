r"""Rows of gated linear units: an activation of one tensor times another, shared by all ops of the family.

    a = m gate          y = n act(a) up          dgate = n m dy up act′(a)          dup = n dy act(a)

with m, n the multipliers of gate and up, and up = 1 where there is none. The activations, with σ(p) = 1 / (1 + e⁻ᵖ):

    silu          a σ(a)                 σ(a) + a σ(a) σ(−a)
    gelu_tanh     a σ(p)                 σ(p) + a σ(p) σ(−p) p′          p = √(8/π) (a + 0.044715 a³)
    gelu          a Φ(a)                 Φ(a) + a φ(a)                   Φ, φ: the normal distribution and its density
    relu          max(a, 0)              1 where a > 0
    relu_squared  max(a, 0)²             2 max(a, 0)

(1 + tanh(u)) / 2 is σ(2u), which neither overflows nor cancels. Source: Shazeer 2020, arXiv:2002.05202; So et al. 2021, arXiv:2109.08668.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from ._check import wide
from ._elementary import exp, over
from ._launch import Plan, as_rows, cdiv, jit, next_power_of_2, tl, warps

BLOCK, PER_WARP = 2048, 256  # 8 elements a thread: one 16-byte access for each half-precision tensor
How = tuple[str, float, float]  # the activation, and the multipliers of gate and up
Cut = tuple[int, int, tuple[int, ...]]  # rows, columns, and the stride of each tensor's rows, in the order of the kernel's pointers


# --- plain PyTorch ----------------------------------------------------------------------------------------------------------------------


def _sigmoid_slope(a: Tensor, p: Tensor, dp: Tensor | float) -> Tensor:
    """The derivative of a σ(p)."""
    s = torch.sigmoid(p)
    rest = torch.where(p > 2.3, torch.sigmoid(-p), 1 - s)  # 1 − s cancels for large p; elsewhere it makes up for the error of s
    return s + a * (s * rest) * dp


def _gelu_tanh_slope(a: Tensor) -> Tensor:
    q = a.square().clamp(max=1e4)  # beyond that σ is 0 or 1, and a⁴ may be too large
    return _sigmoid_slope(a, a * (1.5957691216057308 + 0.07135481282553426 * q), 1.5957691216057308 + 0.21406443847660277 * q)


def _gelu_slope(a: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(a * 0.7071067811865476)) + a * torch.exp(-0.5 * a.square()) * 0.3989422804014327


class _Act(NamedTuple):
    """One activation and its derivative."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


_ACTS = {
    "silu": _Act(F.silu, lambda a: _sigmoid_slope(a, a, 1.0)),
    "gelu_tanh": _Act(lambda a: F.gelu(a, approximate="tanh"), _gelu_tanh_slope),
    "gelu": _Act(F.gelu, _gelu_slope),
    "relu": _Act(F.relu, lambda a: torch.where(a <= 0, 0.0, 1.0).to(a.dtype)),
    "relu_squared": _Act(lambda a: F.relu(a).square(), lambda a: 2 * F.relu(a)),
}


def plain_forward(gate: Tensor, up: Tensor | None, how: How) -> Tensor:
    """The definition: every operation rounds to the dtype of its inputs."""
    act, gate_by, up_by = how
    y = _ACTS[act].value(gate if gate_by == 1.0 else gate * gate_by)
    y = y if up is None else y * up
    return y if up_by == 1.0 else y * up_by


def plain_backward(dy: Tensor, gate: Tensor, up: Tensor | None, how: How, needs: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """(dgate, dup), each where it is wanted; rounded once."""
    act, gate_by, up_by = how
    a, d = wide(gate) * gate_by, wide(dy) * up_by
    dgate = dup = None
    if needs[0]:
        dgate = ((d if up is None else d * wide(up)) * _ACTS[act].slope(a) * gate_by).to(gate.dtype)
    if needs[1]:
        dup = (d * _ACTS[act].value(a)).to(gate.dtype)
    return dgate, dup


# --- kernels ----------------------------------------------------------------------------------------------------------------------------


@jit
def _place(blocks, H, BLOCK: tl.constexpr):
    """(row, first column, offsets, which of them exist) of this program, whose grid runs over the blocks of each row in turn."""
    pid = tl.program_id(0)
    start = (pid % blocks).to(tl.int64) * BLOCK
    left = tl.minimum(H - start, BLOCK).to(tl.int32)
    at = tl.arange(0, BLOCK)
    return (pid // blocks).to(tl.int64), start, at, at < left


_CODES = {name: i for i, name in enumerate(_ACTS)}
_GELU_TANH, _GELU, _RELU, _RELU_SQUARED = (tl.constexpr(_CODES[name]) for name in ("gelu_tanh", "gelu", "relu", "relu_squared"))


@jit
def _activation(a, ACT: tl.constexpr, EXACT: tl.constexpr = False):
    """act(a) and act′(a). EXACT: where they are rounded to fp32, of which the hardware's exp and division miss bits."""
    if ACT == _RELU:
        value = tl.where(a <= 0.0, 0.0, a)  # so that NaN stays
        slope = tl.where(a <= 0.0, 0.0, 1.0)
    elif ACT == _RELU_SQUARED:
        r = tl.where(a <= 0.0, 0.0, a)
        value = r * r
        slope = 2.0 * r
    elif ACT == _GELU:
        c = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
        value = a * c
        slope = c + a * exp(-0.5 * a * a, EXACT) * 0.3989422804014327
    else:
        p, dp = a, 1.0
        if ACT == _GELU_TANH:
            q = tl.minimum(a * a, 1e4)  # beyond that σ is 0 or 1, and a⁴ may be too large
            p = a * (1.5957691216057308 + 0.07135481282553426 * q)
            dp = 1.5957691216057308 + 0.21406443847660277 * q
        t = exp(-tl.abs(p), EXACT)
        r = over(1.0, 1.0 + t, EXACT)
        value = over(tl.where(p < 0.0, a * t, a), 1.0 + t, EXACT)
        s = tl.where(p < 0.0, t * r, r)
        # σ(−p): 1 − s cancels for large p; elsewhere it makes up for the error of s
        slope = s + a * (s * tl.where((p > 0.0) & (t < 0.1), t * r, 1.0 - s)) * dp
    return value, slope


@jit
def _glu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, y_stride, blocks, H, gate_by, up_by,
    ACT: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, start, at, keep = _place(blocks, H, BLOCK)
    if PACKED:  # each row of one tensor is gate, then up
        up_ptr += H
    gate = tl.load(gate_ptr + (row * gate_stride + start) + at, mask=keep, other=0.0).to(tl.float32)
    if up_ptr is not None:
        up = tl.load(up_ptr + (row * up_stride + start) + at, mask=keep, other=0.0).to(tl.float32)
    y, _ = _activation(gate * gate_by, ACT)
    if up_ptr is not None:
        y *= up
    tl.store(y_ptr + (row * y_stride + start) + at, (y * up_by).to(y_ptr.dtype.element_ty), mask=keep)


@jit
def _glu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, y_ptr, dy_stride, gate_stride, up_stride, dgate_stride, dup_stride, y_stride,
    blocks, H, gate_by, up_by, ACT: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # Everything is loaded before anything is stored: the outputs may be the inputs' own memory.
    row, start, at, keep = _place(blocks, H, BLOCK)
    if PACKED:
        up_ptr += H
        dup_ptr += H
    dy = tl.load(dy_ptr + (row * dy_stride + start) + at, mask=keep, other=0.0).to(tl.float32) * up_by
    gate = tl.load(gate_ptr + (row * gate_stride + start) + at, mask=keep, other=0.0).to(tl.float32)
    # dup alone does without up
    if up_ptr is not None and (dgate_ptr is not None or y_ptr is not None):
        up = tl.load(up_ptr + (row * up_stride + start) + at, mask=keep, other=0.0).to(tl.float32)
    value, slope = _activation(gate * gate_by, ACT)
    if dgate_ptr is not None:
        dgate = dy * slope * gate_by
        if up_ptr is not None:
            dgate *= up
        tl.store(dgate_ptr + (row * dgate_stride + start) + at, dgate.to(dgate_ptr.dtype.element_ty), mask=keep)
    if dup_ptr is not None:
        tl.store(dup_ptr + (row * dup_stride + start) + at, (dy * value).to(dup_ptr.dtype.element_ty), mask=keep)
    if y_ptr is not None:
        y = value * up * up_by
        tl.store(y_ptr + (row * y_stride + start) + at, y.to(y_ptr.dtype.element_ty), mask=keep)


# --- launches ---------------------------------------------------------------------------------------------------------------------------


def rows_of(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as the launches below take them: as they are where all are contiguous, else as rows."""
    for t in tensors:
        if not t.is_contiguous():
            return tuple(as_rows(t) for t in tensors)
    return tensors


@lru_cache(1024)
def _plan(cut: Cut, how: How, packed: bool, backward: bool) -> Plan:
    n, h, strides = cut
    (act, *by), columns = how, min(BLOCK, next_power_of_2(h))
    blocks = cdiv(h, columns)
    return Plan(
        _glu_bwd_kernel if backward else _glu_fwd_kernel, (n * blocks,), *strides, blocks, h, *by,
        ACT=_CODES[act], PACKED=packed, BLOCK=columns, num_warps=warps(columns, PER_WARP),
    )  # fmt: skip


def _cut(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...], first: Tensor) -> Cut:
    """Contiguous tensors are one long row. Outputs are as the inputs are."""
    for t in inputs:
        if t is not None and not t.is_contiguous():
            n, h = first.shape
            return n, h, tuple([0 if t is None else t.stride(0) for t in inputs + outputs])
    return 1, first.numel(), (0,) * (len(inputs) + len(outputs))


def kernel_forward(gate: Tensor, up: Tensor | None, y: Tensor, how: How, packed: Cut | None = None) -> None:
    """Write y. All are contiguous, or `[n, h]` and dense in the last axis.

    packed: gate and up are both the one tensor whose rows are gate, then up, and this is how it is cut.
    """
    _plan(packed or _cut((gate, up), (y,), gate), how, packed is not None, False)(gate.device, gate, up, y)


def kernel_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, dgate: Tensor | None, dup: Tensor | None, how: How, y: Tensor | None = None,
    packed: Cut | None = None,
) -> None:  # fmt: skip
    """Write what is given of dgate, dup and y, each of which may be the memory of dy, gate or up. All are as in `kernel_forward`."""
    cut = packed or _cut((dy, gate, up), (dgate, dup, y), dy)
    _plan(cut, how, packed is not None, True)(dy.device, dy, gate, up, dgate, dup, y)


# --- donation ---------------------------------------------------------------------------------------------------------------------------


def reusable(t: Tensor, rows: Tensor, others: Sequence[Tensor]) -> bool:
    """May the gradient of `t` be written over it? `rows` is what kernels read of it, `others` what else they read or write: see `rows_of`.

    Not where the rows are a copy, share elements with each other (an expanded tensor) or with another tensor; and not over a leaf of the
    graph, whose memory is the caller's for good.
    """
    rows, *others = [r.view(1, -1) if r.is_contiguous() else r for r in (rows, *others)]
    n, h = rows.shape
    own = rows.data_ptr() == t.data_ptr() and (n == 1 or rows.stride(0) >= h)
    return own and not (t.is_leaf and t.requires_grad) and all(_apart(rows, other) for other in others)


def _apart(a: Tensor, b: Tensor) -> bool:
    """Have two `[n, h]` tensors no element in common? Either their memory is one after the other, or rows of one stride alternate."""
    if a.numel() == 0 or b.numel() == 0:
        return True
    (first, last), (other_first, other_last) = _span(a), _span(b)
    if last <= other_first or other_last <= first:
        return True
    stride, size = a.stride(0), a.element_size()
    if b.stride(0) != stride or b.element_size() != size or stride <= 0:
        return False
    gap = (other_first - first) % (stride * size)
    return a.shape[1] * size <= gap <= (stride - b.shape[1]) * size


def _span(rows: Tensor) -> tuple[int, int]:
    """The addresses of the first element and of the end of the last."""
    (n, h), (stride, _) = rows.shape, rows.stride()
    return rows.data_ptr(), rows.data_ptr() + ((n - 1) * stride + h) * rows.element_size()


def overwritten(tensors: Sequence[Tensor]) -> None:
    """Tell autograd, so that whoever else saved one of them gets its error and not the wrong numbers."""
    for t in tensors:
        if not t.is_inference():  # such tensors count no versions
            increment_version(t)


# --- arguments --------------------------------------------------------------------------------------------------------------------------


def number(op: str, name: str, value: Any) -> float:
    """`value` as a float, −0 as 0. A tensor is refused: reading it would make the host wait."""
    if type(value) is float:
        return value + 0.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: {name} must be a Python number, got {type(value).__name__}; multiply by a tensor outside of {op}")
    return float(value) + 0.0


def flag(op: str, name: str, value: Any) -> bool:
    """`value`, which is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {type(value).__name__}")
    return value
