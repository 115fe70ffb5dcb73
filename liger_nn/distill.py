"""Distillation as a module, for code that holds its loss as an object."""

from __future__ import annotations

from torch import Tensor, nn

import liger_fn
from liger_fn._loss_options import Reduction
from liger_fn.linear_distill import Divergence


class LinearDistillLoss(nn.Module):
    """`liger_fn.linear_distill` with its options held: `loss_fn(head.weight, x, teacher.weight, x_teacher, target)`, each weight first."""

    def __init__(
        self,
        *,
        divergence: Divergence = "kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        self.divergence, self.beta, self.temperature = divergence, beta, temperature
        self.ignore_index, self.reduction, self.memory_budget = ignore_index, reduction, memory_budget

    def forward(
        self,
        weight: Tensor,
        x: Tensor,
        weight_teacher: Tensor,
        x_teacher: Tensor,
        target: Tensor | None = None,
        bias: Tensor | None = None,
        bias_teacher: Tensor | None = None,
    ) -> Tensor:
        return liger_fn.linear_distill(
            x, weight, x_teacher, weight_teacher, target, bias, bias_teacher, divergence=self.divergence, beta=self.beta,
            temperature=self.temperature, ignore_index=self.ignore_index, reduction=self.reduction, memory_budget=self.memory_budget,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"divergence={self.divergence!r}, beta={self.beta}, temperature={self.temperature}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}, memory_budget={self.memory_budget}"
        )
