r"""The MLP of a Llama as one function: two projections, a gate, and the projection back.

    g = x w_gateᵀ          u = x w_upᵀ          h = n silu(m g) u          y = h w_downᵀ
    dh = dy w_down         (dg, du) from dh as in `_glu_rows.py`           dx = dg w_gate + du w_up
    dw_down = dyᵀ h        dw_gate = dgᵀ x      dw_up = duᵀ x

h is not kept: backward makes it again in the pass over g and u that makes dg and du, and writes it over dh. Where nobody needs g and u
again, dg and du are written over them, so that backward takes one activation of its own.

Residuals: x, the weights, g and u. Source: Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._backend import autocasts, in_own_dtypes
from ._check import dense
from ._glu_rows import How, kernel_backward, kernel_forward, number, plain_backward, plain_forward
from ._vjp import Args, Needs, custom_vjp


class Residuals(NamedTuple):
    """What the backward of `swiglu_mlp` needs."""

    x: Tensor
    w_gate: Tensor
    w_up: Tensor
    w_down: Tensor
    gate: Tensor
    up: Tensor
    gate_multiplier: float
    up_multiplier: float


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, gate_multiplier: float, up_multiplier: float) -> Tensor:
    h = plain_forward(F.linear(x, w_gate), F.linear(x, w_up), ("silu", gate_multiplier, up_multiplier))
    return F.linear(h, w_down)


# --- the gate ---------------------------------------------------------------------------------------------------------------------------


class _Parts(NamedTuple):
    """What differs between the backends: h; and (dg, du, h) from dh, each where it is wanted."""

    forward: Callable[[Tensor, Tensor, How], Tensor]
    backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]


def _kernel_h(g: Tensor, u: Tensor, how: How) -> Tensor:
    h = torch.empty_like(g)
    kernel_forward(g, u, h, how)
    return h


def _kernel_grads(
    dh: Tensor, g: Tensor, u: Tensor, how: How, needs: tuple[bool, bool, bool], donate: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    dg, du = ((t if donate else torch.empty_like(t)) if n else None for t, n in zip((g, u), needs, strict=False))
    h = dh if needs[2] else None
    kernel_backward(dh, g, u, dg, du, how, y=h)
    return dg, du, h


def _plain_grads(
    dh: Tensor, g: Tensor, u: Tensor, how: How, needs: tuple[bool, bool, bool], donate: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    return *plain_backward(dh, g, u, how, needs[:2]), plain_forward(g, u, how) if needs[2] else None


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


def _outputs(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, gate_multiplier: float, up_multiplier: float, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, inner = prod(x.shape[:-1]), w_gate.shape[0]
    return x.new_empty(*x.shape[:-1], w_down.shape[0]), x.new_empty(rows, inner), x.new_empty(rows, inner)


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    return tuple(dense(t) if n else None for t, n in zip(res[:4], needs, strict=True))


def _flat(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(prod(t.shape[:-1]), t.shape[-1])


def _sum_of_products(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """`a b + c d`. A product that goes on from another is rounded once less; in fp32 its sum is longer, and that shows more."""
    ab = torch.mm(a, b)
    return ab.add_(torch.mm(c, d)) if _check.wide_dtype(ab) is ab.dtype else ab.addmm_(c, d)


def _fwd(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, gate_multiplier: float, up_multiplier: float, needs: Needs, parts: _Parts
) -> tuple[Tensor, Residuals]:  # fmt: skip
    rows = _flat(x)
    g, u = F.linear(rows, w_gate), F.linear(rows, w_up)
    y = F.linear(parts.forward(g, u, ("silu", gate_multiplier, up_multiplier)), w_down)
    y = y if rows is x else y.view(*x.shape[:-1], w_down.shape[0])
    return y, Residuals(x, w_gate, w_up, w_down, g, u, gate_multiplier, up_multiplier)


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool, parts: _Parts) -> tuple[Tensor | None, ...]:
    x, w_gate, w_up, w_down, g, u = res[:6]
    how = "silu", res.gate_multiplier, res.up_multiplier
    rows, d = _flat(x), _flat(dy)
    inner = needs[0] or needs[1], needs[0] or needs[2], needs[3]
    dg: Tensor | None
    du: Tensor | None
    h: Tensor | None
    if inner[0] or inner[1]:
        dg, du, h = parts.backward(torch.mm(d, w_down), g, u, how, inner, donate)
    else:
        dg, du, h = None, None, parts.forward(g, u, how) if needs[3] else None
    dx = None
    if needs[0] and dg is not None and du is not None:
        dx = _sum_of_products(dg, w_gate, du, w_up)
        dx = dx if rows is x else dx.view(x.shape)
    pairs = ((dg, rows, needs[1]), (du, rows, needs[2]), (d, h, needs[3]))
    return dx, *(torch.mm(a.T, b) if n and a is not None and b is not None else None for a, b, n in pairs)


_KERNELS = _Parts(_kernel_h, _kernel_grads)
_PLAIN = _Parts(plain_forward, _plain_grads)

# --- public function --------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(in_own_dtypes(partial(_fwd, parts=_KERNELS)), in_own_dtypes(partial(_bwd, parts=_KERNELS))),
    plain=(partial(_fwd, parts=_PLAIN), partial(_bwd, parts=_PLAIN)),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: ((*res.x.shape[:-1], res.w_down.shape[0]),),
    diff=4,
)
def swiglu_mlp(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, gate_multiplier: float = 1.0, up_multiplier: float = 1.0
) -> Args:  # fmt: skip
    r"""A gated MLP without biases: `y = (silu(x w_gateᵀ · gate_multiplier) · (x w_upᵀ) · up_multiplier) w_downᵀ`.

    Args:
        x: `[..., H]`; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        w_gate, w_up: `[I, H]`, of x's dtype. w_down: `[O, I]`, of x's dtype; O is H as a rule.
        gate_multiplier, up_multiplier: Python numbers. (Falcon-H1 scales its MLP's output; that is up_multiplier.)

    Under autocast all four tensors take part in the dtype that a matrix product would take.

    Returns:
        y, `[..., O]`, of x's dtype. The projections are rounded as matrix products are; the gated product between them is computed in fp32
        and rounded once. It is not kept for backward, which makes it again. Gradients: x and the weights; what asks for none costs nothing.

    Raises:
        TypeError: a tensor is not of a float dtype, dtypes differ, a multiplier is not a number.
        ValueError: a shape does not fit, devices differ, x is 0-dimensional.

    Examples:
        >>> w = torch.eye(2)
        >>> liger_fn.swiglu_mlp(torch.tensor([[0.0, 1.0]]), w, w, w)
        tensor([[0.0000, 0.7311]])

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    op = "swiglu_mlp"
    _check.floats(op, "x", x)
    _check.floating(op, w_gate=w_gate, w_up=w_up, w_down=w_down)
    if w_gate.dim() != 2 or w_gate.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: w_gate must be [I, {x.shape[-1]}] (I, last axis of x), got {list(w_gate.shape)}")
    _check.shape(op, "w_up", w_up, w_gate.shape, "the shape of w_gate")
    if w_down.dim() != 2 or w_down.shape[1] != w_gate.shape[0]:
        raise ValueError(f"{op}: w_down must be [O, {w_gate.shape[0]}] (O, first axis of w_gate), got {list(w_down.shape)}")
    _check.same_device(op, x, w_gate=w_gate, w_up=w_up, w_down=w_down)
    by: Any = number(op, "gate_multiplier", gate_multiplier), number(op, "up_multiplier", up_multiplier)
    if autocasts(x.device.type):
        x, w_gate, w_up, w_down = map(_check.autocast, (x, w_gate, w_up, w_down))
    _check.same_dtype(op, x, w_gate=w_gate, w_up=w_up, w_down=w_down)
    return x, w_gate, w_up, w_down, *by
