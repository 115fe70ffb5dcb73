"""Comparing an answer with the truth, in words: not only that it is wrong, but how."""

from __future__ import annotations

import torch
from torch import Tensor


class Wrong(Exception):
    """An answer is wrong; the text tells its author how."""


def same(what: str, got: object, want: object, why: str = "") -> None:
    """`got` equals `want` (numbers, shapes, tuples): counts the reader makes."""
    if got != want:
        raise Wrong(f"{what} is {got!r}, expected {want!r}" + (f": {why}" if why else ""))


def near(what: str, got: object, truth: Tensor, *, rounding: float = 4.0, naive: Tensor | None = None, why: str = "") -> None:
    """`got` is `truth`, up to rounding: ‖got − truth‖ ≤ rounding · u ‖truth‖, u half the spacing of got's dtype at 1.

    Args:
        what: the name of the tensor, for the message.
        got: what the answer gave.
        truth: the same in fp64.
        rounding: how many roundings may show.
        naive: the same by plain PyTorch in got's dtype: the answer may err as much as that and one rounding, whatever `rounding` is.
        why: appended to the message: what it may come from.
    """
    if not isinstance(got, Tensor):
        raise Wrong(f"{what} must be a tensor, got {type(got).__name__}; does the function return it?")
    if got.shape != truth.shape:
        raise Wrong(f"{what} has shape {list(got.shape)}, expected {list(truth.shape)}" + (f"; {why}" if why else ""))
    if not got.is_floating_point():
        raise Wrong(f"{what} has dtype {got.dtype}, expected a floating-point dtype")
    ours, true = got.detach().cpu().double(), truth.detach().cpu().double()
    if bool((ours.isnan() & ~true.isnan()).any()):
        where = _where(ours.isnan() & ~true.isnan())
        raise Wrong(f"{what} is NaN in {where}: memory that was never written (a mask or a grid too small?), 0/0 or inf − inf.{_tail(why)}")
    finite = true.isfinite()
    if not torch.equal(ours[~finite].nan_to_num(7), true[~finite].nan_to_num(7)):
        raise Wrong(f"{what} differs from the truth where that is not finite.{_tail(why)}")
    ours, true = ours[finite], true[finite]
    kind = torch.finfo(got.dtype)
    unit = kind.eps / 2 * float(true.norm())
    allowed = rounding * unit + kind.tiny
    if naive is not None:
        allowed = max(allowed, float((naive.detach().cpu().double()[finite] - true).norm()) + unit)
    error = float((ours - true).norm())
    if not error <= allowed:
        size = f"its error is {error:.2g}, where {allowed:.2g} is rounding"
        raise Wrong(f"{what} is wrong: {size}. {_how(got.detach().cpu().double(), truth.detach().cpu().double())}{_tail(why)}")


def _tail(why: str) -> str:
    return f" {why}" if why else ""


def _how(ours: Tensor, true: Tensor) -> str:
    """The pattern of an error, where it has one: a factor, a sign, a constant, a region."""
    if not bool(ours.any()):
        return "It is zero everywhere: was it ever written?"
    big = true.abs() > 1e-3 * true.abs().max()
    ratio = (ours / true)[big]
    if ratio.numel() > 1 and float(ratio.std()) < 1e-3 * float(ratio.abs().mean()):
        factor = float(ratio.mean())
        about = next((f" (1/{n})" for n in range(2, 8193) if abs(factor * n - 1) < 1e-3), "")
        return f"It is the right one times {factor:.4g}{about}, everywhere: a sign, a count or a scale."
    gap = ours - true
    if gap.numel() > 1 and float(gap.std()) < 1e-3 * float(gap.abs().mean()):
        return f"It is the right one plus {float(gap.mean()):.4g}, everywhere."
    off = gap.abs() > 1e-4 * true.abs().max()
    share = float(off.double().mean())
    if 0 < share < 0.5:
        return f"It is right but in {_where(off)}: look at the edges of blocks, masks and strides."
    at = tuple(int(i) for i in torch.unravel_index(gap.abs().argmax(), gap.shape))
    return f"The largest difference is at {list(at)}: {float(ours[at]):.6g}, expected {float(true[at]):.6g}."


def _where(bad: Tensor) -> str:
    """Which part of an array a mask covers: all, some rows, some columns, or a count."""
    if bool(bad.all()):
        return "every element"
    for axis, name in ((-1, "columns"), (0, "rows")):
        if bad.dim() < 2 and axis == 0:
            continue
        lines = bad.movedim(axis, 0).flatten(1) if bad.dim() > 1 else bad[:, None]
        hit = lines.any(1)
        if bool(lines[hit].all()) and not bool(hit.all()):
            index = hit.nonzero().flatten().tolist()
            span = f"{index[0]} to {index[-1]}" if index == list(range(index[0], index[-1] + 1)) and len(index) > 1 else str(index[:6])
            return f"{name if bad.dim() > 1 else 'elements'} {span}"
    return f"{int(bad.sum())} of {bad.numel()} elements"
