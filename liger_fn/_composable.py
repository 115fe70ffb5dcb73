"""The path of an op that others can see into: two autograd Functions over two custom operators, `liger_fn::NAME_fwd` and `_bwd`.

A compiler needs operators that it can trace without running them (a fake that allocates alone), functorch needs Functions with a separate
`setup_context` and a rule for vmap, a selective-checkpointing policy needs an operator to name. One Function would be enough for all that
but a second derivative, where it would give zeros: the inner Function, around the backward operator, makes that an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import Function

if TYPE_CHECKING:
    from ._vjp import Op

Args = tuple[Any, ...]

_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "SymInt", str: "str", bool: "bool"}


def is_tensor(hint: Any) -> bool:
    """Does a parameter or field with this annotation hold a tensor (or none)?"""
    return hint in (Tensor, Tensor | None)


def refusal(name: str) -> Callable[..., None]:
    """The backward of a backward."""

    def backward(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            f"{name}: has a first derivative only; for a second one call liger_fn.{name}.reference, which is plain PyTorch"
        )

    return backward


class Composable:
    """One op's operators, and the Functions over them."""

    def __init__(self, op: Op[..., Any]) -> None:
        self.op = op
        self.computed = [k for k in op.fields if k not in op.hints]
        self.fwd_op = self._fwd_operator()
        self.bwd_op = self._bwd_operator()
        self.call = self._function()

    def fwd(self, backend: str, flat: Args, needs: Args) -> tuple[Any, Any]:
        """`op.fwd` through the operator."""
        out = self.fwd_op(*flat, list(needs), backend)
        n_out = self.op.n_out
        return out[0] if n_out == 1 else tuple(out[:n_out]), self.op.residuals(*self._fields(flat, out))

    def bwd(self, backend: str, res: Any, dy: Any, needs: Args, donate: bool) -> Args:
        """`op.bwd` through the operator, which never donates."""
        shadows = [_shadow(d) for d in ((dy,) if self.op.n_out == 1 else dy)]
        promised = self.op.gradients(self.op.residuals(*map(_shadow, res)), shadows[0] if self.op.n_out == 1 else shadows, tuple(needs))
        grads = self.bwd_op(*((dy,) if self.op.n_out == 1 else dy), *res, list(needs), backend)
        return tuple(None if p is None else g for g, p in zip(grads, promised, strict=True))

    def _fields(self, args: Args, out: Args) -> list[Any]:
        """The residuals' fields, from the arguments by name and from what the forward operator computed."""
        known = dict(zip(self.op.hints, args, strict=False)) | dict(zip(self.computed, out[self.op.n_out :], strict=True))
        return [known[k] for k in self.op.residuals._fields]

    def _fwd_operator(self) -> Any:
        op = self.op

        def impl(*args: Any) -> Args:
            *flat, needs, backend = args
            y, res = op.run_fwd(backend, tuple(flat), tuple(needs))
            made = (*((y,) if op.n_out == 1 else y), *(getattr(res, k) for k in self.computed))
            return _as_promised(made, op.outputs(*map(_shadow, flat), needs=tuple(needs)), flat[0])

        def fake(*args: Any) -> Args:
            *flat, needs, _ = args
            return _promise(op.outputs(*flat, needs=tuple(needs)), flat[0])

        return _operator(f"{op.name}_fwd", _parameters(op.hints), op.n_out + len(self.computed), impl, fake)

    def _bwd_operator(self) -> Any:
        op = self.op

        def parts(args: Args) -> tuple[Any, Any, Args, Any]:
            *tensors, needs, backend = args
            dy, fields = tensors[: op.n_out], tensors[op.n_out :]
            return op.residuals(*fields), dy[0] if op.n_out == 1 else tuple(dy), tuple(needs), backend

        def impl(*args: Any) -> Args:
            res, dy, needs, backend = parts(args)
            promised = op.gradients(op.residuals(*map(_shadow, res)), _shadow(dy) if op.n_out == 1 else tuple(map(_shadow, dy)), needs)
            return _as_promised(op.run_bwd(backend, res, dy, needs, False), promised, args[0])

        def fake(*args: Any) -> Args:
            res, dy, needs, _ = parts(args)
            return _promise(op.gradients(res, dy, needs), args[0])

        cotangents = "".join(f"Tensor d{i}, " for i in range(op.n_out))
        return _operator(f"{op.name}_bwd", cotangents + _parameters(op.fields), op.diff, impl, fake)

    def _function(self) -> Callable[..., Any]:
        op, fwd_op, bwd_op = self.op, self.fwd_op, self.bwd_op
        diff, n_out, saved = op.diff, op.n_out, op.saved
        no_more = (None,) * (len(op.hints) - diff + 2)

        def setup(ctx: Any, args: Args, out: Any) -> None:
            ctx.mark_non_differentiable(*out[n_out:])
            fields = self._fields(args[:-2], out)
            ctx.save_for_backward(*fields[:saved])
            ctx.rest = fields[saved:], args[-1]

        def backward(ctx: Any, *d: Any) -> Args:
            options, backend = ctx.rest
            if any(ctx.needs_input_grad[diff : op.tensors]):  # a transform hid this from the check of the arguments
                names = ", ".join(list(op.hints)[diff : op.tensors])
                raise ValueError(f"{op.name}: no gradient is computed for {names}; liger_fn.{op.name}.reference has one")
            needs = list(ctx.needs_input_grad[:diff])
            grads = inner.apply(*d[:n_out], *ctx.saved_tensors, *options, needs, backend)
            return (*(g if n else None for g, n in zip(grads, needs, strict=True)), *no_more)

        inner = _autograd(f"{op.name}_bwd", lambda *args: bwd_op(*args), lambda ctx, args, out: None, refusal(op.name))
        outer = _autograd(op.name, lambda *args: fwd_op(*args), setup, backward)

        @torch.compiler.allow_in_graph
        def call(backend: str, graded: bool, *flat: Any) -> Any:
            needs = [t is not None and (_tracked(t) if transforms_active() else graded and t.requires_grad) for t in flat[:diff]]
            out = outer.apply(*flat, needs, backend)
            if op.aux_flag is not None and flat[op.aux_flag]:
                return out[0], out[n_out + self.computed.index("aux")]
            return out[0] if n_out == 1 else out[:n_out]

        return call


transforms_active = torch._C._are_functorch_transforms_active


def _tracked(t: Tensor) -> bool:
    """Does some level of the active transforms differentiate `t`?"""
    while not t.requires_grad:
        if not functorch.is_functorch_wrapped_tensor(t):
            return False
        t = functorch.get_unwrapped(t)
    return True


def _autograd(name: str, forward: Any, setup: Any, backward: Any) -> type[Function]:
    body = {"forward": staticmethod(forward), "setup_context": staticmethod(setup), "backward": staticmethod(backward)}
    return type(name, (Function,), {"generate_vmap_rule": True, **body})


def _parameters(hints: dict[str, Any]) -> str:
    return ", ".join(f"{_SCHEMA[h]} {k}" for k, h in hints.items())


def _operator(name: str, parameters: str, n_returns: int, impl: Callable[..., Args], fake: Callable[..., Args]) -> Any:
    """Register `impl` as the operator `liger_fn::name`; the call returned deals in tuples, however many tensors there are."""
    single = n_returns == 1
    returns = "Tensor" if single else f"({', '.join(['Tensor'] * n_returns)})"

    def bare(fn: Callable[..., Args]) -> Callable[..., Any]:
        return (lambda *args: fn(*args)[0]) if single else fn

    schema = f"({parameters}, bool[] needs, str backend) -> {returns}"
    operator = torch.library.custom_op(f"liger_fn::{name}", bare(impl), mutates_args=(), schema=schema)
    operator.register_fake(bare(fake))

    def over_batch(info: Any, in_dims: Args, *args: Any) -> tuple[Any, Any]:
        """One call for each element of the batch: always right, whatever the op does with its axes."""
        calls = [
            operator(*(a if not isinstance(a, Tensor) or d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        return (torch.stack(calls), 0) if single else (tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * n_returns)

    operator.register_vmap(over_batch)
    return (lambda *args: (operator(*args),)) if single else operator


def _promise(outputs: Args, like: Tensor) -> Args:
    """Operators return tensors only: an absent one is an empty tensor."""
    return tuple(like.new_empty(0) if t is None else t for t in outputs)


def _shadow(t: Any) -> Any:
    """A tensor's shape, strides and dtype without its memory."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") if isinstance(t, Tensor) else t


def _as_promised(made: Args, promised: Args, like: Tensor) -> Args:
    """The tensors an operator made, in the layout that its fake announced to the compiler."""

    def laid_out(m: Tensor | None, p: Tensor | None) -> Tensor:
        if m is None or p is None:
            return like.new_empty(0)
        return m if m.stride() == p.stride() else torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=m.device).copy_(m)

    return tuple(laid_out(m, p) for m, p in zip(made, promised, strict=True))
