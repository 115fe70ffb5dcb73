"""Modules: norms and gated MLPs, computed by `liger_fn` with the module's own parameters and children."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import liger_fn

from ._spec import Norm
from ._swap import Forward


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
    """The forward of a gated MLP. The projections are called as modules, so adapters, hooks and sharding on them go on working."""

    __slots__ = ()

    op = "swiglu"

    def run(self, module: Any, x: Tensor) -> Tensor:
        return module.down_proj(liger_fn.swiglu(module.gate_proj(x), module.up_proj(x)))
