r"""Auxiliary losses of a mixture's router: one that keeps its experts equally busy, one that keeps its logits small.

With s = softmax(l) of each of the n tokens that count, and c_e the number of choices that went to expert e,

    balance = E Σ_e f_e P_e      f_e = c_e / n      P_e = Σ_t s_te / n      dl_te = dy s_te (a_e − Σ_i s_ti a_i)      a_e = E f_e / n
    z = Σ_t z_t² / n             z_t = log Σ_e exp(l_te)                    dl_te = dy 2 z_t s_te / n

Residuals: the logits and the mask, and a for the first, n for the second. Each forward reads the logits once: a program adds up its tokens,
and one program adds up what the others found, in an order that does not change. The kernels stand in `_moe_loss_kernels.py`.
Sources: Fedus et al. 2021, arXiv:2101.03961; Zoph et al. 2022, arXiv:2202.08906.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from . import _check
from ._check import dense, wide
from ._launch import cdiv, has_fp64, launch, next_power_of_2, processors, rows_and_stride
from ._moe_loss_kernels import _balance_parts_kernel, _balance_sum_kernel, _router_losses_bwd_kernel, _z_parts_kernel, _z_sum_kernel
from ._vjp import Args, Needs, custom_vjp

EXPERTS = 1024  # at most: a program holds whole tokens
TILE, WARPS = 4096, 8  # logits that a program of a forward has at a time
SUMS = 65536  # at most, that a forward's second launch, one program, adds up
BWD_TILE = 512  # logits of a program of a backward, which is one warp


class Residuals(NamedTuple):
    """What the backward of `moe_load_balancing_loss` needs."""

    logits: Tensor
    mask: Tensor | None
    slope: Tensor


class ZResiduals(NamedTuple):
    """What the backward of `moe_z_loss` needs."""

    logits: Tensor
    mask: Tensor | None
    tokens: Tensor


# --- definition -------------------------------------------------------------------------------------------------------------------------


def _counted(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens count, `[..., 1]`, and how many, at least 1."""
    rows = torch.ones_like(x[..., :1], dtype=torch.bool) if mask is None else (mask != 0).expand(x.shape[:-1]).unsqueeze(-1)
    return rows, rows.sum().clamp(min=1).to(x.dtype)


def _slope(x: Tensor, index: Tensor, rows: Tensor, n: Tensor, num_experts: int) -> Tensor:
    """a: `[E]`."""
    chosen = (index.unsqueeze(-1) == torch.arange(x.shape[-1], device=x.device)).sum(-2)
    return num_experts * ((chosen * rows).view(-1, x.shape[-1]).sum(0).to(x.dtype) / n) / n


def _softmax(x: Tensor, rows: Tensor) -> Tensor:
    """0 where a token does not count, whatever its logits are."""
    return torch.softmax(x.masked_fill(~rows, 0.0), -1).masked_fill(~rows, 0.0)


def _reference(logits: Tensor, index: Tensor, mask: Tensor | None, num_experts: int) -> Tensor:
    x = wide(logits)
    rows, n = _counted(x, mask)
    return (_slope(x, index, rows, n, num_experts) * _softmax(x, rows).reshape(-1, x.shape[-1]).sum(0)).sum()


def _plain_fwd(logits: Tensor, index: Tensor, mask: Tensor | None, num_experts: int, needs: Needs) -> tuple[Tensor, Residuals]:
    x = wide(logits)
    slope = _slope(x, index, *_counted(x, mask), num_experts)
    return _reference(logits, index, mask, num_experts), Residuals(logits, mask, slope)


def _plain_bwd(res: Residuals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None, ...]:
    if not needs[0]:
        return (None,)
    logits, mask, g = res
    x = wide(logits)
    s = _softmax(x, _counted(x, mask)[0])
    for _ in range(2):  # what is left of equal ones is nothing
        g = g - (s * g).sum(-1, keepdim=True)
    return ((s * g * dy).to(logits.dtype),)


def _z_reference(logits: Tensor, mask: Tensor | None) -> Tensor:
    x = wide(logits)
    rows, n = _counted(x, mask)
    return torch.logsumexp(x.masked_fill(~rows, 0.0), -1, keepdim=True).square().masked_fill(~rows, 0.0).sum() / n


def _z_plain_fwd(logits: Tensor, mask: Tensor | None, needs: Needs) -> tuple[Tensor, ZResiduals]:
    return _z_reference(logits, mask), ZResiduals(logits, mask, _counted(wide(logits), mask)[1])


def _z_plain_bwd(res: ZResiduals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None, ...]:
    if not needs[0]:
        return (None,)
    logits, mask, n = res
    x = wide(logits)
    rows, _ = _counted(x, mask)
    z = torch.logsumexp(x.masked_fill(~rows, 0.0), -1, keepdim=True)
    return ((_softmax(x, rows) * (2.0 * z * dy / n)).to(logits.dtype),)


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


@lru_cache(1024)
def _cut(n: int, e: int, device: torch.device) -> tuple[int, dict[str, int]]:
    """Programs of a forward, and the tile of each."""
    columns = next_power_of_2(e)
    rows = TILE // columns
    parts = min(cdiv(n, rows), 2 * processors(device), max(1, SUMS // columns))
    return parts, {"ROWS": rows, "BLOCK": columns, "num_warps": WARPS}


def _flags(mask: Tensor | None) -> tuple[Tensor | None, int]:
    """The mask as kernels read it, and how many flags it has."""
    return (None, 1) if mask is None else (mask.contiguous(), mask.numel())


def _gradients(res: Residuals | ZResiduals, dy: Tensor, needs: Needs) -> tuple[Tensor | None]:
    return (dense(res.logits) if needs[0] else None,)


def _bwd(res: Residuals | ZResiduals, dy: Tensor, needs: Needs, donate: bool) -> tuple[Tensor | None]:
    (dx,) = _gradients(res, dy, needs)
    if dx is not None:
        logits, mask, known = res
        (x, stride), (flags, t) = rows_and_stride(logits), _flags(mask)
        n, e = prod(logits.shape[:-1]), logits.shape[-1]
        columns = next_power_of_2(e)
        rows = max(1, BWD_TILE // columns)
        launch(
            _router_losses_bwd_kernel, (cdiv(n, rows),), logits.device, dy, x, flags, known.contiguous(), dx, stride, n, t, e,
            Z=isinstance(res, ZResiduals), EXACT=logits.dtype is torch.float32, ROWS=rows, BLOCK=columns, num_warps=1,
        )  # fmt: skip
    return (dx,)


def _outputs(logits: Tensor, index: Tensor, mask: Tensor | None, num_experts: int, needs: Needs) -> tuple[Tensor, Tensor]:
    y = logits.new_empty((), dtype=_check.wide_dtype(logits))
    return y, y.new_empty(logits.shape[-1])


def _fwd(logits: Tensor, index: Tensor, mask: Tensor | None, num_experts: int, needs: Needs) -> tuple[Tensor, Residuals]:
    y, slope = _outputs(logits, index, mask, num_experts, needs)
    device, e, n = logits.device, logits.shape[-1], prod(logits.shape[:-1])
    parts, tile = _cut(n, e, device)
    (x, stride), (i, i_stride), (flags, t) = rows_and_stride(logits), rows_and_stride(index), _flags(mask)
    fp64 = has_fp64(device)
    p = slope.new_empty(parts, e, dtype=torch.float64 if fp64 else torch.float32)
    c, counts = torch.empty_like(p, dtype=torch.int32), p.new_empty(parts, dtype=torch.int32)
    launch(
        _balance_parts_kernel, (parts,), device, x, i, flags, p, c, counts, stride, i_stride, n, t, index.shape[-1], e, FP64=fp64, **tile
    )  # fmt: skip
    launch(_balance_sum_kernel, (1,), device, p, c, counts, y, slope, parts, e, num_experts, FP64=fp64, **tile)
    return y, Residuals(logits, mask, slope)


def _z_outputs(logits: Tensor, mask: Tensor | None, needs: Needs) -> tuple[Tensor, Tensor]:
    y = logits.new_empty((), dtype=_check.wide_dtype(logits))
    return y, torch.empty_like(y)


def _z_fwd(logits: Tensor, mask: Tensor | None, needs: Needs) -> tuple[Tensor, ZResiduals]:
    y, count = _z_outputs(logits, mask, needs)
    device, e, n = logits.device, logits.shape[-1], prod(logits.shape[:-1])
    parts, tile = _cut(n, e, device)
    (x, stride), (flags, t) = rows_and_stride(logits), _flags(mask)
    z, counts = y.new_empty(parts), y.new_empty(parts, dtype=torch.int32)
    launch(_z_parts_kernel, (parts,), device, x, flags, z, counts, stride, n, t, e, **tile)
    launch(_z_sum_kernel, (1,), device, z, counts, y, count, parts, FP64=has_fp64(device), BLOCK=1024, num_warps=4)
    return y, ZResiduals(logits, mask, count)


# --- public functions -------------------------------------------------------------------------------------------------------------------


@custom_vjp(
    residuals=Residuals,
    kernels=(_fwd, _bwd),
    plain=(_plain_fwd, _plain_bwd),
    reference=_reference,
    outputs=_outputs,
    gradients=_gradients,
    cotangents=lambda res: ((),),
    diff=1,
)
def moe_load_balancing_loss(logits: Tensor, index: Tensor, num_experts: int | None = None, *, mask: Tensor | None = None) -> Args:
    r"""Load-balancing loss of a router: `E Σ_e f_e P_e`, which is least where every expert is chosen equally often.

    f_e is the number of choices of expert e over the number of tokens that count, so that Σ f_e = k; P_e is the mean of its softmax over
    them. Equal to Hugging Face's `load_balancing_loss_func`, where logits and index hold the layers on their first axis
    (`torch.stack(router_logits)`) and the mask is the flat attention mask. The choices are constants: the gradient goes through P alone.

    Args:
        logits: `[..., E]`, any strides, E from 1 to 1024; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        index: `[..., k]`, the choices of each token, of an integer dtype, as `moe_router` returns them. One outside 0 … E − 1 is no choice.
        num_experts: the E that the sum is multiplied by, where it is not the width of logits.
        mask: of the last axes of `logits.shape[:-1]`, repeated over the axes before; bool or an integer dtype, a token counts where it is
            not 0. The logits of others may be anything, NaN included. None: every token counts.

    Returns:
        The loss, a scalar: float32 (float64 of float64), the same bits every time; 0 where no token counts. Gradient: logits.

    Raises:
        TypeError: logits are not of a float dtype, index or mask not of an integer dtype.
        ValueError: logits have no axis or not 1 to 1024 experts, index or mask are of another shape or device, num_experts is not a
            positive integer.

    Examples:
        >>> logits, index = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[0], [1]])
        >>> liger_fn.moe_load_balancing_loss(logits, index)
        tensor(1.)

    Source: Fedus et al. 2021, arXiv:2101.03961.
    """
    op = "moe_load_balancing_loss"
    _checked(op, logits, mask)
    _integers(op, "index", index, logits)
    if index.dim() != logits.dim() or index.shape[:-1] != logits.shape[:-1]:
        raise ValueError(f"{op}: index must have shape {[*logits.shape[:-1], 'k']} (a row for each of logits), got {list(index.shape)}")
    return logits, index, mask, logits.shape[-1] if num_experts is None else _check.integer(op, "num_experts", num_experts, 1)


@custom_vjp(
    residuals=ZResiduals,
    kernels=(_z_fwd, _bwd),
    plain=(_z_plain_fwd, _z_plain_bwd),
    reference=_z_reference,
    outputs=_z_outputs,
    gradients=_gradients,
    cotangents=lambda res: ((),),
    diff=1,
)
def moe_z_loss(logits: Tensor, *, mask: Tensor | None = None) -> Args:
    r"""Router z-loss: the mean over tokens of `logsumexp(logits)²`, which keeps a router's logits small.

    Args:
        logits: `[..., E]`, any strides, E from 1 to 1024; float32, bfloat16, float16 (kernels) or float64 (plain PyTorch).
        mask: of the last axes of `logits.shape[:-1]`, repeated over the axes before; bool or an integer dtype, a token counts where it is
            not 0. The logits of others may be anything, NaN included. None: every token counts.

    Returns:
        The loss, a scalar: float32 (float64 of float64), the same bits every time; 0 where no token counts. Gradient: logits.

    Raises:
        TypeError: logits are not of a float dtype, mask not of an integer dtype.
        ValueError: logits have no axis or not 1 to 1024 experts, mask is of another shape or device.

    Examples:
        >>> liger_fn.moe_z_loss(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        tensor(1.6736)

    Source: Zoph et al. 2022, arXiv:2202.08906.
    """
    _checked("moe_z_loss", logits, mask)
    return logits, mask


def _checked(op: str, logits: Tensor, mask: Tensor | None) -> None:
    _check.floats(op, "logits", logits)
    if not 1 <= logits.shape[-1] <= EXPERTS:
        raise ValueError(f"{op}: the last axis of logits must have 1 to {EXPERTS} experts, got shape {list(logits.shape)}; reshape logits")
    if mask is not None:
        _integers(op, "mask", mask, logits)
        want = logits.shape[max(0, logits.dim() - 1 - mask.dim()) : -1]
        _check.shape(op, "mask", mask, want, "the last axes of logits before that of the experts")


def _integers(op: str, name: str, t: Tensor, logits: Tensor) -> None:
    """`t` is a tensor of an integer dtype, or a mask of bool, where the logits are."""
    _check.integers(op, name, t, bools=name == "mask")
    _check.same_device(op, logits, **{name: t})
