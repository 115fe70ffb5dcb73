"""The output layer and the loss: one mechanism for every causal LM.

    causal LM's forward      remembers the labels for the duration of the call
      lm_head.forward        computes the loss from its input and its weight; returns a carrier where logits would stand
      loss_function          hands the carried loss back

The loss is computed inside `lm_head.forward` because there, and only there, sharding hooks have the whole weight at hand. The model's own
forward runs unchanged in between. With no labels, or outside training, none of this happens and logits are ordinary logits.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from math import inf
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

import liger_fn

from ._carrier import FusedLogits, Source, Step, same_number
from ._sharded_head import by_transformers, gathering, split
from ._spec import Head
from ._swap import Forward, Swap


@dataclass(frozen=True, eq=False)
class Request:
    """What a caller asks of the loss: the arguments of the causal LM's forward that `ForCausalLMLoss` honours."""

    labels: Tensor
    shift_labels: Tensor | None = None
    num_items_in_batch: Any = None
    ignore_index: int = -100
    steps: tuple[Step, ...] = ()

    def same(self, other: Request) -> bool:
        """Whether both ask for the same loss. Tensors are compared by identity: the model passes on what it was given."""
        return (
            self.labels is other.labels
            and self.shift_labels is other.shift_labels
            and (self.num_items_in_batch is other.num_items_in_batch or same_number(self.num_items_in_batch, other.num_items_in_batch))
            and self.ignore_index == other.ignore_index
        )

    def targets(self, rows: int) -> Tensor:
        """The target of each row: the label of the token after it, or `shift_labels` as they are."""
        if self.shift_labels is not None:
            targets = self.shift_labels.reshape(-1)
        else:
            targets = F.pad(self.labels, (0, 1), value=self.ignore_index)[..., 1:].reshape(-1)
        if targets.numel() != rows:
            raise ValueError(
                f"loss: logits for {rows} positions but targets for {targets.numel()}. With logits_to_keep, "
                "pass the targets of the kept positions as shift_labels"
            )
        return targets

    def normalize(self, total: Tensor) -> Tensor:
        """A sum over rows, over the number of items that the caller counted."""
        n = self.num_items_in_batch
        return total / (n.to(total.device) if isinstance(n, Tensor) else n)

    @property
    def reduction(self) -> Any:
        return "mean" if self.num_items_in_batch is None else "sum"


class CausalLMForward(Forward):
    """The forward of a causal LM: its own, with the labels remembered for its output layer."""

    __slots__ = ("head", "labels_at", "spec", "traceable")

    op = kind = "linear_cross_entropy"
    sharded = True

    def __init__(self, module: nn.Module, head: HeadForward, spec: Head) -> None:
        super().__init__(module)
        self.head, self.spec = head, spec
        self.labels_at = list(inspect.signature(module.forward).parameters).index("labels")
        # torch's compiler makes a node of F.tanh whatever it is called with, where other functions ask their arguments (torch.tanh does).
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        self.traceable = code is None or not {"functional", "tanh"} <= {*code.co_names}

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.head.requests.append(self._request(module, args, kwargs))
        try:
            return self.stock(module, *args, **kwargs)
        finally:
            self.head.requests.pop()

    def _request(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request | None:
        labels = args[self.labels_at] if len(args) > self.labels_at else kwargs.get("labels")
        if labels is None or not module.training or (torch.compiler.is_compiling() and not self.traceable):
            return None
        # Since the patch, an adapter may have taken the output layer's place, or the user given the model another loss: both need logits.
        if output_layer(module, self.spec) is not self.head.module or not isinstance(module.loss_function, CausalLMLoss):
            return None
        steps = steps_of(module, self.spec)
        if steps is None:
            return None
        return Request(labels, kwargs.get("shift_labels"), kwargs.get("num_items_in_batch"), kwargs.get("ignore_index", -100), steps)


def output_layer(root: nn.Module, spec: Head) -> Any:
    """The module at the place that an entry names; None where there is none."""
    found: Any = root
    for name in spec.name.split("."):
        found = getattr(found, name, None)
    return found


def steps_of(root: nn.Module, spec: Head) -> tuple[Step, ...] | None:
    """What the model does to its logits, with the numbers that it has now; None where the loss cannot do it, and needs logits."""
    scale, divisor, cap = (attrgetter(path)(root) if path else None for path in (spec.scale, spec.divide, spec.softcap))
    numbers = [number for number in (scale, divisor, cap) if number is not None]
    if not all(isinstance(number, (int, float)) and 0 < number < inf for number in numbers):
        return None
    steps = [Step(name, number) for name, number in (("mul", scale), ("div", divisor)) if number is not None]
    if cap is not None:
        steps += [Step("div", cap), Step("tanh"), Step("mul", cap)]
    return tuple(steps)


def formed(steps: tuple[Step, ...]) -> dict[str, Any]:
    """The same as options of `liger_fn.linear_cross_entropy`."""
    capped = len(steps) > 2 and steps[-2].name == "tanh"
    scale = 1.0
    for step in steps[:-3] if capped else steps:
        assert step.number is not None  # only a tanh has none
        scale = scale * step.number if step.name == "mul" else scale / step.number
    return {"logit_scale": scale, "softcap": steps[-1].number if capped else None}


class HeadForward(Forward):
    """The forward of an output layer: the loss where one is asked for, logits otherwise."""

    __slots__ = ("memory_budget", "requests")

    op = kind = "linear_cross_entropy"
    sharded = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        # A stack, since a model may run inside its own forward; the innermost call's request is the last.
        self.requests: list[Request | None] = []
        self.memory_budget: int | None = None  # bytes of logits that the loss may have at a time; None for what their sizes suggest

    def run(self, module: Any, hidden_states: Tensor) -> Any:
        request = self.requests[-1] if self.requests else None
        weight, bias = module.weight, module.bias
        # ZeRO-3 has the weight whole in this call alone, and has to be told when backward wants it again.
        partitioned, gather = hasattr(weight, "ds_id"), gathering(module)
        # Backward hooks of this module want the gradient of logits, so there must be logits.
        if request is None or has_backward_hooks(module) or (partitioned and gather is None):
            return self.stock(module, hidden_states)
        if multiplies_itself(weight):
            mine = split(hidden_states, weight, bias, replicated=bool(self.before) and by_transformers(module, self.before[0]))
            if mine is None:
                return self.stock(module, hidden_states)
            loss = self._loss(request, liger_fn.vocab_parallel_linear_cross_entropy, mine.x, mine.weight, mine.bias, **mine.options())
            return mine.carrier(loss, self, hidden_states, weight, bias, request)
        loss = self._loss(request, liger_fn.linear_cross_entropy, hidden_states, weight, bias)
        if partitioned:
            loss = gather.apply(loss)
        return FusedLogits(loss, Source(self, hidden_states, weight, bias, request))

    def _loss(self, request: Request, function: Any, x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        x = x.reshape(-1, x.shape[-1])
        target = request.targets(x.shape[0]).to(x.device)
        options |= {"ignore_index": request.ignore_index, "reduction": request.reduction, **formed(request.steps)}
        options["memory_budget"] = self.memory_budget
        loss: Tensor = function(x, weight, target, bias, **options)
        return loss if request.num_items_in_batch is None else request.normalize(loss)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Ordinary logits, by a call of the module: whatever hooks gather its weight run again."""
        self.requests.append(None)
        try:
            return self.module(hidden_states)
        finally:
            self.requests.pop()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"requests": []}  # labels belong to a call, not to the model


class CausalLMLoss(Swap):
    """The `loss_function` of a causal LM: the carried loss, or the same loss from ordinary logits."""

    __slots__ = ("cross_entropy",)

    op = "cross_entropy"
    slot_name = "_loss_function"

    @property
    def wrapped(self) -> bool:
        return False  # a loss that the user sets takes its place; it is theirs to keep

    def __init__(self, module: nn.Module, cross_entropy: bool) -> None:
        super().__init__(module)
        self.cross_entropy = cross_entropy

    def __call__(
        self,
        logits: Tensor | FusedLogits,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        request = Request(labels, shift_labels, num_items_in_batch, ignore_index)
        if isinstance(logits, FusedLogits):
            # Once someone has had the logits in hand, a hook or the model itself, they may be others than those the loss is of.
            source = logits.source
            if not source.touched and not source.steps and source.request.same(request) and logits.shape[-1] == vocab_size:
                return logits.loss
            # Nor is it of use if the model asks for another loss than the one its caller asked for.
            logits = logits.materialize()
        if not self.cross_entropy:
            return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        logits = logits.view(-1, vocab_size)
        target = request.targets(logits.shape[0]).to(logits.device)
        loss = liger_fn.cross_entropy(logits, target, ignore_index=ignore_index, reduction=request.reduction)
        return loss if num_items_in_batch is None else request.normalize(loss)


def multiplies_itself(weight: Tensor) -> bool:
    """Whether a weight is no plain matrix, but knows itself how to be multiplied by: a quantised one, or one that is split over devices."""
    return hasattr(type(weight), "__tensor_flatten__")


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether backward through this module calls hooks of it."""
    return bool(module._backward_hooks or module._backward_pre_hooks)
