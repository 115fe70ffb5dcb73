r"""Gated linear units: an activation of one half gates the other.

    a = m gate          y = n act(a) up          dgate = n m dy up act′(a)          dup = n dy act(a)

with m, n the multipliers of gate and up. The activations, their derivatives and the kernels stand in `_glu_rows.py`.

Residuals: gate and up; the activation is computed again. Source: Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, ParamSpec

from torch import Tensor

from . import _check
from ._check import dense
from ._glu_rows import flag, kernel_backward, kernel_forward, number, overwritten, plain_backward, plain_forward, reusable, rows_of
from ._vjp import Args, Needs, Op, custom_vjp

P = ParamSpec("P")
Approximate = Literal["tanh", "none"]


class Residuals(NamedTuple):
    """What the backward of a GLU needs."""

    gate: Tensor
    up: Tensor
    act: str
    gate_multiplier: float
    up_multiplier: float
    donate: bool


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(gate: Tensor, up: Tensor, act: str, gate_multiplier: float, up_multiplier: float, donate: bool) -> Tensor:
    return plain_forward(gate, up, (act, gate_multiplier, up_multiplier))


def _plain_fwd(
    gate: Tensor, up: Tensor, act: str, gate_multiplier: float, up_multiplier: float, donate: bool, needs: Needs
) -> tuple[Tensor, Residuals]:  # fmt: skip
    res = Residuals(gate, up, act, gate_multiplier, up_multiplier, donate)
    return _reference(*res), res


def _plain_bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None, Tensor | None]:
    return plain_backward(dy, res.gate, res.up, res[2:5], (needs[0], needs[1]))


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


def _outputs(
    gate: Tensor, up: Tensor, act: str, gate_multiplier: float, up_multiplier: float, donate: bool, needs: Needs
) -> tuple[Tensor]:  # fmt: skip
    return (dense(gate),)


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> tuple[Tensor | None, ...]:
    return dense(res.gate) if needs[0] else None, dense(res.up) if needs[1] else None


def _fwd(
    gate: Tensor, up: Tensor, act: str, gate_multiplier: float, up_multiplier: float, donate: bool, needs: Needs
) -> tuple[Tensor, Residuals]:  # fmt: skip
    y = dense(gate)
    g, u = rows_of(gate, up)
    kernel_forward(g, u, y if g is gate else y.view(g.shape), (act, gate_multiplier, up_multiplier))
    return y, Residuals(gate, up, act, gate_multiplier, up_multiplier, donate)


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None, ...]:
    gate, up, act, gate_multiplier, up_multiplier, mine = res
    how = act, gate_multiplier, up_multiplier
    d, g, u = rows_of(dy, gate, up)
    if not (donate and mine):
        dg, du = grads = _gradients(res, dy, needs)
        if g is not gate:
            dg, du = (t if t is None else t.view(g.shape) for t in grads)
        kernel_backward(d, g, u, dg, du, how)
        return grads
    over = needs[0] and reusable(res.gate, g, (d, u)), needs[1] and reusable(res.up, u, (d, g))
    made = _gradients(res, dy, tuple(n and not o for n, o in zip(needs, over, strict=True)))
    each = tuple(zip(res[:2], (g, u), over, made, strict=True))
    dg, du = (rows if o else None if m is None else m.view(rows.shape) for _, rows, o, m in each)
    kernel_backward(d, g, u, dg, du, how)
    overwritten([t for t, _, o, _ in each if o])
    return tuple(t.detach() if o else m for t, _, o, m in each)


# --- public functions -------------------------------------------------------------------------------------------------------------------


def _glu(arguments: Callable[P, Args]) -> Op[P, Tensor]:
    """The ops of this file differ by their activation and in nothing else."""
    return custom_vjp(
        residuals=Residuals,
        kernels=(_fwd, _bwd),
        plain=(_plain_fwd, _plain_bwd),
        reference=_reference,
        outputs=_outputs,
        gradients=_gradients,
        cotangents=lambda res: (res.gate.shape,),
        diff=2,
    )(arguments)


def _checked(op: str, gate: Tensor, up: Tensor, act: str, gate_multiplier: float, up_multiplier: float, donate: bool) -> Args:
    _check.floats(op, "gate", gate)
    _check.like(op, "gate", gate, "up", up)
    gate_multiplier, up_multiplier = number(op, "gate_multiplier", gate_multiplier), number(op, "up_multiplier", up_multiplier)
    return gate, up, act, gate_multiplier, up_multiplier, flag(op, "donate", donate)


def gelu(op: str, approximate: str) -> str:
    """The activation that a public function calls by `approximate`."""
    _check.choice(op, "approximate", approximate, ("tanh", "none"))
    return "gelu_tanh" if approximate == "tanh" else "gelu"


@_glu
def swiglu(gate: Tensor, up: Tensor, *, gate_multiplier: float = 1.0, up_multiplier: float = 1.0, donate: bool = False) -> Args:
    r"""SwiGLU: `y = silu(gate · gate_multiplier) · up · up_multiplier`, where `silu(a) = a sigmoid(a)`.

    Args:
        gate: any shape; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch). Rows of one stride, such as the halves of a packed
            projection, cost no copy.
        up: of gate's shape and dtype.
        gate_multiplier, up_multiplier: Python numbers. (Falcon-H1 has the first in its MLP, and scales what comes after it by the second.)
        donate: the caller reads gate and up no more. Backward then writes their gradients over them, where the graph is freed by it
            (`retain_graph=False`) and the memory is theirs alone: not over leaves, expanded or overlapping tensors, nor under compilers and
            transforms. If another function saved one of them too, its own backward raises PyTorch's error about an in-place change.

    Returns:
        y, of the same shape and dtype. The kernels compute in fp32 and round y once; plain PyTorch, and Hugging Face's models, round every
        product and the activation. Gradients: gate and up, rounded once.

    Raises:
        TypeError: a tensor is not of a float dtype, the two dtypes differ, a multiplier is not a number, donate not a bool.
        ValueError: shapes or devices differ, or the tensors are 0-dimensional.

    Examples:
        >>> liger_fn.swiglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
        tensor([0.0000, 1.4621])

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    return _checked("swiglu", gate, up, "silu", gate_multiplier, up_multiplier, donate)


@_glu
def geglu(
    gate: Tensor, up: Tensor, *, approximate: Approximate = "tanh", gate_multiplier: float = 1.0, up_multiplier: float = 1.0,
    donate: bool = False,
) -> Args:  # fmt: skip
    r"""GEGLU: `y = gelu(gate · gate_multiplier) · up · up_multiplier`, where `gelu(a) = a Φ(a)`, Φ the normal distribution.

    Args:
        gate: any shape; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch). Rows of one stride cost no copy.
        up: of gate's shape and dtype.
        approximate: "tanh" for `Φ(a) ≈ (1 + tanh(√(2/π) (a + 0.044715 a³))) / 2` (the Gemma family), "none" for Φ by the error function.
        gate_multiplier, up_multiplier: Python numbers.
        donate: the caller reads gate and up no more: see `swiglu`.

    Returns:
        y, of the same shape and dtype; the kernels compute in fp32 and round once. Gradients: gate and up.

    Raises:
        TypeError: a tensor is not of a float dtype, the two dtypes differ, a multiplier is not a number, donate not a bool.
        ValueError: shapes or devices differ, the tensors are 0-dimensional, unknown `approximate`.

    Examples:
        >>> liger_fn.geglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
        tensor([0.0000, 1.6824])

    Source: Shazeer 2020, arXiv:2002.05202; Hendrycks & Gimpel 2016, arXiv:1606.08415.
    """
    return _checked("geglu", gate, up, gelu("geglu", approximate), gate_multiplier, up_multiplier, donate)


@_glu
def reglu(gate: Tensor, up: Tensor, *, gate_multiplier: float = 1.0, up_multiplier: float = 1.0, donate: bool = False) -> Args:
    r"""ReGLU: `y = max(gate · gate_multiplier, 0) · up · up_multiplier`. The slope at 0 is 0, as PyTorch's is.

    Args:
        gate: any shape; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch). Rows of one stride cost no copy.
        up: of gate's shape and dtype.
        gate_multiplier, up_multiplier: Python numbers.
        donate: the caller reads gate and up no more: see `swiglu`.

    Returns:
        y, of the same shape and dtype; the kernels compute in fp32 and round once. Gradients: gate and up.

    Raises:
        TypeError: a tensor is not of a float dtype, the two dtypes differ, a multiplier is not a number, donate not a bool.
        ValueError: shapes or devices differ, or the tensors are 0-dimensional.

    Examples:
        >>> liger_fn.reglu(torch.tensor([-3.0, 1.0]), torch.tensor([5.0, 2.0]))
        tensor([0., 2.])

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    return _checked("reglu", gate, up, "relu", gate_multiplier, up_multiplier, donate)
