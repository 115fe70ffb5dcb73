"""What stands where logits would, once the loss has been computed without them.

It carries the finished loss from the output layer, through the model's own code, to `loss_function`, and to the caller as `outputs.logits`,
where it turns into the logits when someone asks for them. A plain object and no Tensor subclass: compilers trace it without a break.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree


class Step(NamedTuple):
    """What a model does to its logits between its output layer and its loss: "mul" or "div" by a number, "tanh", or "float"."""

    name: str
    number: float | None = None

    def take(self, logits: Tensor) -> Tensor:
        if self.number is None:
            return logits.float() if self.name == "float" else torch.tanh(logits)
        return logits * self.number if self.name == "mul" else logits / self.number


def same_number(a: Any, b: Any) -> bool:
    """Whether two plain numbers are the same one."""
    return isinstance(a, (int, float)) and isinstance(b, (int, float)) and a == b


class Source:
    """How logits are made: the output layer's input, and what the layer had at hand in the forward pass.

    Args:
        head: what runs the layer on an input, `head.logits(x)`.
        hidden_states: the input, as the layer's pre-hooks left it.
        weight: the layer's weight as the loss saw it.
        bias: its bias as the loss saw it.
        request: what the loss was asked to be, and the steps on the logits that it has taken.
    """

    __slots__ = (
        "_logits",
        "_made",
        "autocast",
        "base",
        "bias",
        "dtype",
        "grad",
        "head",
        "hidden_states",
        "request",
        "steps",
        "version",
        "vocab_size",
        "weight",
    )

    def __init__(self, head: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, request: Any) -> None:
        self.head, self.hidden_states, self.weight, self.bias, self.request = head, hidden_states, weight, bias, request
        self.vocab_size = weight.shape[0]
        kind = hidden_states.device.type
        on = _has_autocast(kind) and torch.is_autocast_enabled(kind)
        self.autocast = (kind, torch.get_autocast_dtype(kind)) if on else None
        # Autocast leaves fp64 alone.
        self.dtype = self.autocast[1] if self.autocast and hidden_states.dtype is not torch.float64 else hidden_states.dtype
        self.grad = torch.is_grad_enabled()
        # Compiled code has no version counters to read, and inference tensors have none.
        self.version = None if torch.compiler.is_compiling() or weight.is_inference() else weight._version
        self.steps: tuple[Step, ...] = request.steps
        self.base: Source | None = None
        self._made: Step | None = None
        self._logits: Tensor | None = None

    def then(self, step: Step, steps: tuple[Step, ...], dtype: torch.dtype) -> Source:
        """The source of what a step makes of these logits, after which the model still has `steps` to take."""
        after = Source(self.head, self.hidden_states, self.weight, self.bias, self.request)
        after.base, after._made, after.steps, after.dtype = self, step, steps, dtype
        return after

    def upcast(self) -> Source:
        """The source of a copy of these logits in fp32, as models put it between their output layer and their loss."""
        return self.then(Step("float"), self.steps, torch.float32)

    def takes(self, name: str, number: Any) -> Source | None:
        """The source after this step, if it is the next one that the loss has taken already."""
        if not self.steps or self.steps[0].name != name or not (number is None or same_number(number, self.steps[0].number)):
            return None
        return self.then(self.steps[0], self.steps[1:], self.dtype)

    @property
    def touched(self) -> bool:
        """Whether anyone has had the logits in hand, and so may have changed them in place or hung a hook on them."""
        return self._logits is not None or (self.base is not None and self.base.touched)

    def logits(self) -> Tensor:
        if self._logits is None:
            # Logits are what they would have been in the forward pass: under its autocast, and with gradients if it had them.
            with torch.set_grad_enabled(self.grad), self._autocast():
                self._logits = self._made.take(self.base.logits()) if self.base is not None and self._made is not None else self._compute()
        return self._logits

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast:
            return torch.autocast(*self.autocast)
        kind = self.hidden_states.device.type
        return torch.autocast(kind, enabled=False) if _has_autocast(kind) else nullcontext()

    def _compute(self) -> Tensor:
        if self.version is not None and self.weight._version != self.version:
            raise RuntimeError(
                "outputs.logits: the output layer's weight has changed since the forward pass (an optimizer step?), so these "
                "logits can no longer be computed. Read outputs.logits before the step, or patch with linear_cross_entropy=False"
            )
        # The layer's hooks have run, or will run, on the carrier: a call of the module would run them a second time. Only where sharding
        # has taken the weight back is there no other way, since its hooks are what gathers it.
        if _is_whole(self.weight):
            return F.linear(self.hidden_states, self.weight, self.bias)
        return self.head.logits(self.hidden_states)


def _has_autocast(kind: str) -> bool:
    """Whether autocast knows this type of device. (`torch.amp.is_autocast_available` would say, but torch 2.11 cannot trace it.)"""
    return kind != "meta"


@dataclass(eq=False, repr=False)
class FusedLogits:
    """Logits that were not computed: a finished loss, and the means to compute them on demand.

    Every tensor method, operator, index and torch function works and gives what it would give on the logits, which are then computed once,
    with gradients. What kind of tensor they are (shape, dtype, device, ...) is known without computing them.
    """

    loss: Tensor
    # Not a tensor, nor a container that one looks into: sharding libraries attach their backward hooks to the loss alone.
    source: Source

    def materialize(self) -> Tensor:
        """The logits. Computed at the first call; changes made to them in place are seen by every later one."""
        return self.source.logits()

    # The cast that models put between their output layer and their loss. The loss is computed in fp32 whether it is there or not.
    def float(self) -> FusedLogits:
        return self if self.dtype is torch.float32 else FusedLogits(self.loss, self.source.upcast())

    def tanh(self) -> Any:
        return self.__torch_function__(torch.tanh, (), (self,))

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def requires_grad(self) -> bool:
        return self.loss.requires_grad

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

    def element_size(self) -> int:
        return self.dtype.itemsize

    def is_floating_point(self) -> bool:
        return True

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.materialize())

    def __getattr__(self, name: str) -> Any:
        # Only what this class does not define comes here. Whoever probes an object for what it is must not cause logits to be computed:
        # neither by dunder names, nor by names that no tensor has, nor by those that the input answers as well.
        if name.startswith("__") or name in ("loss", "source") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.source.hidden_states if name in _LIKE_THE_INPUT else self.materialize(), name)

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
        if func is torch.tanh and not kwargs and (after := args[0].source.takes("tanh", None)) is not None:
            return FusedLogits(args[0].loss, after)
        args, kwargs = _pytree.tree_map_only(FusedLogits, FusedLogits.materialize, (args, kwargs or {}), is_leaf=_is_carrier)
        return func(*args, **kwargs)


_LIKE_THE_INPUT = {
    *("is_cpu", "is_cuda", "is_meta", "is_mps", "is_xla", "is_xpu", "get_device"),
    *("layout", "is_sparse", "is_sparse_csr", "is_mkldnn", "is_nested", "is_quantized", "is_complex", "is_inference"),
}


def _is_whole(weight: Tensor) -> bool:
    """Whether the values of a weight are here, and will be in backward: sharding frees the storage, or (DeepSpeed) swaps it out."""
    if hasattr(weight, "ds_id"):
        return False
    if torch.compiler.is_compiling() or weight.numel() == 0:
        return True
    try:
        return weight.untyped_storage().nbytes() > 0
    except NotImplementedError:  # a tensor under a transform of torch.func has no storage that one may ask for
        return True


def _values(logits: Tensor) -> Tensor:
    return logits


def _is_carrier(value: Any) -> bool:
    return isinstance(value, FusedLogits)


_STEPS = {"__mul__": "mul", "__rmul__": "mul", "__truediv__": "div"}


def _operator(name: str) -> Callable[..., Any]:
    step = _STEPS.get(name, "")

    def apply(self: FusedLogits, *args: Any) -> Any:
        if step and (after := self.source.takes(step, args[0])) is not None:
            return FusedLogits(self.loss, after)
        args = tuple(arg.materialize() if isinstance(arg, FusedLogits) else arg for arg in args)
        return getattr(self.materialize(), name)(*args)

    apply.__name__ = name
    return apply


def _in_place(name: str) -> Callable[..., Any]:
    def apply(self: FusedLogits, *args: Any) -> FusedLogits:
        args = tuple(arg.materialize() if isinstance(arg, FusedLogits) else arg for arg in args)
        getattr(self.materialize(), name)(*args)
        return self

    apply.__name__ = name
    return apply


# Operators are looked up on the class, past __getattr__.
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
for _name in (
    *(f"__{op}__" for op in _BINARY),
    *(f"__r{op}__" for op in _BINARY),
    *("__neg__", "__abs__", "__getitem__", "__setitem__", "__bool__", "__int__", "__float__"),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"),
):
    setattr(FusedLogits, _name, _operator(_name))
for _name in ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__"):
    setattr(FusedLogits, _name, _in_place(_name))
FusedLogits.__hash__ = object.__hash__  # type: ignore[method-assign]

# The loss is a leaf that libraries which walk outputs find: FSDP2 hooks the gathering of the weight in backward to it.
_pytree.register_pytree_node(
    FusedLogits,
    lambda carrier: ([carrier.loss], carrier.source),
    lambda children, source: FusedLogits(next(iter(children)), source),
    serialized_type_name="liger_patch.FusedLogits",
    flatten_with_keys_fn=lambda carrier: ([(_pytree.GetAttrKey("loss"), carrier.loss)], carrier.source),
)
