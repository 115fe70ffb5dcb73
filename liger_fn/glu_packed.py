r"""Gated linear units of one packed projection: gate and up are the halves of one tensor.

    (gate, up) = halves of the last axis          y = n act(m gate) up          d(gate_up) = (dgate, dup), one tensor

The kernels are those of `_glu_rows.py`, told where in a row the second half starts: nothing is split, copied or put together again.

Residuals: gate_up; the activation is computed again. Source: Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, ParamSpec

import torch
from torch import Tensor

from . import _check
from ._check import dense
from ._glu_rows import flag, kernel_backward, kernel_forward, number, overwritten, plain_backward, plain_forward, reusable
from ._launch import rows_and_stride
from ._vjp import Args, Needs, Op, custom_vjp
from .glu import Approximate, gelu

P = ParamSpec("P")


class Residuals(NamedTuple):
    """What the backward of a packed GLU needs."""

    gate_up: Tensor
    act: str
    gate_multiplier: float
    up_multiplier: float
    donate: bool


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(gate_up: Tensor, act: str, gate_multiplier: float, up_multiplier: float, donate: bool) -> Tensor:
    gate, up = _halves(gate_up)
    return plain_forward(gate, up, (act, gate_multiplier, up_multiplier))


def _halves(t: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = t.chunk(2, -1)
    return gate, up


def _plain_fwd(
    gate_up: Tensor, act: str, gate_multiplier: float, up_multiplier: float, donate: bool, needs: Needs
) -> tuple[Tensor, Residuals]:  # fmt: skip
    res = Residuals(gate_up, act, gate_multiplier, up_multiplier, donate)
    return _reference(*res), res


def _plain_bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None]:
    if not needs[0]:
        return (None,)
    dgate, dup = plain_backward(dy, *_halves(res.gate_up), res[1:4], (True, True))
    assert dgate is not None  # both are wanted
    assert dup is not None
    return (torch.cat((dgate, dup), -1),)


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


def _outputs(
    gate_up: Tensor, act: str, gate_multiplier: float, up_multiplier: float, donate: bool, needs: Needs
) -> tuple[Tensor]:  # fmt: skip
    return (gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),)


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> tuple[Tensor | None]:
    return (dense(res.gate_up) if needs[0] else None,)


def _fwd(
    gate_up: Tensor, act: str, gate_multiplier: float, up_multiplier: float, donate: bool, needs: Needs
) -> tuple[Tensor, Residuals]:  # fmt: skip
    res = Residuals(gate_up, act, gate_multiplier, up_multiplier, donate)
    (y,) = _outputs(*res, needs=needs)
    if y.numel():
        (rows, stride), h = rows_and_stride(gate_up), y.shape[-1]
        kernel_forward(rows, rows, y, res[1:4], packed=(y.numel() // h, h, (stride, stride, h)))
    return y, res


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None]:
    if not needs[0] or not res.gate_up.numel():
        return _gradients(res, dy, needs)
    (d, d_stride), (rows, stride) = rows_and_stride(dy), rows_and_stride(res.gate_up)
    over = donate and res.donate and reusable(res.gate_up, rows, (d,))
    made = res.gate_up.detach() if over else _gradients(res, dy, needs)[0]
    assert made is not None  # it is wanted
    h = dy.shape[-1]
    out, out_stride = (rows, stride) if over else (made, 2 * h)
    strides = d_stride, stride, stride, out_stride, out_stride, 0
    kernel_backward(d, rows, rows, out, out, res[1:4], packed=(dy.numel() // h, h, strides))
    if over:
        overwritten([res.gate_up])
    return (made,)


# --- public functions -------------------------------------------------------------------------------------------------------------------


def _packed(arguments: Callable[P, Args]) -> Op[P, Tensor]:
    """The ops of this file differ by their activation and in nothing else."""
    return custom_vjp(
        residuals=Residuals,
        kernels=(_fwd, _bwd),
        plain=(_plain_fwd, _plain_bwd),
        reference=_reference,
        outputs=_outputs,
        gradients=_gradients,
        cotangents=lambda res: ((*res.gate_up.shape[:-1], res.gate_up.shape[-1] // 2),),
        diff=1,
    )(arguments)


def _checked(op: str, gate_up: Tensor, act: str, gate_multiplier: float, up_multiplier: float, donate: bool) -> Args:
    _check.floats(op, "gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(
            f"{op}: the last axis of gate_up must be even, gate first and up second, got shape {list(gate_up.shape)}; "
            f"for two tensors use liger_fn.{op.removesuffix('_packed')}"
        )
    gate_multiplier, up_multiplier = number(op, "gate_multiplier", gate_multiplier), number(op, "up_multiplier", up_multiplier)
    return gate_up, act, gate_multiplier, up_multiplier, flag(op, "donate", donate)


@_packed
def swiglu_packed(gate_up: Tensor, *, gate_multiplier: float = 1.0, up_multiplier: float = 1.0, donate: bool = False) -> Args:
    r"""SwiGLU of one packed projection: `y = silu(gate · gate_multiplier) · up · up_multiplier`, `silu(a) = a sigmoid(a)`.

    Args:
        gate_up: `[..., 2 H]`, gate first and up second, as Phi-3's projection is; float32, bfloat16, float16 (kernels) or float64 (plain
            PyTorch). Rows of one stride cost no copy.
        gate_multiplier, up_multiplier: Python numbers.
        donate: the caller reads gate_up no more: backward may write the gradient over it. See `swiglu`.

    Returns:
        y, `[..., H]`, of gate_up's dtype; the kernels compute in fp32 and round once. Gradient: gate_up, written as one tensor
        (two views from `chunk` would each have theirs, to be put together by a copy).

    Raises:
        TypeError: gate_up is not of a float dtype, a multiplier is not a number, donate not a bool.
        ValueError: the last axis is odd, or gate_up is 0-dimensional.

    Examples:
        >>> liger_fn.swiglu_packed(torch.tensor([0.0, 1.0, 5.0, 2.0]))
        tensor([0.0000, 1.4621])

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    return _checked("swiglu_packed", gate_up, "silu", gate_multiplier, up_multiplier, donate)


@_packed
def geglu_packed(
    gate_up: Tensor, *, approximate: Approximate = "tanh", gate_multiplier: float = 1.0, up_multiplier: float = 1.0, donate: bool = False
) -> Args:
    r"""GEGLU of one packed projection: `y = gelu(gate · gate_multiplier) · up · up_multiplier`, `gelu(a) = a Φ(a)`.

    Args:
        gate_up: `[..., 2 H]`, gate first and up second; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch). Rows of one stride
            cost no copy.
        approximate: "tanh" or "none", as in `geglu`.
        gate_multiplier, up_multiplier: Python numbers.
        donate: the caller reads gate_up no more: backward may write the gradient over it. See `swiglu`.

    Returns:
        y, `[..., H]`, of gate_up's dtype; the kernels compute in fp32 and round once. Gradient: gate_up, written as one tensor.

    Raises:
        TypeError: gate_up is not of a float dtype, a multiplier is not a number, donate not a bool.
        ValueError: the last axis is odd, gate_up is 0-dimensional, unknown `approximate`.

    Examples:
        >>> liger_fn.geglu_packed(torch.tensor([0.0, 1.0, 5.0, 2.0]))
        tensor([0.0000, 1.6824])

    Source: Shazeer 2020, arXiv:2002.05202; Hendrycks & Gimpel 2016, arXiv:1606.08415.
    """
    return _checked("geglu_packed", gate_up, gelu("geglu_packed", approximate), gate_multiplier, up_multiplier, donate)
