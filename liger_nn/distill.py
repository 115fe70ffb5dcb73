"""Distillation as a module, for code that holds its loss as an object."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import liger_fn
from liger_fn._loss_options import Reduction
from liger_fn.linear_distill import Accumulate, Divergence, Save


class LinearDistillLoss(nn.Module):
    """`liger_fn.linear_distill` with its options held: `loss_fn(head.weight, x, teacher.weight, x_teacher, target)`, each weight first.

    What differs from call to call, `num_items` and `token_weight`, is given with the call.
    """

    function = "linear_distill"

    def __init__(
        self,
        *,
        divergence: Divergence = "kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        save: Save = "grads",
        accumulate: Accumulate = "auto",
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "divergence": divergence, "beta": beta, "temperature": temperature, "ignore_index": ignore_index, "reduction": reduction,
            "save": save, "accumulate": accumulate, "memory_budget": memory_budget,
        }  # fmt: skip

    def forward(
        self,
        weight: Tensor,
        x: Tensor,
        weight_teacher: Tensor,
        x_teacher: Tensor,
        target: Tensor | None = None,
        bias: Tensor | None = None,
        bias_teacher: Tensor | None = None,
        *,
        num_items: int | Tensor | None = None,
        token_weight: Tensor | None = None,
    ) -> Tensor:
        loss: Tensor = getattr(liger_fn, self.function)(
            x, weight, x_teacher, weight_teacher, target, bias, bias_teacher, num_items=num_items, token_weight=token_weight, **self.options
        )
        return loss

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())
