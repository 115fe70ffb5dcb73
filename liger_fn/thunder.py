"""liger_fn's functions in `thunder.jit`: an executor of Lightning Thunder with three operators for each, call, forward and backward.

Thunder's interpreter steps into Python functions with proxies in place of tensors, which neither the checks of the arguments nor a
custom operator take. `register()` makes each function one operation to it: what that returns is asked of the function itself, on fake
tensors, and its gradient is the pair of operators that compilers see anyway (`_composable.py`). As under a compiler, nothing is donated,
and the backend is the one at the time of compilation. Only this module imports Thunder, and nothing else imports this module.

    liger_fn.thunder.register()
    step = thunder.jit(model)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import thunder
import torch
from thunder.clang import maybe_convert_to_dtype
from thunder.core import prims
from thunder.core.devices import to_device, to_torch_device
from thunder.core.dtypes import is_float_dtype, to_dtype, to_torch_dtype
from thunder.core.proxies import NumberProxy, TensorProxy
from thunder.core.symbol import default_python_printer
from thunder.extend import OperatorExecutor, add_default_executor, register_executor
from thunder.transforms.autocast import register_autocast_rule
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import liger_fn

from ._backend import Backend, choose
from ._vjp import Needs, Op

Args = tuple[Any, ...]


@cache
def register() -> OperatorExecutor:
    """Make every function of liger_fn known to `thunder.jit`, once in a process, before the first call that is to be compiled.

    Returns:
        The executor, which is among the defaults from here on; name it in `thunder.jit(fn, executors=[...])` where you list your own.
    """
    executor = OperatorExecutor("liger_fn", version=thunder.__version__)
    for op in vars(liger_fn).values():
        if isinstance(op, Op):
            _register(executor, op)
    register_executor(executor)
    add_default_executor(executor)
    return executor


def _register(executor: OperatorExecutor, op: Op[..., Any]) -> None:
    """Three operators: the call as it is, the forward of a call that is differentiated, and its backward."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)  # which donates nothing where nobody wants gradients

    def forward(backend: Backend, needs: Needs, args: Args, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        flat = op._kept(op._arguments(*args, **kwargs))
        y, residuals = op.composable.fwd(backend, flat, needs)
        return op._finished(flat, op.with_aux(flat, y, residuals)), residuals

    def fwd(backend: Backend, needs: Needs, args: Args, kwargs: dict[str, Any]) -> Args:
        out, residuals = forward(backend, needs, args, kwargs)
        return *_tensors(out), *_tensors(residuals)

    def bwd(backend: Backend, needs: Needs, dy: Args, residuals: Args) -> Args:
        grads = op.composable.bwd(backend, op.residuals(*residuals), dy[0] if op.n_out == 1 else dy, needs, False)
        return tuple(_tensors(grads))

    call_op, fwd_op, bwd_op = (
        executor.register_operator(f"liger_fn_{op.name}{part}", meta=_meta(fn), fn=fn, replaces=replaces, python_printer=_printed)
        for part, fn, replaces in (("", call, op), ("_fwd", fwd, None), ("_bwd", bwd, None))
    )

    def differentiated(*args: Any, **kwargs: Any) -> Any:
        """The call's result, and what it adds to its arguments' gradients (`put_grad`) for those of its outputs (`get_grad`)."""
        inputs = inspect.signature(op).bind(*args, **kwargs).arguments
        wrt = [inputs.get(k) for k in list(op.hints)[: op.diff]]
        needs = tuple(map(_needed, wrt))
        if not any(needs):
            return call_op(*args, **kwargs)
        with FakeTensorMode(), _autocast(args, kwargs):
            fakes = _faked((args, kwargs))
            backend = choose(op._arguments(*fakes[0], **fakes[1])[0], op.name)
            result, (out, residuals) = op(*fakes[0], **fakes[1]), forward(backend, needs, *fakes)
        made = iter(fwd_op(backend, needs, args, kwargs))
        ys = [next(made) for _ in _tensors(out)]
        known = tuple(next(made) if isinstance(t, Tensor) else t for t in residuals)
        grads = iter(bwd_op(backend, needs, tuple(map(prims.get_grad, ys[: op.n_out])), known))
        for x, needed in zip(wrt, needs, strict=True):
            if needed:
                prims.put_grad(x, next(grads))
        public = iter(ys)
        return tree_map(lambda t: next(public) if isinstance(t, Tensor) else t, result)

    def autocast(*args: Any, dtype: Any, **kwargs: Any) -> Any:
        """The call with those arguments cast that the function itself casts under autocast: Thunder runs what it compiled without."""
        bound = inspect.signature(op).bind(*args, **kwargs)
        with FakeTensorMode(), _autocast(args, kwargs, to_torch_dtype(dtype)):
            fakes = _faked((args, kwargs))
            flat = dict(zip(op.hints, op._arguments(*fakes[0], **fakes[1]), strict=True))
        for name, x in bound.arguments.items():
            if isinstance(x, TensorProxy) and is_float_dtype(x.dtype):
                bound.arguments[name] = maybe_convert_to_dtype(x, to_dtype(flat[name].dtype))
        return call_op(*bound.args, **bound.kwargs)

    register_autocast_rule(call_op.id)(autocast)
    executor.register_implementation(call_op, call_op, grad_transform=differentiated)


def _meta(fn: Callable[..., Any]) -> Callable[..., Any]:
    """What `fn` returns of proxies: proxies shaped as what it returns of fake tensors."""

    def meta(*args: Any, **kwargs: Any) -> Any:
        with FakeTensorMode(), _autocast(args, kwargs):
            args, kwargs = _faked((args, kwargs))
            return tree_map(_proxy, fn(*args, **kwargs))

    return meta


def _autocast(args: Args, kwargs: dict[str, Any], dtype: torch.dtype | None = None) -> torch.autocast:
    """Autocast to `dtype`, or none, where the arguments are."""
    device = next(x.device for x in tree_leaves((args, kwargs)) if isinstance(x, TensorProxy))
    return torch.autocast(to_torch_device(device).type, dtype, enabled=dtype is not None)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _printed(bound: Any, result: Any, *arguments: Any) -> Any:
    """A line of the compiled program. Thunder writes a named tuple as a call of its class, which nothing can be assigned to."""

    def plain(x: Any) -> Any:
        return tuple(map(plain, x)) if isinstance(x, tuple) else x

    return default_python_printer(bound, plain(result), *arguments)


def _needed(x: Any) -> bool:
    """Is its gradient wanted? Thunder says so of inputs alone, which are the proxies with a history; anything else may depend on one."""
    return isinstance(x, TensorProxy) and (x.requires_grad or x.history is None)


def _faked(tree: Any) -> Any:
    def fake(x: Any) -> Any:
        if isinstance(x, TensorProxy):
            return torch.empty(tuple(map(int, x.shape)), dtype=to_torch_dtype(x.dtype), device=to_torch_device(x.device))
        return x.value if isinstance(x, NumberProxy) else x

    return tree_map(fake, tree)


def _proxy(t: Any) -> Any:
    return TensorProxy(shape=tuple(t.shape), dtype=to_dtype(t.dtype), device=to_device(t.device)) if isinstance(t, Tensor) else t
