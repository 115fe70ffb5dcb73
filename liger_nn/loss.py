"""Losses as modules, for code that holds its loss as an object."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import liger_fn
from liger_fn._head import Accumulate
from liger_fn._loss_options import Reduction
from liger_fn.linear_cross_entropy import Save
from liger_fn.linear_log_prob import LogProbAux


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
    """`liger_fn.linear_cross_entropy` with its options held: `loss_fn(head.weight, x, target, head.bias)`, the weight first.

    What differs from call to call, `num_items` and `token_weight`, is given with the call.
    """

    class_weight: Tensor | None
    function = "linear_cross_entropy"

    def __init__(
        self,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        reduction: Reduction = "mean",
        shift: bool = False,
        return_aux: bool = False,
        save: Save = "grads",
        accumulate: Accumulate = "auto",
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("class_weight", class_weight, persistent=False)
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap,
            "logit_scale": logit_scale, "temperature": temperature, "reduction": reduction, "shift": shift, "return_aux": return_aux,
            "save": save, "accumulate": accumulate, "memory_budget": memory_budget,
        }  # fmt: skip

    def forward(
        self,
        weight: Tensor,
        x: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        *,
        num_items: int | Tensor | None = None,
        token_weight: Tensor | None = None,
    ) -> Any:
        return getattr(liger_fn, self.function)(
            x, weight, target, bias, class_weight=self.class_weight, token_weight=token_weight, num_items=num_items, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class LinearLogProb(nn.Module):
    """`liger_fn.linear_log_prob` with its options held: `log_prob, aux = log_prob_fn(head.weight, x, target, head.bias)`."""

    function = "linear_log_prob"

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        shift: bool = False,
        accumulate: Accumulate = "auto",
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index, "softcap": softcap, "logit_scale": logit_scale, "temperature": temperature, "shift": shift,
            "accumulate": accumulate, "memory_budget": memory_budget,
        }  # fmt: skip

    def forward(self, weight: Tensor, x: Tensor, target: Tensor, bias: Tensor | None = None) -> tuple[Tensor, LogProbAux]:
        found: tuple[Tensor, LogProbAux] = getattr(liger_fn, self.function)(x, weight, target, bias, **self.options)
        return found

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())
