"""Attention of a patched model is told that it is causal, where a mask would say no more."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import liger_patch
from liger_patch import PatchError, _mask

from .models import VOCAB, gradients, llama, same_gradients, tokens


def mistral(window: int | None) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MistralConfig(vocab_size=VOCAB, sliding_window=window, **sizes)
    return transformers.MistralForCausalLM(config).train()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reads positions back from the device, whenever transformers asks it."""
    calls: list[str] = []
    original = transformers.masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda p: calls.append("read") or original(p))
    return calls


def masks(model: nn.Module, **given: Any) -> list[bool]:
    """Of each call of attention, whether it was given a mask, as a compiler sees it."""
    found: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        calls = [n for n in graph.graph.nodes if "scaled_dot_product_attention" in str(n.target)]
        found.extend(n.kwargs.get("attn_mask") is not None or n.kwargs.get("is_causal") is not True for n in calls)
        return graph

    torch.compile(model, backend=backend, fullgraph=True)(**given)
    return found


def test_a_compiled_step_makes_no_mask(fresh_compiler: None) -> None:
    model, ids = llama(), tokens()
    liger_patch.auto(model)
    assert masks(model, input_ids=ids, labels=ids) == [False, False]
    assert masks(model, input_ids=ids, labels=ids, use_cache=False) == [False, False]


def test_positions_of_the_callers_make_one(fresh_compiler: None) -> None:
    """They may be of several sequences in a row."""
    model, ids = llama(), tokens()
    liger_patch.auto(model)
    assert masks(model, input_ids=ids, labels=ids, use_cache=False, position_ids=torch.arange(11)[None] % 4) == [True, True]


def test_a_step_does_not_wait_for_positions(asked: list[str]) -> None:
    model, ids = llama(), tokens()
    liger_patch.auto(model)
    asked.clear()  # of the proof
    model(ids, labels=ids, use_cache=False)
    assert asked == []
    liger_patch.revert(model)
    model(ids, labels=ids, use_cache=False)
    assert asked == ["read"]


@pytest.mark.parametrize("given", ["packed", "padded", "window", "wide window", "no window", "eval", "cache", "empty cache"])
def test_all_else_is_the_stock_model(given: str, asked: list[str]) -> None:
    windows = {"window": 4, "wide window": 12, "no window": None}
    stock = mistral(windows[given]) if given in windows else llama()
    model, ids = copy.deepcopy(stock), tokens()
    liger_patch.auto(model)
    asked.clear()  # of the proof
    options: dict[str, Any] = {"labels": ids, "use_cache": False}
    if given == "packed":
        options["position_ids"] = torch.arange(ids.shape[1])[None] % 4
    elif given == "padded":
        options["attention_mask"] = torch.arange(ids.shape[1])[None].expand_as(ids).ge(3).long()
    for each in (stock, model):
        if given == "eval":
            each.eval()
        if given == "empty cache":
            options["use_cache"] = True
        if given == "cache":
            with torch.no_grad():
                options |= {"past_key_values": each(ids, use_cache=True).past_key_values, "use_cache": True}
        each(ids, **options).loss.backward()
    same_gradients(model, stock)
    assert gradients(model)
    reads = {"packed": 2, "window": 2, "eval": 2, "padded": 0, "cache": 0, "empty cache": 0}  # of both models
    assert len(asked) == reads.get(given, 1)


@pytest.mark.parametrize(("window", "length", "said"), [(4, 3, True), (4, 4, False), (4, 5, False), (None, 3, False)])
def test_a_window_hides_nothing_of_a_shorter_sequence(window: int | None, length: int, said: bool) -> None:
    """As transformers has it, which makes a mask of a sequence as long as the window."""
    config = transformers.MistralConfig(sliding_window=window, attn_implementation="sdpa")
    given = {"config": config, "inputs_embeds": torch.zeros(1, length, 2), "attention_mask": None, "past_key_values": None}
    assert _mask.within(given) is said
    if window is not None:
        assert (_mask.create_sliding_window_causal_mask(**given) is None) is said


@pytest.mark.parametrize(
    "more", [{"or_mask_function": max}, {"and_mask_function": max}, {"block_sequence_ids": 0}, {"allow_is_causal_skip": False}, {"new": 0}]
)
def test_a_mask_of_more_is_transformers_own(more: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(attn_implementation="sdpa")
    given = {"config": config, "inputs_embeds": torch.zeros(1, 2, 2), "attention_mask": None, "past_key_values": None}
    assert _mask.plain(given)
    assert not _mask.plain(given | more)
    for name, value in (("is_causal", False), ("_attn_implementation", "eager")):
        other = copy.copy(config)
        setattr(other, name, value)
        assert not _mask.plain(given | {"config": other})


def test_attention_that_wants_the_mask_has_it() -> None:
    model, ids = llama(), tokens()
    model.set_attn_implementation("eager")
    stock = copy.deepcopy(model)
    (row,) = (row for row in liger_patch.auto(model) if row.op == "causal_mask")
    assert (row.status, row.now) == ("left", row.was)
    assert "eager" in row.why
    for each in (stock, model):
        each(ids, labels=ids).loss.backward()
    same_gradients(model, stock)


def test_attention_may_change_after_the_patch() -> None:
    model, ids = llama(), tokens()
    stock = copy.deepcopy(model)
    liger_patch.auto(model)
    for each in (stock, model):
        each.set_attn_implementation("eager")
        each(ids, labels=ids).loss.backward()
    same_gradients(model, stock)


def test_it_can_be_left_out(asked: list[str]) -> None:
    model, ids = llama(), tokens()
    report = liger_patch.auto(model, causal_mask=False)
    assert [row.status for row in report if row.op == "causal_mask"] == ["left"]
    model(ids, labels=ids, use_cache=False)
    assert asked == ["read"]


def test_a_forward_that_the_user_replaced_is_left() -> None:
    """It helps speed alone, and so it is no failure."""
    model = llama()
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    (row,) = (row for row in liger_patch.auto(model) if row.op == "causal_mask")
    assert (row.status, row.why) == ("left", "its forward was replaced on this instance")


def test_a_transformers_that_makes_a_mask_of_a_plain_batch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def create_causal_mask(config: Any, inputs_embeds: Any, **more: Any) -> torch.Tensor:
        return torch.ones(1, 1, 2, 2, dtype=torch.bool)

    for module in (modeling_llama, transformers.masking_utils):
        monkeypatch.setattr(module, "create_causal_mask", create_causal_mask)
    with pytest.raises(PatchError, match=r"create_causal_mask makes a mask of a plain batch, \[1, 1, 2, 2\]"):
        liger_patch.auto(llama())
