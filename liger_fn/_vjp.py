"""custom_vjp: a pure forward and a pure backward become one differentiable function, as in JAX.

An op is written as plain functions of flat arguments, tensors first and differentiable tensors before all others:

    reference(*args) -> y                             the definition, in plain PyTorch
    fwd(*args, needs) -> (y, Residuals)               `needs[i]`: is the gradient of argument i wanted at all
    bwd(residuals, dy, needs, donate) -> gradients    one for each differentiable argument, None where not wanted
    outputs(*args, needs) -> (*ys, *computed)         empty tensors: the outputs, then what fwd computes for bwd
    gradients(residuals, dy, needs) -> gradients      empty tensors: what bwd returns

`Residuals` is a NamedTuple, tensors first; its fields that carry an argument's name are that argument, the others are computed by fwd.
`y` and `dy` are tuples where an op has several outputs. An op with an argument `return_aux` computes a residual `aux`, None unless asked
for, which the call returns beside y, without a derivative. `donate` says that nobody will read the computed residuals again.
`outputs` and `gradients` allocate for the kernels and tell a compiler what to expect, so that the two cannot disagree.

An op with an argument `donate` may write to its inputs on the first of two paths, and bumps the version of those it writes to.

Two paths lead to the same pair. Plain eager autograd takes one autograd.Function that calls fwd and bwd directly (`_lean`, below): the
least host time. Whatever has to look inside or around a call (a compiler, a functorch transform, a dispatch mode, a tensor subclass) takes
two Functions over two opaque custom operators (`_composable.py`), which all of those know how to handle.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, cast, get_type_hints

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

from ._backend import Backend, choose, in_own_dtypes
from ._composable import Composable, is_tensor, refusal

P = ParamSpec("P")
R = TypeVar("R")
Needs = tuple[bool, ...]
Args = tuple[Any, ...]

_PLAIN = (Tensor, nn.Parameter)
_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")
# Names of their own: what every call looks up through two modules, backward's thread has to fetch from forward's core.
_is_compiling, _transforming = torch.compiler.is_compiling, torch._C._are_functorch_transforms_active
_outside = torch._C._functorch.unwrap_if_dead  # a tensor that left the transform it was made in is still wrapped
_modes, _active, _grad_enabled = torch._C._len_torch_dispatch_stack, torch._C._dispatch_tls_is_dispatch_key_included, torch.is_grad_enabled


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
        pairs: dict[Backend, Pair],
        reference: Callable[..., Any],
        outputs: Callable[..., Args],
        gradients: Callable[..., Args],
        cotangents: Callable[[Any], tuple[Any, ...]],
        diff: int,
        n_out: int,
        aux: Callable[[Args, Any, Tensor], Any] | None,
        shaped: Callable[..., Any] | None,
    ) -> None:
        update_wrapper(self, arguments)
        returns = Tensor if n_out == 1 else tuple[(Tensor,) * n_out] if shaped is None else Any  # type: ignore[misc]
        self.__signature__ = inspect.signature(arguments).replace(return_annotation=returns)
        self.name = arguments.__name__
        self.residuals, self.outputs, self.gradients = residuals, outputs, gradients
        self.cotangents = cotangents
        self.diff, self.n_out, self._aux = diff, n_out, aux if shaped is None else lambda flat, *out: shaped(*out)
        self._arguments, self._reference, self.pairs = arguments, reference, pairs

        self.hints = {k: h for k, h in get_type_hints(reference).items() if k != "return"}
        self.fields = get_type_hints(residuals)
        self.tensors = sum(map(is_tensor, self.hints.values()))
        self.saved = sum(map(is_tensor, self.fields.values()))
        self._donate = list(self.hints).index("donate") if "donate" in self.hints else None
        self.aux_flag = list(self.hints).index("return_aux") if aux is not None else None
        self._lean = _lean(self)  # `apply`, without its look for functorch's transforms and wrappers: `__call__` has looked
        self.composable = Composable(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        flat = self._arguments(*args, **kwargs)
        backend = choose(flat[0], self.name)
        if forward_ad._current_level >= 0 and any(_tangent(t) for t in flat[: self.tensors]):
            raise NotImplementedError(
                f"{self.name}: has no forward-mode derivative; call liger_fn.{self.name}.reference, which is plain PyTorch"
            )
        graded, tensors = _grad_enabled() and self._differentiated(flat), flat[: self.tensors]
        if self.composes(tensors):
            out = self.composable.call(backend, graded, *self._kept(flat))
        else:
            inputs, options = [t if t is None else _outside(t) for t in tensors], flat[self.tensors :]
            if graded:
                out = self._lean(backend, options, *inputs)
            else:
                out = self.with_aux(flat, *self.run_fwd(backend, (*inputs, *options), (False,) * self.diff))
        return cast(R, out if self._aux is None else self._finished(flat, out))

    def fwd(self, *args: P.args, **kwargs: P.kwargs) -> tuple[R, Any]:
        """`(y, residuals)`: the forward alone, outside autograd. Takes what the function itself takes."""
        with torch.no_grad():
            flat = self._arguments(*args, **kwargs)
            needs = tuple(t is not None for t in flat[: self.diff])
            composes = self.composes(flat[: self.tensors])
            flat, run = (self._kept(flat), self.composable.fwd) if composes else (flat, self.run_fwd)
            y, residuals = run(choose(flat[0], self.name), flat, needs)
            return cast(R, y if self._aux is None else self._finished(flat, self.with_aux(flat, y, residuals))), residuals

    def bwd(self, residuals: Any, dy: Any, *, needs: Needs | None = None, donate: bool = False) -> tuple[Tensor | None, ...]:
        """The backward alone, outside autograd.

        Args:
            residuals: what `fwd` returned second.
            dy: the cotangent, of the shape of what `fwd` returned first (one flat tuple where that is several tensors).
            needs: which gradients to compute, one flag for each; all by default.
            donate: nobody will read what `fwd` computed for this backward again, so its memory may be reused: call `bwd` once only.

        Returns:
            One gradient for each differentiable argument, in their order; None for one that is absent or not wanted.
        """
        if not isinstance(residuals, self.residuals):
            raise TypeError(f"{self.name}.bwd: residuals must be what {self.name}.fwd returned second, got {type(residuals).__name__}")
        if needs is not None and len(needs) != self.diff:
            raise ValueError(f"{self.name}.bwd: needs must have {self.diff} flags, one for each gradient, got {len(needs)}")
        self._check_cotangent(residuals, dy)
        tensors = [t for t in residuals if isinstance(t, Tensor)]
        with torch.no_grad():
            run = self.composable.bwd if self.composes((*tensors, *(dy if self.n_out > 1 else (dy,)))) else self.run_bwd
            return run(choose(tensors[0], self.name), residuals, dy, (True,) * self.diff if needs is None else needs, donate)

    def _check_cotangent(self, residuals: Any, dy: Any) -> None:
        """Kernels trust the shape of `dy`, which autograd vouches for and a caller of `bwd` does not."""
        each, want = dy if self.n_out > 1 else (dy,), self.cotangents(residuals)
        if not isinstance(each, tuple | list) or len(each) != self.n_out or not all(isinstance(d, Tensor) for d in each):
            raise TypeError(
                f"{self.name}.bwd: dy must be {self.n_out} tensor(s), in one flat tuple, as {self.name}.fwd returned them first"
            )
        for d, shape in zip(each, want, strict=True):
            if len(d.shape) != len(shape) or any(w is not None and n != w for n, w in zip(d.shape, shape, strict=True)):
                raise ValueError(
                    f"{self.name}.bwd: dy must have the shape of what {self.name}.fwd returned first, {list(shape)}, got {list(d.shape)}"
                )

    def reference(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The definition, in plain PyTorch: any device, any dtype, differentiable any number of times."""
        flat = self._arguments(*args, **kwargs)
        y = self._reference(*flat)
        return cast(R, y if self._aux is None else self._finished(flat, y))

    def with_aux(self, flat: Args, y: Any, residuals: Any) -> Any:
        """`y`, or `(y, aux)` where that was asked for."""
        return y if self.aux_flag is None or not flat[self.aux_flag] else (y, residuals.aux)

    def _kept(self, flat: Args) -> Args:
        """`flat` without its leave to `donate`: an operator promises the compiler to write to nothing."""
        return flat if self._donate is None else (*flat[: self._donate], False, *flat[self._donate + 1 :])

    def _finished(self, flat: Args, out: Any) -> Any:
        return self._aux(flat, *out) if self._aux is not None and isinstance(out, tuple) else out

    def run_fwd(self, backend: Backend, flat: Args, needs: Needs) -> tuple[Any, Any]:
        """The pair's forward on `backend`."""
        return self.pairs[backend].fwd(*flat, needs=needs)

    def run_bwd(self, backend: Backend, residuals: Any, dy: Any, needs: Needs, donate: bool) -> tuple[Tensor | None, ...]:
        """The pair's backward, likewise."""
        return self.pairs[backend].bwd(residuals, dy, needs=needs, donate=donate)

    def _differentiated(self, flat: Args) -> bool:
        for t in flat[: self.diff]:  # noqa: SIM110  a loop: this is every call's host time
            if t is not None and t.requires_grad:
                return True
        return False

    @staticmethod
    def composes(tensors: Any) -> bool:
        """Must this call be made of operators that others can see: compilers, transforms, dispatch modes, tensor subclasses?

        Or that PyTorch hands numbers to: those of a negative view, such as `z.conj().imag`, have another sign in memory.
        """
        if _is_compiling() or _transforming() or _modes() > 0:
            return True
        for t in tensors:  # noqa: SIM110
            if t is not None and (type(t) not in _PLAIN or t.is_neg()):
                return True
        return False

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
    cotangents: Callable[[Any], tuple[Any, ...]],
    diff: int,
    n_out: int = 1,
    aux: Callable[[Args, Any, Tensor], Any] | None = None,
    shaped: Callable[..., Any] | None = None,
    kind: Any = Op,
) -> Callable[[Callable[P, Args]], Op[P, Any]]:
    """Decorate the public function, whose body checks its arguments and returns them flat, as `fwd` and `reference` take them.

    Args:
        residuals: the NamedTuple that fwd hands to bwd.
        kernels: (fwd, bwd) over Triton kernels; `in_own_dtypes` where they call PyTorch too. plain: the same pair in plain PyTorch.
        reference, outputs, gradients: see the module's text.
        cotangents: the shape of each output, from the residuals; None for a length that they do not tell.
        diff: how many arguments are differentiable; they come first. n_out: how many outputs there are.
        aux: makes what a call with `return_aux` returns, from the flat arguments, y and the residual `aux`.
        shaped: makes what a call returns, from its outputs, where that is not their tuple.
        kind: of op, where it is more than `Op`.
    """
    kernel, torchs = Pair(*kernels), Pair(*map(in_own_dtypes, plain))
    pairs: dict[Backend, Pair] = {"triton": kernel, "interpreter": kernel, "reference": torchs}

    def wrap(arguments: Callable[P, Args]) -> Op[P, Any]:
        return kind(arguments, residuals, pairs, reference, outputs, gradients, cotangents, diff, n_out, aux, shaped)

    return wrap


def _lean(op: Op[..., Any]) -> Callable[..., Any]:
    """Plain eager autograd: one Function, fwd and bwd called directly."""
    diff, saved, residuals = op.diff, op.saved, op.residuals
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    refuse = _refuse(op.name)
    pairs, composes, aux_flag, n_out, n_tensors = op.pairs, op.composes, op.aux_flag, op.n_out, op.tensors
    no_more = (None,) * (n_tensors - diff)

    def forward(ctx: Any, backend: Backend, options: Args, *tensors: Tensor | None) -> Any:
        y, res = pairs[backend].fwd(*tensors, *options, needs=ctx.needs_input_grad[2 : 2 + diff])
        ctx.save_for_backward(*res[:saved])
        ctx.rest = backend, res[saved:]
        if aux_flag is None or not options[aux_flag - n_tensors]:
            return y
        ctx.mark_non_differentiable(res.aux)
        return y, res.aux

    def backward(ctx: Any, *dy: Tensor) -> Args:
        backend, options = ctx.rest
        tensors = ctx.saved_tensors  # unpacked once: checkpointing makes them anew at each reading
        res = tuple.__new__(residuals, tensors + options)
        needs = ctx.needs_input_grad[2 : 2 + diff]
        seen = composes(dy) or _active(_VMAP_MODE)  # or the graph is walked with many cotangents at once
        run = partial(op.composable.bwd, backend) if seen else pairs[backend].bwd
        # What fwd computed is freed once this returns, unless the graph is kept for another backward.
        rest = res, dy[0] if n_out == 1 else dy, needs, not keep_graph()
        if _grad_enabled():
            with torch.no_grad():
                grads = run(*rest)
            # What forward made of the inputs depends on them, though it says so nowhere: a gradient made of it is no constant.
            hidden = (torch.empty(0, requires_grad=True),) if op.composable.computed else ()
            grads = refuse.apply(diff, *grads, *dy, *tensors, *hidden)
        else:
            grads = run(*rest)
        return (None, None, *grads, *no_more)

    made: Any = type(op.name, (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})
    made._backward_cls.apply = backward  # which the one it has would look up and call
    return super(Function, made).apply


def _tangent(t: Tensor | None) -> bool:
    return t is not None and forward_ad.unpack_dual(t).tangent is not None


def _refuse(name: str) -> type[Function]:
    """An identity on gradients whose own derivative is an error, so that a second derivative is never a silent zero."""

    def forward(ctx: Any, n: int, *tensors: Tensor | None) -> Args:
        return tuple(t if t is None else t.view_as(t) for t in tensors[:n])

    return type(f"{name}_bwd", (Function,), {"forward": staticmethod(forward), "backward": staticmethod(refusal(name))})
