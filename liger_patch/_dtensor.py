"""Functions of liger_fn on DTensors, which know none of them: each rank computes its part of the result from its parts of the inputs.

That is right where the cut runs along axes that the function does not sum over, and where each rank has the whole of the weights. No values
are sent forward; of the weights' gradients each rank has the part of its own rows, and says so by `Partial`, for DTensor to sum up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul
from typing import Any, Literal

from torch import Size, Tensor
from torch.distributed import is_available

from ._sharded_head import is_sharded

if is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

CUTS: dict[str, Literal["rows", "elements"]] = {
    **dict.fromkeys(("rms_norm", "layer_norm", "swiglu_packed", "geglu_packed"), "rows"),
    **dict.fromkeys(("swiglu", "geglu", "reglu", "relu_squared"), "elements"),
}
"""What a rank must have whole for a function: rows, so that any axis but the last may be cut, or no more than each element."""


def in_parts(op: str, inputs: Sequence[Any], weights: Sequence[Any] = ()) -> bool:
    """Whether each rank computes its part of a function's result from its parts of the inputs.

    Args:
        op: the function's name.
        inputs: what it is elementwise in, or row by row: DTensors of one shape, cut alike, none of them a sum that is still to be made.
        weights: what all rows have in common; None for one that is absent. Each rank must have all of it, in a DTensor: with a plain weight
            nobody would sum the ranks' gradients.
    """
    x, cut = inputs[0], CUTS.get(op)
    if cut is None or not all(is_sharded(t) for t in (*inputs, *weights) if t is not None):
        return False
    mesh, placements, last = x.device_mesh, x.placements, x.ndim - 1
    # By their very types: DTensor has other ways to cut an axis, with parts in another order.
    if not all(type(p) is Replicate or (type(p) is Shard and (cut == "elements" or p.dim != last)) for p in placements):
        return False
    return all(t.device_mesh == mesh and t.placements == placements and t.shape == x.shape for t in inputs[1:]) and all(
        w.device_mesh == mesh and all(type(p) is Replicate for p in w.placements) for w in weights if w is not None
    )


def on_parts(function: Callable[..., Tensor], inputs: Sequence[Any], weights: Sequence[Any] = ()) -> Tensor:
    """`function(*inputs, *weights)`, whose parts the ranks compute, cut as the inputs are.

    The caller has made sure of it by `in_parts`.
    """
    x = inputs[0]
    mesh, placements = x.device_mesh, x.placements
    sums = tuple(Partial() if type(p) is Shard else Replicate() for p in placements)
    mine = [t.to_local() for t in inputs]
    whole = [w if w is None else w.to_local(grad_placements=sums) for w in weights]
    y = function(*mine, *whole).contiguous()
    # Said here, since parts may be unlike: a packed function's last axis is shorter than its input's, and whole.
    shape = x.shape if y.shape[-1] == mine[0].shape[-1] else Size((*x.shape[:-1], y.shape[-1]))
    stride = tuple(accumulate((max(n, 1) for n in reversed(shape[1:])), mul, initial=1))[::-1]
    return DTensor.from_local(y, mesh, placements, run_check=False, shape=shape, stride=stride)
