"""Rotary embedding: attention's own forward, in which the rotary function is `liger_fn.rope`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import liger_fn

from ._swap import Forward
from ._view import rebind


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """`liger_fn.rope` under the signature that the models' own rotary function has.

    Args:
        q: queries, `[B, heads, T, D]`, or `[B, T, heads, D]` with `unsqueeze_dim=2`.
        k: keys, in the same layout.
        cos: `[B or 1, T, D]`.
        sin: the same.
        unsqueeze_dim: the dimension of `q` and `k` that cos and sin lack.

    Returns:
        The rotated `q` and `k`.

    Raises:
        ValueError: `unsqueeze_dim` is neither 1 nor 2.
    """
    if unsqueeze_dim == 1:
        return liger_fn.rope(q, k, cos, sin)
    if unsqueeze_dim != 2:
        raise ValueError(f"rotary: unsqueeze_dim must be 1 ([B, heads, T, D]) or 2 ([B, T, heads, D]), got {unsqueeze_dim}")
    q, k = liger_fn.rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


class RopeForward(Forward):
    """The forward of an attention module, over a view in which the rotary function is ours."""

    __slots__ = ("_forward", "function")

    op = "rope"

    def __init__(self, module: nn.Module, function: str) -> None:
        super().__init__(module)
        self.function = function
        self._forward = rebind(type(module).forward, function, rotary)

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._forward(module, *args, **kwargs)

    # A function over a view has no importable name: a copy makes it anew from its class.
    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["_forward"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forward = rebind(type(self.module).forward, self.function, rotary)
