r"""Squared ReLU: the activation of MLPs without a gate (Nemotron, Primer).

    y = max(x, 0)²          dx = 2 dy max(x, 0)

The kernels are those of `_glu_rows.py`, without up. Residuals: x. Source: So et al. 2021, arXiv:2109.08668.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from . import _check
from ._check import dense
from ._glu_rows import How, flag, kernel_backward, kernel_forward, overwritten, plain_backward, reusable, rows_of
from ._vjp import Args, Needs, custom_vjp

_HOW: How = ("relu_squared", 1.0, 1.0)


class Residuals(NamedTuple):
    """What the backward of `relu_squared` needs."""

    x: Tensor
    donate: bool


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _reference(x: Tensor, donate: bool) -> Tensor:
    return F.relu(x).square()


def _plain_fwd(x: Tensor, donate: bool, needs: Needs) -> tuple[Tensor, Residuals]:
    return _reference(x, donate), Residuals(x, donate)


def _plain_bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None]:
    return plain_backward(dy, res.x, None, _HOW, (needs[0], False))[:1]


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


def _outputs(x: Tensor, donate: bool, needs: Needs) -> tuple[Tensor]:
    return (dense(x),)


def _gradients(res: Residuals, dy: Tensor, needs: Needs) -> tuple[Tensor | None]:
    return (dense(res.x) if needs[0] else None,)


def _fwd(x: Tensor, donate: bool, needs: Needs) -> tuple[Tensor, Residuals]:
    (y,) = _outputs(x, donate, needs)
    (rows,) = rows_of(x)
    kernel_forward(rows, None, y if rows is x else y.view(rows.shape), _HOW)
    return y, Residuals(x, donate)


def _bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None]:
    if not needs[0]:
        return (None,)
    d, rows = rows_of(dy, res.x)
    over = donate and res.donate and reusable(res.x, rows, (d,))
    dx = res.x.detach() if over else _gradients(res, dy, needs)[0]
    assert dx is not None  # it is wanted
    kernel_backward(d, rows, None, rows if over else dx if rows is res.x else dx.view(rows.shape), None, _HOW)
    if over:
        overwritten([res.x])
    return (dx,)


# --- public function --------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(_fwd, _bwd),
    plain=(_plain_fwd, _plain_bwd),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: (res.x.shape,),
    diff=1,
)
def relu_squared(x: Tensor, *, donate: bool = False) -> Args:
    r"""Squared ReLU: `y = max(x, 0)²`.

    Args:
        x: any shape; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch). Rows of one stride cost no copy.
        donate: the caller reads x no more: backward may write the gradient over it. See `swiglu`.

    Returns:
        y, of the same shape and dtype; the kernels compute in fp32 and round once. Gradient: x.

    Raises:
        TypeError: x is not of a float dtype, donate not a bool.
        ValueError: x is 0-dimensional.

    Examples:
        >>> liger_fn.relu_squared(torch.tensor([-3.0, 3.0]))
        tensor([0., 9.])

    Source: So et al. 2021, arXiv:2109.08668.
    """
    _check.floats("relu_squared", "x", x)
    return x, flag("relu_squared", "donate", donate)
