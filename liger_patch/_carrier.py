"""What stands where logits would, once the loss has been computed without them.

It carries the finished loss from the output layer, through the model's own code, to `loss_function`, and to the caller as `outputs.logits`,
where it turns into the logits when someone asks for them. A plain object and no Tensor subclass: compilers trace it without a break.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


class Source:
    """How logits are made: the output layer's input, and the output layer.

    Args:
        head: what runs the layer on an input, `head.logits(x)`.
        hidden_states: the input.
        weight: the layer's weight as the loss saw it.
        request: what the loss was asked to be.
    """

    __slots__ = ("_logits", "autocast", "head", "hidden_states", "request", "version", "vocab_size", "weight")

    def __init__(self, head: Any, hidden_states: Tensor, weight: Tensor, request: Any) -> None:
        self.head, self.hidden_states, self.weight, self.request = head, hidden_states, weight, request
        self.vocab_size = weight.shape[0]
        kind = hidden_states.device.type
        on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        self.autocast = (kind, torch.get_autocast_dtype(kind)) if on else None
        # Compiled code has no version counters to read, and inference tensors have none.
        self.version = None if torch.compiler.is_compiling() or weight.is_inference() else weight._version
        self._logits: Tensor | None = None

    def logits(self) -> Tensor:
        if self._logits is None:
            if self.version is not None and self.weight._version != self.version:
                raise RuntimeError(
                    "outputs.logits: the output layer's weight has changed since the forward pass (an optimizer step?), so these "
                    "logits can no longer be computed. Read outputs.logits before the step, or patch with linear_cross_entropy=False"
                )
            # Logits are what they would have been in the forward pass, under autocast too.
            with torch.autocast(*self.autocast) if self.autocast else nullcontext():
                self._logits = self.head.logits(self.hidden_states)
        return self._logits


@dataclass(eq=False, repr=False)
class FusedLogits:
    """Logits that were not computed: a finished loss, and the means to compute them on demand.

    Every tensor method, operator, index and torch function works and gives what it would give on the logits, which are then computed once,
    with gradients. The shape is known without computing them.
    """

    loss: Tensor
    # Not a tensor, nor a container that one looks into: sharding libraries attach their backward hooks to the loss alone.
    source: Source
    # Casts that models put between their output layer and their loss. The loss is computed in fp32 whether they are there or not.
    upcast: bool = False

    def materialize(self) -> Tensor:
        """The logits. Computed at the first call, by running the output layer."""
        logits = self.source.logits()
        return logits.float() if self.upcast else logits

    def float(self) -> FusedLogits:
        return FusedLogits(self.loss, self.source, upcast=True)

    def contiguous(self) -> FusedLogits:
        return self

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.source.hidden_states.shape[:-1], self.source.vocab_size))

    @property
    def ndim(self) -> int:
        return self.source.hidden_states.ndim

    @property
    def device(self) -> torch.device:
        return self.source.hidden_states.device

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.materialize())

    def __getattr__(self, name: str) -> Any:
        # Only what this class does not define comes here. Protocols that probe for dunder names must not compute logits.
        if name.startswith("__") or name in ("loss", "source", "upcast"):
            raise AttributeError(name)
        return getattr(self.materialize(), name)

    def __repr__(self) -> str:
        return f"FusedLogits(shape={tuple(self.shape)}, loss={self.loss})"

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.materialize().__array__(*args, **kwargs)

    def __reduce__(self) -> Any:
        # A copy of an output is a copy of its values: no model travels with it.
        return _values, (self.materialize().detach(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.materialize().detach().clone()

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        args, kwargs = _pytree.tree_map_only(FusedLogits, FusedLogits.materialize, (args, kwargs or {}), is_leaf=_is_carrier)
        return func(*args, **kwargs)


def _values(logits: Tensor) -> Tensor:
    return logits


def _is_carrier(value: Any) -> bool:
    return isinstance(value, FusedLogits)


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: FusedLogits, *args: Any) -> Any:
        args = tuple(arg.materialize() if isinstance(arg, FusedLogits) else arg for arg in args)
        return getattr(self.materialize(), name)(*args)

    apply.__name__ = name
    return apply


# Operators are looked up on the class, past __getattr__.
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
for _name in (
    *(f"__{op}__" for op in _BINARY),
    *(f"__r{op}__" for op in _BINARY),
    *("__neg__", "__abs__", "__getitem__", "__bool__", "__int__", "__float__"),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"),
):
    setattr(FusedLogits, _name, _operator(_name))
FusedLogits.__hash__ = object.__hash__  # type: ignore[method-assign]

# The loss is a leaf that libraries which walk outputs find: FSDP2 hooks the gathering of the weight in backward to it.
_pytree.register_pytree_node(
    FusedLogits,
    lambda carrier: ([carrier.loss], (carrier.source, carrier.upcast)),
    lambda children, context: FusedLogits(*children, *context),
    serialized_type_name="liger_patch.FusedLogits",
    flatten_with_keys_fn=lambda carrier: ([(_pytree.GetAttrKey("loss"), carrier.loss)], (carrier.source, carrier.upcast)),
)
