"""custom_vjp: a pure forward and a pure backward become one differentiable function, as in JAX.

An op is written as plain functions of flat arguments, tensors first and differentiable tensors before all others:

    reference(*args) -> y                             the definition, in plain PyTorch
    fwd(*args, needs) -> (y, Residuals)               `needs[i]`: is the gradient of argument i wanted at all
    bwd(residuals, dy, needs, donate) -> gradients    one for each differentiable argument, None where not wanted
    outputs(*args, needs) -> (*ys, *computed)         empty tensors: the outputs, then what fwd computes for bwd
    gradients(residuals, dy, needs) -> gradients      empty tensors: what bwd returns

`Residuals` is a NamedTuple, tensors first; its fields that carry an argument's name are that argument, the others are computed by fwd.
`y` and `dy` are tuples where an op has several outputs. `donate` says that nobody will read the computed residuals again.
`outputs` and `gradients` allocate for the kernels and tell a compiler what to expect, so that the two cannot disagree.

Two paths lead to the same pair. Plain eager autograd takes one autograd.Function that calls fwd and bwd directly: the least host time.
A compiler, a functorch transform, a dispatch mode (fake tensors, selective checkpointing) or a tensor subclass takes the other: two
Functions, the inner of which refuses second derivatives, over two opaque custom operators, which all of those know how to handle.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import update_wrapper
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, cast, get_type_hints

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ._backend import Backend, choose, without_autocast

P = ParamSpec("P")
R = TypeVar("R")
Needs = tuple[bool, ...]
Args = tuple[Any, ...]

_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "SymInt", str: "str", bool: "bool"}
_PLAIN = (Tensor, nn.Parameter)


class Pair(NamedTuple):
    """One implementation of an op: its forward and its backward."""

    fwd: Callable[..., tuple[Any, Any]]
    bwd: Callable[..., tuple[Tensor | None, ...]]


class Op(Generic[P, R]):
    """A differentiable pure function, with `fwd`, `bwd` and `reference` beside it. Made by `custom_vjp`."""

    def __init__(
        self,
        arguments: Callable[P, Args],
        residuals: Any,
        kernels: Pair,
        plain: Pair,
        reference: Callable[..., Any],
        outputs: Callable[..., Args],
        gradients: Callable[..., Args],
        diff: int,
        n_out: int,
    ) -> None:
        update_wrapper(self, arguments)  # type: ignore[arg-type]
        self.__signature__ = inspect.signature(arguments).replace(return_annotation=Tensor if n_out == 1 else tuple[(Tensor,) * n_out])
        self.name = arguments.__name__
        self.residuals = residuals
        self._arguments, self._reference, self._outputs, self._gradients = arguments, reference, outputs, gradients
        self._pairs: dict[Backend, Pair] = {"triton": kernels, "interpreter": kernels, "reference": plain}
        self._diff, self._n_out = diff, n_out

        hints = {k: h for k, h in get_type_hints(reference).items() if k != "return"}
        fields = get_type_hints(residuals)
        self._names = list(hints)
        self._tensors = sum(map(_is_tensor, hints.values()))
        self._saved = sum(map(_is_tensor, fields.values()))
        self._computed = [k for k in fields if k not in hints]
        self._lean = _lean(self)
        self._composable = _composable(self, _schema(hints), _schema(fields))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        flat = self._arguments(*args, **kwargs)
        backend = choose(flat[0], self.name)
        graded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in flat[: self._diff])
        if (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or torch._C._len_torch_dispatch_stack() > 0
            or any(type(t) not in _PLAIN for t in flat[: self._tensors] if t is not None)
        ):
            return cast(R, self._composable(backend, graded, *flat))
        if graded:
            return cast(R, self._lean.apply(backend, *flat))  # type: ignore[no-untyped-call]
        return cast(R, self._run_fwd(backend, flat, (False,) * self._diff)[0])

    def fwd(self, *args: P.args, **kwargs: P.kwargs) -> tuple[R, Any]:
        """`(y, residuals)`: the forward alone, outside autograd. Takes what the function itself takes."""
        with torch.no_grad():
            flat = self._arguments(*args, **kwargs)
            needs = tuple(t is not None for t in flat[: self._diff])
            return cast(tuple[R, Any], self._run_fwd(choose(flat[0], self.name), flat, needs))

    def bwd(self, residuals: Any, dy: Any, *, needs: Needs | None = None, donate: bool = False) -> tuple[Tensor | None, ...]:
        """The backward alone, outside autograd.

        Args:
            residuals: what `fwd` returned second.
            dy: the cotangent, of the shape of what `fwd` returned first (a tuple where that is one).
            needs: which gradients to compute, one flag for each; all by default.
            donate: nobody will read what `fwd` computed for this backward again, so its memory may be reused: call `bwd` once only.

        Returns:
            One gradient for each differentiable argument, in their order; None for one that is absent or not wanted.
        """
        if not isinstance(residuals, self.residuals):
            raise TypeError(f"{self.name}.bwd: residuals must be what {self.name}.fwd returned second, got {type(residuals).__name__}")
        first = next(t for t in residuals if isinstance(t, Tensor))
        with torch.no_grad():
            return self._run_bwd(choose(first, self.name), residuals, dy, (True,) * self._diff if needs is None else needs, donate)

    def reference(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The definition, in plain PyTorch: any device, any dtype, differentiable any number of times."""
        return cast(R, self._reference(*self._arguments(*args, **kwargs)))

    def _run_fwd(self, backend: Backend, flat: Args, needs: Needs) -> tuple[Any, Any]:
        device = flat[0].device.type
        if torch.is_autocast_enabled(device):
            with without_autocast(device):
                return self._pairs[backend].fwd(*flat, needs=needs)
        return self._pairs[backend].fwd(*flat, needs=needs)

    def _run_bwd(self, backend: Backend, residuals: Any, dy: Any, needs: Needs, donate: bool) -> tuple[Tensor | None, ...]:
        device = (dy if self._n_out == 1 else dy[0]).device.type
        if torch.is_autocast_enabled(device):
            with without_autocast(device):
                return self._pairs[backend].bwd(residuals, dy, needs=needs, donate=donate)
        return self._pairs[backend].bwd(residuals, dy, needs=needs, donate=donate)

    def __repr__(self) -> str:
        return f"<liger_fn.{self.name}{inspect.signature(self)}>"

    def __reduce__(self) -> str:  # pickled and copied by name, as functions are
        return self.name


def custom_vjp(
    *,
    residuals: Any,
    kernels: tuple[Any, Any],
    plain: tuple[Any, Any],
    reference: Callable[..., Any],
    outputs: Callable[..., Args],
    gradients: Callable[..., Args],
    diff: int,
    n_out: int = 1,
) -> Callable[[Callable[P, Args]], Op[P, Any]]:
    """Decorate the public function, whose body checks its arguments and returns them flat, as `fwd` and `reference` take them."""

    def wrap(arguments: Callable[P, Args]) -> Op[P, Any]:
        return Op(arguments, residuals, Pair(*kernels), Pair(*plain), reference, outputs, gradients, diff, n_out)

    return wrap


def _refuse(op: Op[..., Any]) -> type[Function]:
    """An identity on gradients whose own derivative is an error, so that a second derivative is never a silent zero."""

    def forward(ctx: Any, n: int, *tensors: Tensor | None) -> Args:
        return tuple(t if t is None else t.view_as(t) for t in tensors[:n])

    def backward(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(second_derivative(op.name))

    return type(f"{op.name}_second_derivative", (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


def second_derivative(name: str) -> str:
    """What a user reads who differentiates an op twice."""
    return f"{name}: has a first derivative only; for a second one call liger_fn.{name}.reference, which is plain PyTorch"


def _lean(op: Op[..., Any]) -> type[Function]:
    """Plain eager autograd: one Function, fwd and bwd called directly."""
    diff, saved, residuals = op._diff, op._saved, op.residuals
    refuse = _refuse(op)
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)

    def forward(ctx: Any, backend: Backend, *flat: Any) -> Any:
        y, res = op._run_fwd(backend, flat, ctx.needs_input_grad[1 : 1 + diff])
        ctx.save_for_backward(*res[:saved])
        ctx.rest = backend, res[saved:], (None,) * (len(flat) - diff)
        return y

    def backward(ctx: Any, *dy: Tensor) -> Args:
        backend, options, no_more = ctx.rest
        res = residuals(*ctx.saved_tensors, *options)
        with torch.no_grad():  # the graph frees what fwd computed once this returns, unless it is kept for another backward
            grads = op._run_bwd(backend, res, dy[0] if op._n_out == 1 else dy, ctx.needs_input_grad[1 : 1 + diff], not keep_graph())
        if torch.is_grad_enabled():
            grads = refuse.apply(diff, *grads, *dy, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return (None, *grads, *no_more)

    return type(op.name, (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


def _composable(op: Op[..., Any], parameters: str, fields: str) -> Callable[..., Any]:
    """Compilers, transforms, modes and subclasses: two Functions over two custom operators."""
    diff, n_out, n_args, n_fields = op._diff, op._n_out, len(op._names), len(op.residuals._fields)

    def fwd_impl(*args: Any) -> Args:
        *flat, needs, backend = args
        y, res = op._run_fwd(backend, flat, tuple(needs))
        made = (*((y,) if n_out == 1 else y), *(getattr(res, k) for k in op._computed))
        return _as_promised(made, op._outputs(*flat, needs=tuple(needs)), flat[0])

    def fwd_fake(*args: Any) -> Args:
        *flat, needs, _ = args
        return _promise(op._outputs(*flat, needs=tuple(needs)), flat[0])

    def bwd_parts(args: Args) -> tuple[Any, Any, Needs, Backend]:
        dy, fields, (needs, backend) = args[:n_out], args[n_out : n_out + n_fields], args[n_out + n_fields :]
        return op.residuals(*fields), dy[0] if n_out == 1 else dy, tuple(needs), backend

    def bwd_impl(*args: Any) -> Args:
        res, dy, needs, backend = bwd_parts(args)
        return _as_promised(op._run_bwd(backend, res, dy, needs, False), op._gradients(res, dy, needs), args[0])

    def bwd_fake(*args: Any) -> Args:
        res, dy, needs, _ = bwd_parts(args)
        return _promise(op._gradients(res, dy, needs), args[0])

    cotangents = ", ".join(f"Tensor d{i}" for i in range(n_out))
    fwd_op = _operator(f"{op.name}_fwd", parameters, n_out + len(op._computed), fwd_impl, fwd_fake)
    bwd_op = _operator(f"{op.name}_bwd", f"{cotangents}, {fields}", diff, bwd_impl, bwd_fake)

    def bwd_refuse(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(second_derivative(op.name))

    def setup(ctx: Any, args: Args, out: Any) -> None:
        ctx.mark_non_differentiable(*out[n_out:])
        known = dict(zip(op._names, args, strict=False)) | dict(zip(op._computed, out[n_out:], strict=True))
        res = [known[k] for k in op.residuals._fields]
        ctx.save_for_backward(*res[: op._saved])
        ctx.rest = res[op._saved :], args[-1]

    def backward(ctx: Any, *d: Any) -> Args:
        options, backend = ctx.rest
        needs = list(ctx.needs_input_grad[:diff])
        grads = inner.apply(*d[:n_out], *ctx.saved_tensors, *options, needs, backend)  # type: ignore[no-untyped-call]
        return (*(g if n else None for g, n in zip(grads, needs, strict=True)), *(None,) * (n_args - diff + 2))

    inner = _function(f"{op.name}_bwd", lambda *args: bwd_op(*args), lambda ctx, args, out: None, bwd_refuse)
    outer = _function(op.name, lambda *args: fwd_op(*args), setup, backward)

    @torch.compiler.allow_in_graph
    def call(backend: Backend, graded: bool, *flat: Any) -> Any:
        transformed = torch._C._are_functorch_transforms_active()  # they hide which inputs are differentiated: allow for all
        needs = [t is not None and (transformed or (graded and t.requires_grad)) for t in flat[:diff]]
        out = outer.apply(*flat, needs, backend)  # type: ignore[no-untyped-call]
        return out[0] if n_out == 1 else out[:n_out]

    return call


def _function(name: str, forward: Any, setup: Any, backward: Any) -> type[Function]:
    body = {"forward": staticmethod(forward), "setup_context": staticmethod(setup), "backward": staticmethod(backward)}
    return type(name, (Function,), {"generate_vmap_rule": True, **body})


def _operator(name: str, parameters: str, n_returns: int, impl: Any, fake: Any) -> Any:
    returns = ", ".join(["Tensor"] * n_returns)
    schema = f"({parameters}, bool[] needs, str backend) -> {f'({returns})' if n_returns > 1 else returns}"
    operator = torch.library.custom_op(f"liger_fn::{name}", mutates_args=(), schema=schema)(_single(impl, n_returns))
    operator.register_fake(_single(fake, n_returns))

    def over_batch(info: Any, in_dims: Args, *args: Any) -> tuple[Any, Any]:
        """One call for each element of the batch: always right, whatever the op does with its axes."""
        calls = [
            operator(*(a if not isinstance(a, Tensor) or d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if n_returns == 1:
            return torch.stack(calls), 0
        return tuple(torch.stack(out) for out in zip(*calls, strict=True)), (0,) * n_returns

    operator.register_vmap(over_batch)
    if n_returns == 1:  # Functions here deal in tuples, whatever the number
        return lambda *args: (operator(*args),)
    return operator


def _is_tensor(hint: Any) -> bool:
    return hint in (Tensor, Tensor | None)


def _schema(hints: dict[str, Any]) -> str:
    return ", ".join(f"{_SCHEMA[h]} {k}" for k, h in hints.items())


def _single(fn: Callable[..., Args], n: int) -> Callable[..., Any]:
    return fn if n > 1 else lambda *args: fn(*args)[0]


def _promise(outputs: Args, like: Tensor) -> Args:
    """Operators return tensors only: an absent one is an empty tensor."""
    return tuple(like.new_empty(0) if t is None else t for t in outputs)


def _as_promised(made: Args, promised: Args, like: Tensor) -> Args:
    """The tensors an operator made, in the layout that its fake announced to the compiler."""
    pairs = zip(_promise(made, like), _promise(promised, like), strict=True)
    return tuple(m if m.stride() == p.stride() else p.copy_(m) for m, p in pairs)
