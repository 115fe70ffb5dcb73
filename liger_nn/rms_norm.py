"""RMSNorm as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import liger_fn
from liger_fn.rms_norm import Cast


class RMSNorm(nn.Module):
    """`liger_fn.rms_norm` with a learned weight.

    Args:
        hidden_size: length of the last axis.
        eps: added to the mean square.
        offset: added to the weight, which then starts at `1 - offset` (1 for the Gemma family).
        cast: where values are rounded, see `liger_fn.rms_norm`.
        elementwise_affine: False for a norm with no weight.
        device, dtype: of the weight.

    State: `weight [hidden_size]`, the name Hugging Face norms use.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        offset: float = 0.0,
        cast: Cast = "llama",
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.eps, self.offset, self.cast = hidden_size, eps, offset, cast
        weight = nn.Parameter(torch.full((hidden_size,), 1.0 - offset, device=device, dtype=dtype)) if elementwise_affine else None
        self.register_parameter("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return liger_fn.rms_norm(x, self.weight, self.eps, offset=self.offset, cast=self.cast)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}, offset={self.offset}, cast={self.cast!r}"
