"""What a registry entry can say.

An `Arch` is data: names of classes and functions in a model's own code, and the constants of the math they compute. Every field is
honoured by code; an entry that describes its model wrongly is found out when the swap is proved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

OPS = (
    *("rms_norm", "layer_norm", "swiglu", "geglu", "reglu", "relu_squared", "rope", "causal_mask", "experts"),
    *("linear_cross_entropy", "cross_entropy"),
)
"""The operations that can be switched on and off by name, in the order in which a report lists them."""

Act = Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared"]
GLU_OPS: dict[str, str] = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu", "relu": "reglu", "relu_squared": "relu_squared"}


@dataclass(frozen=True)
class Norm:
    """An RMSNorm or LayerNorm module, replaced by `liger_fn.rms_norm` or `liger_fn.layer_norm`.

    Args:
        class_name: the module's class; subclasses of it match too.
        kind: "rms" or "layer".
        eps: the module's attribute that holds eps, or the number itself where the code has it. By default whichever of
            `variance_epsilon`, `eps`, `norm_eps` and `epsilon` it has.
        weight: the attribute that holds the weight; a module without it has no scale. (`bias` is a LayerNorm's shift, if it has one.)
        offset: what is added to the weight before it scales.
        cast: when the normalised row returns to the input's dtype, as in `liger_fn.rms_norm`; of "rms" only.
    """

    class_name: str
    kind: Literal["rms", "layer"] = "rms"
    eps: str | float | None = None
    weight: str = "weight"
    offset: float = 0.0
    cast: Literal["llama", "gemma", "none"] = "llama"

    @property
    def op(self) -> str:
        return f"{self.kind}_norm"


@dataclass(frozen=True)
class GLU:
    """A gated MLP, `down(act(gate(x) * gate_multiplier) * up(x)) * down_multiplier`, its middle replaced between its own projections.

    The activation is looked at in each module: silu makes it `liger_fn.swiglu`, gelu (by the error function or by tanh) `geglu`, relu
    `reglu`. With an empty `gate`, it is `down(act(up(x)))`, and the activation must be relu squared, by `liger_fn.relu_squared`.

    Args:
        class_name: the module's class; subclasses of it match too.
        act: the activation that configurations of this type have if they say nothing else.
        gate: the projection that the activation is of. up: the other one. down: what comes after.
        packed: one projection for both in place of the two, `gate` in its first half and `up` in its second.
        act_fn: the attribute that holds the activation.
        gate_multiplier: where the module holds a number that multiplies the gate. down_multiplier: likewise, the result.
        dropout: where it holds the probability that an element of the result is dropped in training.

    Raises:
        ValueError: an activation is not known.
    """

    class_name: str
    act: Act = "silu"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    packed: str | None = None
    act_fn: str = "act_fn"
    gate_multiplier: str | None = None
    down_multiplier: str | None = None
    dropout: str | None = None

    def __post_init__(self) -> None:
        if self.act not in GLU_OPS:
            raise ValueError(f"GLU: act must be one of {', '.join(GLU_OPS)}, got {self.act!r}; leave `mlp` out of the entry for others")

    @property
    def op(self) -> str:
        return GLU_OPS[self.act]

    @property
    def projections(self) -> tuple[str, ...]:
        return (self.packed, self.down) if self.packed else tuple(name for name in (self.gate, self.up, self.down) if name)


@dataclass(frozen=True)
class Rope:
    """The rotary function that attention calls as a global of its module, replaced by `liger_fn.rope`.

    Args:
        function: the global's name.
        kind: how it is called and what it turns, one of `liger_patch._rope.KINDS`.
    """

    function: str = "apply_rotary_pos_emb"
    kind: str = "half"


@dataclass(frozen=True)
class Head:
    """The output layer of a causal LM, whose loss is `ForCausalLMLoss`: `liger_fn.linear_cross_entropy` and `liger_fn.cross_entropy`.

    Between the two a model may form its logits a, by numbers that it holds: `a * scale`, `a / divide`, then `cap * tanh(a / cap)`.

    Args:
        name: where the causal LM holds the output `nn.Linear`, as a path of attributes.
        before: modules that change the hidden states before it, likewise; a proof does without them.
        scale: where the causal LM holds a factor of the logits, as a path of attributes: `"config.logit_scale"`.
        divide: likewise what divides them.
        softcap: likewise their cap. None there is no cap, as None is no factor in the others.
    """

    name: str = "lm_head"
    before: tuple[str, ...] = ()
    scale: str | None = None
    divide: str | None = None
    softcap: str | None = None


@dataclass(frozen=True)
class Experts:
    """All experts of a layer of a mixture, in weights of three axes, replaced by `liger_fn.moe_experts`. The router stays as it is.

    How its weights lie, and whether there are biases and a gate, each module says itself (`is_transposed`, `is_concatenated`, `has_bias`,
    `has_gate`); its activation, `act_fn`, is looked at.

    Args:
        class_name: the module's class; subclasses of it match too.
        act: what `liger_fn.moe_experts` calls the activation, where the module has no `act_fn`.
        limit: where the module holds the number that gate and up are clamped to. alpha: likewise, what scales the gate in its sigmoid.
        identity: choices beyond the experts give back what they are given.
        scaled: the class is that of the layer around the experts, with `router`, `experts` and `shared_expert`, whose router scales what an
            expert is given, as in Llama 4.
        stock: why there is no function for these experts; they are left as they are.
    """

    class_name: str
    act: Literal["silu", "clamped_swiglu"] | None = None
    limit: str | None = None
    alpha: str | None = None
    identity: bool = False
    scaled: bool = False
    stock: str = ""


@dataclass(frozen=True)
class Arch:
    """A registry entry: what in a model type is replaced, and by what. What it does not name is left stock.

    A model of several (a vision tower, a language model) has an entry for each: a module is described by the entry of the innermost
    transformers model around it that has one.

    Args:
        model_type: `model.config.model_type`.
        norm: its norms, one or several. mlp: its MLPs. rope: its rotary functions. head: its output layer and loss.
        experts: those of a mixture.
    """

    model_type: str
    norm: Norm | tuple[Norm, ...] | None = None
    mlp: GLU | tuple[GLU, ...] | None = None
    rope: Rope | tuple[Rope, ...] | None = None
    head: Head | None = None
    experts: Experts | None = None

    @property
    def norms(self) -> tuple[Norm, ...]:
        return () if self.norm is None else (self.norm,) if isinstance(self.norm, Norm) else self.norm

    @property
    def mlps(self) -> tuple[GLU, ...]:
        return () if self.mlp is None else (self.mlp,) if isinstance(self.mlp, GLU) else self.mlp

    @property
    def ropes(self) -> tuple[Rope, ...]:
        return () if self.rope is None else (self.rope,) if isinstance(self.rope, Rope) else self.rope

    def ops(self) -> Iterator[str]:
        """The operations that this entry replaces, in the order of `OPS`."""
        has = {norm.op for norm in self.norms} | {mlp.op for mlp in self.mlps}
        has |= {"rope"} if self.ropes else set()
        has |= {"experts"} if self.experts and not self.experts.stock else set()
        has |= {"linear_cross_entropy", "cross_entropy"} if self.head else set()
        return (op for op in OPS if op in has)
