"""Rotary embedding: attention's own forward, in which the rotary function is `liger_fn.rope`.

Models differ in which channels are a pair, in how their tables of cos and sin are laid out, and in how their function is called. Each way
is a kind: a function of the models' own signature over `liger_fn.rope`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

import liger_fn

from ._sharded_head import is_sharded
from ._spec import Rope
from ._swap import Viewed
from ._view import rebind

Pair = tuple[Tensor, Tensor]


def half(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Pair:
    """Channels i and i + n of the first 2n, which is the width of the tables; `[B, T, 2n]`, made by `cat((angle, angle), -1)`."""
    return _turn(q, k, cos, sin, unsqueeze_dim)


def half_of_angles(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Pair:
    """The same with tables of each angle once, `[B, T, n]`."""
    return _turn(q, k, cos, sin, unsqueeze_dim, rotary_dim=2 * cos.shape[-1])


def half_backwards(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Pair:
    """As `half`, in the other direction."""
    return _turn(q, k, cos, -sin, unsqueeze_dim)


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Pair:
    """Channels 2i and 2i + 1; tables of each angle twice in a row."""
    return _turn(q, k, cos, sin, unsqueeze_dim, layout="interleaved")


def interleaved_of_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Pair:
    """Channels 2i and 2i + 1; tables as for `half`, of which the first half is used."""
    n = cos.shape[-1] // 2
    return _turn(q, k, cos[..., :n], sin[..., :n], unsqueeze_dim, layout="interleaved", rotary_dim=2 * n)


def deinterleaved(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, unsqueeze_dim: int = 1
) -> Pair:  # fmt: skip
    """Channels 2i and 2i + 1, which come out as i and i + n (DeepSeek); tables as for `half`."""
    q, k = (t.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for t in (q, k))
    return _turn(q, k, cos, sin, unsqueeze_dim)


def one(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
    """As `half`, of queries or keys alone."""
    turned: Tensor = _rope_of(x)(x, None, cos, sin, unsqueeze_dim=unsqueeze_dim)
    return turned


def one_of_angles(tensor: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Channels 2i and 2i + 1 of `[B, T, heads, D]`; tables of each angle once (GPT-J)."""
    turned: Tensor = _rope_of(tensor)(tensor, None, cos, sin, layout="interleaved", rotary_dim=2 * cos.shape[-1], unsqueeze_dim=2)
    return turned


def of_tokens(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    """As `half`, of `[..., T, heads, D]` (vision towers)."""
    if q.dim() == 3:
        q, k = _rope_of(q)(q.unsqueeze(0), k.unsqueeze(0), cos, sin, unsqueeze_dim=2)
        return q.squeeze(0), k.squeeze(0)
    turned: Pair = _rope_of(q)(q, k, cos, sin, unsqueeze_dim=2)
    return turned


def as_complex(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> Pair:
    """Channels 2i and 2i + 1 of `[B, T, heads, D]` as complex numbers (Llama 4)."""
    return _turn_complex(xq, xk, freqs_cis, 2)


def as_complex_by_heads(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> Pair:
    """The same of `[B, heads, T, D]` (DeepSeek-V2)."""
    return _turn_complex(xq, xk, freqs_cis, 1)


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, **options: Any) -> Pair:
    # Tables of no batch, `[T, W]`, are given an axis for it by 0.
    turned: Pair = _rope_of(q)(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim or 1, **options)
    return turned


def _turn_complex(q: Tensor, k: Tensor, turn: Tensor, unsqueeze_dim: int) -> Pair:
    turned: Pair
    if is_sharded(q):
        n = turn.shape[-1]
        turned = liger_fn.rope.reference(q, k, turn.real, turn.imag, layout="interleaved", rotary_dim=2 * n, unsqueeze_dim=unsqueeze_dim)
    else:
        turned = liger_fn.rope_complex(q, k, turn, unsqueeze_dim=unsqueeze_dim)
    return turned


def _rope_of(x: Tensor) -> Callable[..., Any]:
    """The function; of DTensors, which know none of ours, its definition in plain PyTorch."""
    return cast(Callable[..., Any], liger_fn.rope.reference) if is_sharded(x) else liger_fn.rope


class Kind(NamedTuple):
    """A way to turn, and the inputs of a proof: shapes, and how tables are made of `[1, T, n]` angles."""

    function: Callable[..., Any]
    tables: Callable[[Tensor], Tensor]
    by_tokens: bool = False  # [B, T, heads, D], not [B, heads, T, D]


def _twice(angles: Tensor) -> Tensor:
    return torch.cat((angles, angles), -1)


def _each_twice(angles: Tensor) -> Tensor:
    return angles.repeat_interleave(2, -1)


def _once(angles: Tensor) -> Tensor:
    return angles


KINDS: dict[str, Kind] = {
    "half": Kind(half, _twice),
    "half_of_angles": Kind(half_of_angles, _once),
    "half_backwards": Kind(half_backwards, _twice),
    "interleaved": Kind(interleaved, _each_twice),
    "interleaved_of_halves": Kind(interleaved_of_halves, _twice),
    "deinterleaved": Kind(deinterleaved, _twice),
    "one": Kind(one, _twice),
    "one_of_angles": Kind(one_of_angles, _once, by_tokens=True),
    "of_tokens": Kind(of_tokens, _twice, by_tokens=True),
    "as_complex": Kind(as_complex, _once, by_tokens=True),
    "as_complex_by_heads": Kind(as_complex_by_heads, _once),
}


class RopeForward(Viewed):
    """The forward of an attention module, over a view in which its rotary functions are ours."""

    __slots__ = ("specs",)

    op = kind = "rope"

    def __init__(self, module: nn.Module, *specs: Rope) -> None:
        super().__init__(module)
        self.specs = specs
        self._forward = self._bound()

    def _bound(self) -> Callable[..., Any]:
        forward = type(self.module).forward
        for spec in self.specs:
            forward = rebind(forward, spec.function, KINDS[spec.kind].function)
        return forward

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._forward(module, *args, **kwargs)
