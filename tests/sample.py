"""One case made into tensors, and the few ways in which tests call an op with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import liger_fn

from .cases import Case, Maker, Table

Fn = Callable[..., tuple[Tensor, ...]]
Tensors = tuple[Tensor, ...]


class Sample:
    """Inputs and cotangents of one case. `wrt` are the arguments it differentiates: those of the table that are present."""

    def __init__(self, table: Table, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.op = getattr(liger_fn, table.op)
        self.table, self.case, self.options = table, case, case.options
        make = Maker(device, dtype, seed)
        self.inputs = case.make(make)
        self.wrt = tuple(k for k in table.diff if self.inputs.get(k) is not None)
        shapes = {k: None if t is None else t.to("meta") for k, t in self.inputs.items()}
        self.cots = tuple(make.normal(*y.shape, dtype=y.dtype, scale=case.scale) for y in self.call(self.op.reference, **shapes))

    @property
    def tensors(self) -> Tensors:
        """The differentiated inputs, in order."""
        return tuple(self.inputs[k] for k in self.wrt)  # type: ignore[misc]

    @property
    def all(self) -> list[Tensor]:
        """Every tensor whose bytes belong to the caller."""
        return [t for t in (*self.inputs.values(), *self.cots) if t is not None]

    def call(self, fn: Callable[..., Any], **changed: Any) -> Tensors:
        return flat(fn(**{**self.inputs, **changed}, **self.options))

    def f(self, fn: Callable[..., Any] | None = None, names: Sequence[str] | None = None, **fixed: Any) -> Fn:
        """The op (or `fn`) as a function of the tensors called `names`, by default the differentiated ones; it returns a tuple."""
        names, fn = self.wrt if names is None else names, fn or self.op
        return lambda *tensors: self.call(fn, **fixed, **dict(zip(names, tensors, strict=True)))

    def loss(self, fn: Callable[..., Any] | None = None) -> Callable[..., Tensor]:
        """A scalar of the differentiated tensors whose gradient is exactly the op's for the sample's cotangents."""
        f = self.f(fn)
        return lambda *tensors: sum(
            ((y * c).sum() for y, c in zip(f(*tensors), self.cots, strict=True)), torch.zeros((), device=tensors[0].device)
        )

    def truth(self) -> tuple[Tensors, Tensors]:
        """Values and gradients of the reference in fp64, on the same numbers."""
        wide = {k: t.double() if t is not None and t.is_floating_point() else t for k, t in self.inputs.items()}
        fixed: dict[str, Any] = {k: t for k, t in wide.items() if k not in self.wrt}
        f = self.f(self.op.reference, **fixed)
        return gradients(f, [wide[k] for k in self.wrt], [c.double() for c in self.cots])  # type: ignore[misc]

    def naive(self) -> tuple[Tensors, Tensors]:
        """Values and gradients of the reference in the sample's own dtypes."""
        return gradients(self.f(self.op.reference), self.tensors, self.cots)

    def ours(self) -> tuple[Tensors, Tensors]:
        """Values and gradients of the op under test, by eager autograd."""
        return gradients(self.f(), self.tensors, self.cots)


def flat(out: Any) -> Tensors:
    """The tensors of what an op returned, one, a tuple, or a tuple of tuples: those that have gradients, and no integers."""
    if isinstance(out, tuple):
        return tuple(t for part in out for t in flat(part))
    return (out,) if out.is_floating_point() else ()


def gradients(f: Fn, tensors: Sequence[Tensor], cots: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
    """`f(*tensors)` and its vector-Jacobian product. The leaves share memory and strides with `tensors`."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    ys = f(*leaves)
    return tuple(y.detach() for y in ys), torch.autograd.grad(ys, leaves, cots)
