"""The MLP of a mixture of experts as a module."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import liger_fn


class Experts(nn.Module):
    """All experts of a layer, over `liger_fn.moe_experts`; or those of one rank, over `liger_fn.expert_parallel_moe_experts`.

    Args:
        hidden_size: of the input and the output.
        intermediate_size: of each expert's gate and up projection.
        num_experts: how many there are, on all ranks together.
        bias: whether projections have one.
        group: a `torch.distributed.ProcessGroup` over whose ranks the experts are divided in their order; None for all of them here.
        options: what `liger_fn.moe_experts` takes besides: `activation`, `packed`, `limit`, `alpha`, `save`; with a group also `exchange`.
        device, dtype: of the parameters.

    State: `gate_up_proj` `[E, 2I, H]` (`[E, I, H]` under the name `up_proj` for an activation without a gate) and `down_proj` `[E, H, I]`,
    with `_bias` behind the name of one that has any: the names that transformers' experts have. With a group, the rows of this rank.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, bias: bool = False, *, group: Any = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        ranks = 1 if group is None else group.size()
        if num_experts % ranks:
            raise ValueError(f"Experts: num_experts must be a multiple of the group's {ranks} ranks, got {num_experts}; add some to pad it")
        num_experts //= ranks
        # By name, which can be copied and saved.
        self.options, self.group_name = options, None if group is None else group.group_name
        gated = options.get("activation") != "relu2"
        self.first = "gate_up_proj" if gated else "up_proj"
        columns = 2 * intermediate_size if gated else intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            self.first: (num_experts, columns, hidden_size), "down_proj": (num_experts, hidden_size, intermediate_size)
        }  # fmt: skip
        if bias:
            shapes |= {f"{self.first}_bias": (num_experts, columns), "down_proj_bias": (num_experts, hidden_size)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as `nn.Linear` has it: uniform within ± 1 / √(inputs), biases too."""
        for name, parameter in self.named_parameters():
            fan_in = getattr(self, name.removesuffix("_bias")).shape[-1]
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, x: Tensor, topk_index: Tensor, topk_weight: Tensor) -> Tensor:
        down: Any = self.down_proj
        experts: Any = liger_fn.moe_experts
        if self.group_name is not None:
            c10d: Any = dist.distributed_c10d
            experts = partial(liger_fn.expert_parallel_moe_experts, group=c10d._resolve_process_group(self.group_name))
        return experts(
            x, getattr(self, self.first), down, topk_index, topk_weight,
            gate_up_bias=getattr(self, f"{self.first}_bias", None), down_bias=getattr(self, "down_proj_bias", None), **self.options,
        )  # fmt: skip


class MoEMLP(nn.Module):
    """A linear router, `liger_fn.moe_router` and the experts: `y = Σ_j w_j expert_j(x)` over the k experts that each token chose.

    Args:
        hidden_size, intermediate_size, num_experts, bias: as in `Experts`.
        k: how many experts a token chooses.
        score, groups, normalize, scale: as in `liger_fn.moe_router`.
        correction_bias: whether there is a buffer `e_score_correction_bias` `[E]` that takes part in the choice alone (DeepSeek-V3);
            who trains updates it.
        options: what `Experts` takes besides: `group`, and the options of `liger_fn.moe_experts`.
        device, dtype: of the parameters.

    State: `gate.weight` and `experts.…`, the names of transformers' mixtures.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, k: int, bias: bool = False, *,
        score: Any = "softmax", groups: Any = None, normalize: bool = True, scale: float = 1.0, correction_bias: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.k, self.router = k, {"score": score, "groups": groups, "normalize": normalize, "scale": scale}
        self.gate = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)
        self.experts = Experts(hidden_size, intermediate_size, num_experts, bias, device=device, dtype=dtype, **options)
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, device=device) if correction_bias else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(y, logits)`: y of x's shape, and the router's logits `[..., E]`, which the losses of routers take."""
        logits = self.gate(x)
        weight, index = liger_fn.moe_router(logits, self.k, bias=self.e_score_correction_bias, **self.router)
        return self.experts(x, index, weight), logits
