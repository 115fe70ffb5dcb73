"""An output layer whose weight is split along the vocabulary over the ranks of a process group (tensor parallel).

Its loss comes from `liger_fn.vocab_parallel_linear_cross_entropy`: no rank ever has the whole weight or the whole logits. Weights that are
split otherwise, and vocabularies that leave a rank without a class, are left to the layer's own code, which multiplies DTensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed import is_available
from torch.utils import _pytree

from ._carrier import FusedLogits, Source

if is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard

    _Sharded: Any = DTensor
else:
    _Sharded = ()


class Split(NamedTuple):
    """What one rank has of an output layer: the input, which is the same on all, and its rows of the weight and the bias."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    group: Any
    vocab_start: int
    vocab_size: int

    def carrier(self, loss: Tensor, head: Any, hidden_states: Tensor, weight: Any, bias: Any, request: Any) -> FusedLogits:
        """What stands where the layer's own forward would have returned logits: parts in a DTensor, or whole and plain ones."""
        if isinstance(hidden_states, _Sharded):
            return SplitLogits(loss, Source(head, hidden_states, weight, bias, request))
        alike = DTensor.from_local(hidden_states, weight.device_mesh, (Replicate(),), run_check=False)
        return FusedLogits(loss, WholeSource(head, alike, weight, bias, request))

    def options(self) -> dict[str, Any]:
        """Of `liger_fn.vocab_parallel_linear_cross_entropy`."""
        return {"group": self.group, "vocab_start": self.vocab_start, "vocab_size": self.vocab_size}


def is_sharded(value: Any) -> bool:
    """Whether a tensor is split over devices. A weight may be so outside of a call, and whole in it."""
    return isinstance(value, _Sharded)


def split(x: Tensor, weight: Any, bias: Any, *, replicated: bool) -> Split | None:
    """The parts of this rank, where the vocabulary is what is split, every rank has classes, and all have the same input.

    Args:
        x: the layer's input, as its pre-hooks left it.
        weight: the layer's weight.
        bias: its bias.
        replicated: whether an input that is no DTensor is known to be the same on all ranks of the weight's mesh. It need not be: where
            FSDP2 has not gathered a weight, each rank has rows of the vocabulary and tokens of its own.
    """
    if not by_vocabulary(weight) or (bias is not None and not by_vocabulary(bias)):
        return None
    mesh = weight.device_mesh
    if isinstance(x, _Sharded):
        if x.device_mesh != mesh or x.placements != (Replicate(),):
            return None
        x = x.to_local(grad_placements=(Replicate(),))
    elif not replicated:
        return None
    each = -(-weight.shape[0] // mesh.size())  # DTensor cuts as torch.chunk does: equal parts, the last one shorter
    if each * (mesh.size() - 1) >= weight.shape[0]:
        return None
    local = None if bias is None else bias.to_local()
    return Split(x, weight.to_local(), local, mesh.get_group(), each * mesh.get_local_rank(), weight.shape[0])


def by_vocabulary(weight: Any) -> bool:
    """Whether a weight is split along its first axis, over the one axis of its mesh."""
    return isinstance(weight, _Sharded) and weight.device_mesh.ndim == 1 and weight.placements == (Shard(0),)


def by_transformers(module: nn.Module, forward: Any) -> bool:
    """Whether this forward of a module is what transformers' tensor parallelism has put there; its input is the same on all ranks."""
    return getattr(forward, "__module__", "") == "transformers.distributed.tensor_parallel" and by_vocabulary(
        getattr(module, "weight", None)
    )


def gathering(module: nn.Module) -> Any:
    """What DeepSpeed's ZeRO-3 would have autograd do first in this layer's backward, which is to gather its weight; None where it does not.

    It hangs it on the tensors that the layer returns, and does not look for those of a carrier.
    """
    return module.__dict__.get("pre_bwd_fn")


class WholeSource(Source):
    """Logits of a layer that is split, gathered from all ranks."""

    __slots__ = ()

    def _compute(self) -> Tensor:
        logits: Any = super()._compute()  # of DTensors; of the module's hooks, if the weight has to be gathered first
        return logits.full_tensor() if isinstance(logits, _Sharded) else logits


@dataclass(eq=False, repr=False)
class SplitLogits(FusedLogits):
    """The carrier on its way through the hook of `ColwiseParallel`, which gathers logits where they are asked to be whole."""

    gathered: bool = False

    @property
    def placements(self) -> tuple[Any, ...]:
        """As DTensor has them."""
        return (Replicate(),) if self.gathered else (Shard(self.ndim - 1),)

    def redistribute(self, device_mesh: Any = None, placements: Any = None, **_: Any) -> SplitLogits:
        """The same carrier: there are no values to move."""
        return SplitLogits(self.loss, self.source, all(placement.is_replicate() for placement in placements))

    def to_local(self, **_: Any) -> Any:
        """What stands where plain logits would: a carrier for whole ones, and the values of a part, of which the loss is not."""
        if not self.gathered:
            logits: Any = self.materialize()
            return logits.to_local() if is_sharded(logits) else logits
        s = self.source
        return FusedLogits(self.loss, WholeSource(s.head, s.hidden_states, s.weight, s.bias, s.request))


_pytree.register_pytree_node(
    SplitLogits,
    lambda carrier: ([carrier.loss], (carrier.source, carrier.gathered)),
    lambda children, context: SplitLogits(next(iter(children)), *context),
    serialized_type_name="liger_patch.SplitLogits",
)
