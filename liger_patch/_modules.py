"""Modules: norms and gated MLPs, computed by `liger_fn` with the module's own parameters and children."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import liger_fn

from ._spec import Norm
from ._swap import Forward, is_stock


class NormForward(Forward):
    """The forward of an RMSNorm."""

    __slots__ = ("cast", "eps", "offset")

    op = "rms_norm"

    def __init__(self, module: nn.Module, spec: Norm, eps: str) -> None:
        super().__init__(module)
        self.eps, self.offset, self.cast = eps, spec.offset, spec.cast

    def run(self, module: Any, hidden_states: Tensor) -> Tensor:
        # eps is read at each call: the module owns it.
        return liger_fn.rms_norm(hidden_states, module.weight, getattr(module, self.eps), offset=self.offset, cast=self.cast)


class GLUForward(Forward):
    """The forward of a gated MLP. The projections are called as modules, so adapters, hooks and sharding on them go on working.

    The activation is not called, so it must be the one that was found to be silu: with another, or with hooks on it, the module runs as
    it was.
    """

    __slots__ = ("act_fn",)

    op = "swiglu"

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.act_fn = module.act_fn

    def run(self, module: Any, x: Tensor) -> Tensor:
        if module.act_fn is not self.act_fn or is_hooked(self.act_fn):
            return self.stock(module, x)
        return module.down_proj(liger_fn.swiglu(module.gate_proj(x), module.up_proj(x)))


def is_hooked(function: Any) -> bool:
    """Whether calling a module does more than its class's forward. accelerate's hooks only move what it is given."""
    if not isinstance(function, nn.Module):
        return False
    hooks = function._forward_hooks or function._forward_pre_hooks or function._backward_hooks or function._backward_pre_hooks
    return bool(hooks) or not is_stock(function)
