"""Losses as modules, for code that holds its loss as an object."""

from __future__ import annotations

from torch import Tensor, nn

import liger_fn
from liger_fn.cross_entropy import Reduction
from liger_fn.linear_cross_entropy import MEMORY_BUDGET


class CrossEntropyLoss(nn.Module):
    """`liger_fn.cross_entropy` with its options held: `loss_fn(logits, target)`."""

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.ignore_index, self.label_smoothing, self.z_loss, self.softcap = ignore_index, label_smoothing, z_loss, softcap
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return liger_fn.cross_entropy(
            logits, target, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, z_loss=self.z_loss,
            softcap=self.softcap, reduction=self.reduction,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, z_loss={self.z_loss}, softcap={self.softcap}, "
            f"reduction={self.reduction!r}"
        )


class LinearCrossEntropyLoss(nn.Module):
    """`liger_fn.linear_cross_entropy` with its options held: `loss_fn(head.weight, x, target, head.bias)`, the weight first."""

    def __init__(self, *, ignore_index: int = -100, reduction: Reduction = "mean", memory_budget: int = MEMORY_BUDGET) -> None:
        super().__init__()
        self.ignore_index, self.reduction, self.memory_budget = ignore_index, reduction, memory_budget

    def forward(self, weight: Tensor, x: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        return liger_fn.linear_cross_entropy(
            x, weight, target, bias, ignore_index=self.ignore_index, reduction=self.reduction, memory_budget=self.memory_budget
        )

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, memory_budget={self.memory_budget}"
