"""Modules: norms and MLPs, computed by `liger_fn` with the module's own parameters and children."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

import liger_fn

from ._dtensor import in_parts, on_parts
from ._sharded_head import is_sharded
from ._spec import GLU, GLU_OPS, Norm
from ._swap import Forward, is_stock

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}
_OPTIONS: dict[str, dict[str, Any]] = {"gelu": {"approximate": "none"}, "gelu_tanh": {"approximate": "tanh"}}
SEPARATE = ("silu", "gelu", "gelu_tanh", "relu")  # the activations of two projections that there are functions for
PACKED = ("silu", "gelu", "gelu_tanh")  # and of one packed projection


class NormForward(Forward):
    """The forward of a norm."""

    __slots__ = ("eps", "op", "spec")

    kind = "norm"

    def __init__(self, module: nn.Module, spec: Norm, eps: str | float) -> None:
        super().__init__(module)
        self.spec, self.eps, self.op = spec, eps, spec.op

    def run(self, module: Any, hidden_states: Tensor) -> Tensor:
        return self._of(module, hidden_states, *self._weights(module))

    def split(self, module: Any, hidden_states: Tensor) -> Tensor:
        weights = self._weights(module)
        if in_parts(self.op, (hidden_states,), weights):
            return on_parts(partial(self._of, module), (hidden_states,), weights)
        return cast(Tensor, self.stock(module, hidden_states))

    def _weights(self, module: Any) -> tuple[Tensor | None, Tensor | None]:
        spec = self.spec
        return getattr(module, spec.weight, None), None if spec.kind == "rms" else getattr(module, "bias", None)

    def _of(self, module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        # eps is read at each call: the module owns it.
        eps, spec = getattr(module, self.eps) if isinstance(self.eps, str) else self.eps, self.spec
        if spec.kind == "rms":
            return liger_fn.rms_norm(x, weight, eps, offset=spec.offset, cast=spec.cast)
        if spec.offset and weight is not None:
            weight = weight + spec.offset
        return liger_fn.layer_norm(x, weight, bias, eps)


class GLUForward(Forward):
    """The forward of an MLP. The projections are called as modules, so adapters, hooks and sharding on them go on working.

    The activation is not called, so it must be the one that it was found to be: with another, or with hooks on it, the module runs as it
    was. What the projections make is donated where nobody else gets hold of it: backward writes its gradient over it.
    """

    __slots__ = ("act", "act_fn", "op", "spec")

    kind = "mlp"
    sharded = True  # by the projections; what they make is looked at

    def __init__(self, module: Any, spec: GLU, act: str) -> None:
        super().__init__(module)
        self.spec, self.act, self.op = spec, act, GLU_OPS[act]
        self.act_fn = getattr(module, spec.act_fn)

    def run(self, module: Any, x: Tensor) -> Tensor:
        spec = self.spec
        if getattr(module, spec.act_fn) is not self.act_fn or is_hooked(self.act_fn):
            return self.stock(module, x)
        options = _OPTIONS.get(self.act, {})
        if spec.gate_multiplier:
            options = options | {"gate_multiplier": getattr(module, spec.gate_multiplier)}
        into = [getattr(module, name) for name in spec.projections[:-1]]
        if all(map(makes_for_us_alone, into)):
            options = options | {"donate": True}
        y = _middle(f"{self.op}_packed" if spec.packed else self.op, tuple(projection(x) for projection in into), options)
        y = getattr(module, spec.down)(y)
        y = y * getattr(module, spec.down_multiplier) if spec.down_multiplier else y
        return F.dropout(y, getattr(module, spec.dropout), module.training) if spec.dropout else y


def _middle(op: str, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> Tensor:
    """A function of what the projections made; its definition, in plain PyTorch, of DTensors that no rank can do its part of alone."""
    function: Callable[..., Tensor] = getattr(liger_fn, op)
    if not is_sharded(inputs[0]):
        return function(*inputs, **options)
    if in_parts(op, inputs):
        return on_parts(partial(function, **options), inputs)
    definition: Callable[..., Tensor] = getattr(liger_fn, op).reference
    return definition(*inputs, **options)


def act_of(function: Callable[[Tensor], Tensor]) -> str | None:
    """Which activation a function is, by its values; None for one that is not known."""
    x = torch.linspace(-8, 8, 65, dtype=torch.float64, device="cpu")
    try:
        y = function(x)
    except Exception:
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    return next((name for name, act in ACTS.items() if torch.allclose(y, act(x), rtol=1e-6, atol=1e-6)), None)


def makes_for_us_alone(projection: Any) -> bool:
    """Whether nobody but the caller gets hold of what a projection returns: it is PyTorch's own linear layer, which keeps its input alone.

    Hooks may keep an output, and adapters and layers of other kinds may have hooks or save it.
    """
    if torch.compiler.is_compiling():  # compilers plan the memory themselves
        return False
    return type(projection) is nn.Linear and not is_hooked(projection) and not _has_any_global_hook()


def is_hooked(function: Any) -> bool:
    """Whether calling a module does more than its class's forward. accelerate's hooks only move what it is given."""
    if not isinstance(function, nn.Module):
        return False
    hooks = function._forward_hooks or function._forward_pre_hooks or function._backward_hooks or function._backward_pre_hooks
    return bool(hooks) or not is_stock(function)
