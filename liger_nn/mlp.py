"""The gated MLP of a transformer layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import liger_fn


class SwiGLUMLP(nn.Module):
    """`down_proj(swiglu(gate_proj(x), up_proj(x)))`.

    Args:
        hidden_size: of the input and the output.
        intermediate_size: of the gate and the up projection.
        bias: whether the three projections have one.
        device, dtype: of the parameters.

    State: `gate_proj`, `up_proj`, `down_proj`, the names Hugging Face MLPs use, so that their weights load.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias, device=device, dtype=dtype)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias, device=device, dtype=dtype)

    @classmethod
    def from_config(cls, config: Any, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SwiGLUMLP:
        """From a Hugging Face config with `hidden_size`, `intermediate_size`, `hidden_act` "silu" or "swish", and perhaps `mlp_bias`.

        Raises:
            ValueError: the config's activation is another.
        """
        act = getattr(config, "hidden_act", "silu")
        if act not in ("silu", "swish"):
            raise ValueError(f'SwiGLUMLP: hidden_act must be "silu" or "swish", got {act!r}; its MLP is another function')
        return cls(config.hidden_size, config.intermediate_size, getattr(config, "mlp_bias", False), device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(liger_fn.swiglu(self.gate_proj(x), self.up_proj(x)))
        return out
