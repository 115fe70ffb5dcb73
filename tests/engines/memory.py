"""How much memory a rank's training step takes, as PyTorch's allocator tells its profiler, and how much of the model is whole in it.

The vocabulary is wide and the layers are small, as in real models: logits are the largest thing that a stock step makes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import liger_patch
from tests.engines.training import patched_and_wrapped
from tests.liger_patch.models import tokens

LAYERS, H, V, ROWS, LENGTH = 3, 64, 2048, 4, 40
SIZES = {"num_hidden_layers": LAYERS, "hidden_size": H, "intermediate_size": 128, "vocab_size": V}
WORDS, LOGITS = 4 * V * H, 4 * ROWS * LENGTH * V  # bytes of a matrix of all words, and of all logits of a rank's rows
BUDGET = 2**16  # of logits at a time


class Taken(NamedTuple):
    """Bytes that a block took beyond what there was, at most at a time, and by its largest tensor."""

    peak: int
    largest: int


def taken(step: Callable[[], None]) -> Taken:
    """What a step takes of a CPU's memory, whoever asks for it: autograd, engines, and operators from within."""
    gc.collect()  # or what an earlier step left is given back in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [(e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        peak = max(peak, live)
    return Taken(peak, max(size for _, size in events))


def step_of(model: Any, rows: int, backward: Callable[[Any], None] = torch.Tensor.backward) -> Callable[[], None]:
    """A training step of `rows` rows; an engine may have a `backward` of its own."""
    ids = tokens(batch=rows, length=LENGTH)

    def step() -> None:
        backward(model(ids, labels=ids, use_cache=False).loss)

    return step


def stock_and_ours(wrap: Callable[[Any], nn.Module]) -> tuple[Taken, Taken]:
    """What a step of the model takes of a rank's memory, stock and patched with a budget."""
    stock, ours = (patched_and_wrapped(wrap, when, **SIZES) for when in ("never", "before"))
    liger_patch.auto(ours, verify=False, memory_budget=BUDGET)
    return taken(step_of(stock, ROWS)), taken(step_of(ours, ROWS))


def within(stock: Taken, ours: Taken, *, logits: int, largest: int) -> None:
    """A stock step makes a tensor of `logits` bytes; ours none of more than `largest`, and takes no more in all."""
    assert largest < logits <= stock.largest, "the check must be able to fail"
    assert ours.largest <= largest, f"{ours} for {stock}"
    assert ours.peak <= stock.peak, f"{ours} for {stock}"


@contextmanager
def looking(model: Any, look: Callable[[nn.Module], None]) -> Iterator[None]:
    """In this block, every module without parts is looked at when it runs, forward and backward; the output layer forward alone.

    (Backward hooks of an output layer want the gradient of logits.)
    """
    handles = []
    for module in model.modules():
        if next(module.children(), None) is None:
            handles += [module.register_forward_pre_hook(lambda m, _: look(m)), module.register_forward_hook(lambda m, *_: look(m))]
            if not isinstance(module, nn.Linear) or module.out_features != V:
                handles.append(module.register_full_backward_pre_hook(lambda m, _: look(m)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Whole(NamedTuple):
    """What a rank had of a sharded model at the same time."""

    layers: int  # that had whole parameters
    head_besides: bool  # whether the output layer's were while anything else ran


def most_whole(model: Any, step: Callable[[], None], is_whole: Callable[[Any], bool]) -> Whole:
    """The most in a step. What an engine has under way to the next layer is not whole yet."""
    layers, head = list(model.model.layers), model.lm_head
    counts, besides = [0], []

    def look(running: nn.Module) -> None:
        counts.append(sum(any(map(is_whole, layer.parameters())) for layer in layers))
        besides.append(running is not head and any(map(is_whole, head.parameters())))  # ZeRO-3 gathers `head.weight` for whoever says that

    with looking(model, look):
        step()
    return Whole(max(counts), any(besides))
