"""Experts of a mixture, computed by `liger_fn.moe_experts` with the module's own parameters."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

import liger_fn

from ._head import multiplies_itself
from ._modules import act_of, is_hooked
from ._sharded_head import is_sharded
from ._spec import Experts
from ._swap import Forward

ACTS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "relu_squared": "relu2",
}  # as modules have them, and as the function calls them
STOCK = (None, "eager", "grouped_mm", "batched_mm")  # ways of transformers' own to compute the same


class ExpertsForward(Forward):
    """The forward of all experts of a layer: of hidden states, the experts chosen for each, and their weights."""

    __slots__ = ("act", "act_fn", "names", "spec")

    kind = "experts"
    op = "experts"

    def __init__(self, module: Any, spec: Experts, act: str) -> None:
        super().__init__(module)
        self.spec, self.act, self.act_fn = spec, act, getattr(self.experts(module), "act_fn", None)
        self.names = tuple(inspect.signature(type(module).forward).parameters)[2:]

    @property
    def now(self) -> str:
        return "liger_fn.moe_experts"

    def experts(self, module: Any) -> Any:
        """What holds the weights."""
        return module

    def run(self, module: Any, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        if changed(self, module):
            return self.stock(module, hidden_states, *routing, **named)
        given = dict(zip(self.names, routing, strict=False)) | named
        index, weight = (given[name] for name in self.names)
        y = of(module, self.spec, self.act, hidden_states, index, weight)
        if self.spec.identity:  # choices beyond the experts give back what they are given
            y = y + hidden_states * (weight * (index >= len(module.down_proj))).sum(-1, keepdim=True).to(hidden_states.dtype)
        return y


class ScaledExpertsForward(ExpertsForward):
    """The forward of a whole layer whose router scales what experts are given, and not what they return; the original runs all of them
    over all tokens.
    """

    __slots__ = ()

    def experts(self, module: Any) -> Any:
        return module.experts

    def run(self, module: Any, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Any:
        if changed(self, module.experts) or is_hooked(module.experts):
            return self.stock(module, hidden_states, *routing, **named)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = module.router(x)
        weight, index = torch.topk(scores, module.top_k, dim=-1)
        scaled = (x.unsqueeze(1) * weight.unsqueeze(-1)).flatten(0, 1)
        each = of(module.experts, self.spec, self.act, scaled, index.reshape(-1, 1), torch.ones_like(weight).reshape(-1, 1))
        return module.shared_expert(x) + each.view(*weight.shape, -1).sum(1), logits


def of(module: Any, spec: Experts, act: str, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """`liger_fn.moe_experts` of a module's parameters, which lie as it says."""
    first = getattr(module, first_name(module))
    down, transposed = module.down_proj, is_transposed(module, spec)
    if transposed:
        first, down = first.transpose(1, 2), down.transpose(1, 2)
    biased = getattr(module, "has_bias", False)
    return liger_fn.moe_experts(
        x, first[: len(down)], down, index, weight,
        activation=act,  # type: ignore[arg-type]
        gate_up_bias=getattr(module, f"{first_name(module)}_bias") if biased else None,
        down_bias=module.down_proj_bias if biased else None,
        packed="concat" if getattr(module, "is_concatenated", True) else "interleaved",
        limit=getattr(module, spec.limit) if spec.limit else None,
        **({"alpha": getattr(module, spec.alpha)} if spec.alpha else {}),
    )  # fmt: skip


def first_name(module: Any) -> str:
    """What the module calls its first projection."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def is_transposed(module: Any, spec: Experts) -> bool:
    """Whether weights lie as [E, in, out]."""
    return bool(getattr(module, "is_transposed", spec.scaled))


def changed(swap: ExpertsForward, module: Any) -> bool:
    """Whether the module computes something else by now than when it was looked at: another activation, or by the user's own choice."""
    if getattr(getattr(module, "config", None), "_experts_implementation", None) not in STOCK:
        return True
    return getattr(module, "act_fn", None) is not swap.act_fn or is_hooked(swap.act_fn)


def why_not(module: Any, spec: Experts) -> str:
    """Why the function does not compute these experts; empty if it does."""
    names = (
        first_name(module),
        "down_proj",
        *((f"{first_name(module)}_bias", "down_proj_bias") if getattr(module, "has_bias", False) else ()),
    )
    missing = [name for name in names if not isinstance(getattr(module, name, None), Tensor)]
    if missing:
        return f"it has no {', '.join(missing)}"
    if getattr(module, "has_post_expert_norm", False):
        return "it has a norm after each expert"
    return ""


def users_choice(module: Any) -> str:
    """What of the user's stands in the way; empty if nothing does."""
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation not in STOCK:
        return f"its experts are computed by {implementation!r}, as its configuration says"
    for name in (first_name(module), "down_proj"):
        weight = getattr(module, name, None)
        if isinstance(weight, Tensor) and multiplies_itself(weight) and not is_sharded(weight):
            return f"its {name} is a {type(weight).__name__}, which no function of liger_fn reads"
    return ""


def activation(module: Any, spec: Experts) -> str | None:
    """What the function calls the module's activation; None if it has none that the function knows."""
    if spec.act:
        return spec.act
    found = act_of(module.act_fn) if callable(getattr(module, "act_fn", None)) else None
    return ACTS.get(found) if found and (found == "relu_squared") != getattr(module, "has_gate", True) else None
