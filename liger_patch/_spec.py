"""What a registry entry can say.

An `Arch` is data: names of classes and functions in a model's own code, and the constants of the math they compute. Every field is
honoured by code; an entry that describes its model wrongly is found out when the swap is proved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

OPS = ("rms_norm", "swiglu", "rope", "linear_cross_entropy", "cross_entropy")
"""The operations that can be switched on and off by name, in the order in which a report lists them."""


@dataclass(frozen=True)
class Norm:
    """An RMSNorm module, replaced by `liger_fn.rms_norm`.

    Args:
        class_name: the module's class; subclasses of it match too.
        eps: the module's attribute that holds eps. By default whichever of `variance_epsilon` and `eps` it has.
        offset: what is added to the weight before it scales.
        cast: when the normalised row returns to the input's dtype, as in `liger_fn.rms_norm`.
    """

    class_name: str
    eps: str | None = None
    offset: float = 0.0
    cast: Literal["llama", "gemma", "none"] = "llama"


@dataclass(frozen=True)
class GLU:
    """A gated MLP, `down_proj(act_fn(gate_proj(x)) * up_proj(x))`, replaced by `liger_fn.swiglu` between its own projections.

    Args:
        class_name: the module's class; subclasses of it match too.
        act: the activation. Only `"silu"` is known.

    Raises:
        ValueError: the activation is not known.
    """

    class_name: str
    act: Literal["silu"] = "silu"

    def __post_init__(self) -> None:
        if self.act != "silu":
            raise ValueError(f"GLU: act must be 'silu', got {self.act!r}; leave `mlp` out of the entry for other activations")


@dataclass(frozen=True)
class Rope:
    """The rotary function that attention calls as a global of its module, replaced by `liger_fn.rope`.

    Args:
        function: the global's name. It is called as `function(q, k, cos, sin, unsqueeze_dim=1)` and rotates half-split heads.
    """

    function: str


@dataclass(frozen=True)
class Head:
    """The output layer of a causal LM, whose loss is `ForCausalLMLoss`: `liger_fn.linear_cross_entropy` and `liger_fn.cross_entropy`.

    Args:
        name: the causal LM's attribute that holds the output `nn.Linear`.
    """

    name: str = "lm_head"


@dataclass(frozen=True)
class Arch:
    """A registry entry: what in a model type is replaced, and by what. A part that is `None` is left stock.

    Args:
        model_type: `model.config.model_type`.
        norm: its RMSNorm.
        mlp: its gated MLP.
        rope: its rotary function.
        head: its output layer and loss.
    """

    model_type: str
    norm: Norm | None = None
    mlp: GLU | None = None
    rope: Rope | None = None
    head: Head | None = None

    def ops(self) -> Iterator[str]:
        """The operations that this entry replaces, in the order of `OPS`."""
        parts: dict[str, object] = {"rms_norm": self.norm, "swiglu": self.mlp, "rope": self.rope}
        parts |= {"linear_cross_entropy": self.head, "cross_entropy": self.head}
        return (op for op in OPS if parts[op] is not None)
