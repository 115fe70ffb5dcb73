"""torch.compile of a patched model: whole or layer by layer, and for sizes that change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

import liger_patch
from tests.liger_patch.models import agree, llama, some_ignored

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # Dynamo reads it of every input, and hides its own warning in a way that does not reach a filter that makes errors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

SIZES = ((2, 9), (3, 12), (4, 7), (2, 16))  # sequences, tokens in each


def both(layers: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Stock, and patched."""
    stock, ours = llama(num_hidden_layers=layers), llama(num_hidden_layers=layers)
    liger_patch.auto(ours)
    return stock, ours


def step(call: Callable[..., Any], model: PreTrainedModel, batch: int = 2, length: int = 9, mark: bool = False) -> dict[str, Tensor]:
    """The loss of a call of `model`, compiled or not, and the gradients of all parameters."""
    ids = torch.randint(7, 128, (batch, length), generator=torch.Generator().manual_seed(100 * batch + length))
    labels = some_ignored(ids)
    if mark:
        for t in (ids, labels):
            for axis in (0, 1):
                torch._dynamo.mark_dynamic(t, axis, min=2, max=64)
    loss = call(input_ids=ids, labels=labels, use_cache=False).loss
    named = dict(model.named_parameters())
    return {"loss": loss.detach()} | dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic"])
def test_one_compilation_serves_every_batch_and_length(how: str) -> None:
    stock, ours = both(1)
    # What is compiled anew is Dynamo's to decide: the rest of the compiler is needed once.
    how_far: dict[str, Any] = {"backend": "aot_eager"} if how == "mark_dynamic" else {"backend": "eager", "dynamic": True}
    compiled = torch.compile(ours, fullgraph=True, **how_far)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, length in SIZES:
            agree(step(compiled, ours, batch, length, mark=how == "mark_dynamic"), step(stock, stock, batch, length))


def by_layer(model: PreTrainedModel, backend: str = "eager") -> CompileCounterWithBackend:
    """Compile each layer by itself; the counter says how often that was work."""
    counter = CompileCounterWithBackend(backend)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=counter)
    return counter


def test_each_layer_by_itself() -> None:
    stock, ours = both(2)
    counter = by_layer(ours, "aot_eager")
    agree(step(ours, ours), step(stock, stock))
    assert counter.frame_count > 0


def test_a_compiled_layer_serves_the_others() -> None:
    """As of a stock model: a deep one would reach Dynamo's limit of 8 compilations of one function."""
    stock, ours = both(2)
    counters = [by_layer(model) for model in (stock, ours)]
    for model in (stock, ours):
        step(model, model)
    assert counters[0].frame_count == 1
    assert counters[1].frame_count == 1


def test_inductor_compiles_the_whole_step() -> None:
    stock, ours = both(1)
    agree(step(torch.compile(ours, fullgraph=True), ours), step(stock, stock))
