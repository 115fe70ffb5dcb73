"""The causal mask: attention is told that it is causal, where transformers would write a mask out or wait for the device to learn so.

A model makes its masks by functions of `transformers.masking_utils`. From positions alone these cannot know whether a batch packs several
sequences into one row: they read the positions back, for which the host waits in every step; and where a compiler traces, which cannot
wait, releases write out a mask of `[B, 1, T, T]`, with which attention computes what it could skip. But whoever passes neither positions
nor a mask packs nothing. Then the answer is known: no mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import masking_utils

from ._swap import Viewed
from ._view import rebind, uses_global

PLAIN = {"config", "inputs_embeds", "input_embeds", "attention_mask", "past_key_values", "position_ids", "cache_position", "layer_idx"}
"""Arguments beside which a mask may be left out; `plain` looks at those that decide."""


def create_causal_mask(*args: Any, **given: Any) -> Any:
    """`transformers.masking_utils.create_causal_mask` of a batch that packs nothing."""
    return None if not args and plain(given) else masking_utils.create_causal_mask(*args, **given)


def create_sliding_window_causal_mask(*args: Any, **given: Any) -> Any:
    """Likewise `create_sliding_window_causal_mask`."""
    return None if not args and within(given) else masking_utils.create_sliding_window_causal_mask(*args, **given)


def plain(given: dict[str, Any]) -> bool:
    """Is `is_causal=True` all that attention needs to know, if the batch packs nothing?"""
    config, cache = given.get("config"), given.get("past_key_values")
    return (
        given.keys() <= PLAIN
        and given.get("attention_mask") is None
        and getattr(config, "_attn_implementation", None) == "sdpa"
        and getattr(config, "is_causal", True)
        and (cache is None or (not cache.is_compileable and cache.get_seq_length() == 0))
    )


def within(given: dict[str, Any]) -> bool:
    """Likewise of a window, in which all that is past must be seen."""
    embeds = given.get("inputs_embeds", given.get("input_embeds"))
    window = getattr(given.get("config"), "sliding_window", None)
    return window is not None and embeds is not None and embeds.shape[1] < window and plain(given)


Mask = tuple[Callable[..., Any], Callable[[dict[str, Any]], bool]]
MASKS: dict[str, Mask] = {f.__name__: (f, when) for f, when in ((create_causal_mask, plain), (create_sliding_window_causal_mask, within))}
"""By the name of transformers' function: ours, and when it makes no mask."""


def names_read(module: nn.Module) -> tuple[str, ...]:
    """Which of the functions a model's forward calls, as globals that are transformers' own."""
    forward = type(module).forward
    held = getattr(inspect.unwrap(forward), "__globals__", {})
    return tuple(name for name in MASKS if uses_global(forward, name) and held[name] is getattr(masking_utils, name))


class MaskForward(Viewed):
    """The forward of a model that makes masks: in training, without positions or a mask of the caller's, over a view with ours."""

    __slots__ = ("at", "names")

    op = kind = "causal_mask"
    now = "is_causal"

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__(module)
        self.names = names
        parameters = list(inspect.signature(module.forward).parameters)
        self.at = tuple((name, parameters.index(name)) for name in ("attention_mask", "position_ids") if name in parameters)
        self._forward = self._bound()

    def _bound(self) -> Callable[..., Any]:
        forward = type(self.module).forward
        for name in self.names:
            forward = rebind(forward, name, MASKS[name][0])
        return forward

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = any((args[i] if i < len(args) else kwargs.get(name)) is not None for name, i in self.at)
        if given or not module.training:
            return self.stock(module, *args, **kwargs)
        return self._forward(module, *args, **kwargs)
