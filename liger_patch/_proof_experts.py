"""Are the experts that a function computes those of the original? As in `_proof`; the original runs expert by expert."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._experts import ExpertsForward, first_name, is_transposed
from ._proof import Place, Run, compare, gradients, normal, stand_in

TOKENS, HIDDEN, INNER = 192, 32, 16  # of a stand-in; it has as many experts as the module. Over few tokens, who errs less is luck
WIDTHS = {
    **dict.fromkeys(("hidden_size", "hidden_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "intermediate_dim", "expert_dim"), INNER),
}  # by which modules shape what they are given


class _Eager:
    """A module's configuration, in which experts are computed one by one: products in groups know no fp64."""

    _experts_implementation = "eager"

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def prove_experts(swap: ExpertsForward, at: Place) -> None:
    module, scaled = swap.module, swap.spec.scaled
    experts = module.experts if scaled else module
    dtype, device = at
    count, chosen = len(experts.down_proj), min(2, len(experts.down_proj))

    def run(forward: Callable[..., Any]) -> Run:
        def values(held: torch.dtype) -> Mapping[str, Tensor]:
            own = _parameters(swap, experts, held, device, dtype)
            twin, x = _small(experts, own), normal((TOKENS, HIDDEN), held, device, seed=1, rounded=dtype, scale=2.0)
            score = torch.rand(TOKENS, count, generator=torch.Generator().manual_seed(2), device="cpu")
            given = {"input": x} | own
            if scaled:
                router = normal((count, HIDDEN), held, device, seed=3, rounded=dtype, scale=HIDDEN**-0.5)
                layer = stand_in(
                    module,
                    modules={
                        "experts": twin,
                        "router": stand_in(module.router, parameters={"weight": router}),
                        "shared_expert": _Doubled(),
                    },
                )
                layer.__dict__.update(_widths(module))
                y, logits = forward(layer, x)
                return {"output": y, "router's logits": logits} | gradients([y, logits], given | {"router's weight": router})
            index = score.topk(chosen, -1).indices.to(device)
            if swap.spec.identity:
                index[0, 0] = count
            weight = normal((TOKENS, chosen), held, device, seed=4, rounded=dtype)
            y = forward(twin, x, index, weight)
            return {"output": y} | gradients([y], given | {"weights": weight})

        return values

    compare(run(type(module).forward), run(swap.run), dtype, device)


class _Doubled(nn.Module):
    """In place of a shared expert: what it returns may be written to."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _parameters(swap: ExpertsForward, module: Any, held: torch.dtype, device: torch.device, rounded: torch.dtype) -> dict[str, Tensor]:
    """Small random ones, as many and as they lie."""
    first, count = first_name(module), len(module.down_proj)
    columns = 2 * INNER if first == "gate_up_proj" else INNER
    shapes: dict[str, tuple[int, ...]] = {first: (len(getattr(module, first)), columns, HIDDEN), "down_proj": (count, HIDDEN, INNER)}
    if is_transposed(module, swap.spec):
        shapes = {name: (shape[0], shape[2], shape[1]) for name, shape in shapes.items()}
    if getattr(module, "has_bias", False):
        shapes |= {f"{first}_bias": (count, columns), "down_proj_bias": (count, HIDDEN)}
    scales = {first: 2 / math.sqrt(HIDDEN), "down_proj": 1 / math.sqrt(INNER)}
    return {
        name: normal(shape, held, device, seed=10 + i, rounded=rounded, scale=scales.get(name, 1.0))
        for i, (name, shape) in enumerate(shapes.items())
    }


def _small(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    twin = stand_in(module, parameters=parameters)
    twin.__dict__.update(_widths(module))
    if hasattr(module, "config"):
        twin.__dict__["config"] = _Eager(module.config)
    return twin


def _widths(module: nn.Module) -> dict[str, int]:
    return {name: width for name, width in WIDTHS.items() if hasattr(module, name)}
