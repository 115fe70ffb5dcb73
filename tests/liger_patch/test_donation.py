"""A patched MLP gives what its projections made to the function between them, where nobody else can have it; and what comes of that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import liger_fn

pytest.importorskip("transformers")

import liger_patch

from .models import labels_of, llama, same_gradients, tokens


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Of each call: whether its inputs were donated; the inputs; copies of them."""
    seen = []
    for op in ("swiglu", "swiglu_packed"):
        original = getattr(liger_fn, op)

        def call(*inputs: Tensor, original: Any = original, **options: Any) -> Tensor:
            held = tuple(t.detach() for t in inputs)
            seen.append((options.get("donate", False), held, tuple(t.clone() for t in held)))
            return original(*inputs, **options)

        monkeypatch.setattr(liger_fn, op, call)
    return seen


def patched(given: list[Any]) -> Any:
    model = llama()
    liger_patch.auto(model)
    given.clear()  # of what auto proves
    return model


def train(model: nn.Module, **options: Any) -> None:
    ids = tokens()
    model(ids, labels=labels_of(ids)).loss.backward(**options)


def intact(given: Any) -> list[bool]:
    return [torch.equal(t, was) for _, held, before in given for t, was in zip(held, before, strict=True)]


class Other(nn.Linear):
    """A linear layer of another kind, which may keep what it made."""


def hooked(mlp: Any) -> None:
    mlp.gate_proj.register_forward_hook(lambda module, args, output: None)


def hooked_in_backward(mlp: Any) -> None:
    mlp.up_proj.register_full_backward_hook(lambda module, into, out: None)


def exchanged(mlp: Any) -> None:
    mlp.up_proj.__class__ = Other


def with_a_forward_of_its_own(mlp: Any) -> None:
    mlp.gate_proj.forward = MethodType(lambda self, x: nn.functional.linear(x, self.weight), mlp.gate_proj)


def as_it_was(mlp: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "donated"),
    [(as_it_was, True), (hooked, False), (hooked_in_backward, False), (exchanged, False), (with_a_forward_of_its_own, False)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_others_may_hold_is_not_donated(change: Callable[[Any], None], donated: bool, given: list[Any]):
    stock, ours = llama(), patched(given)
    for model in (stock, ours):
        change(model.model.layers[1].mlp)
        train(model)
    same_gradients(ours, stock)
    assert [each[0] for each in given] == [True, donated]
    if liger_fn.backend(given[0][1][0]) != "reference":  # plain PyTorch writes over nothing
        assert intact(given) == [False, False, not donated, not donated]


def test_a_hook_on_every_module_sees_what_it_was_given_later_too(given: list[Any]):
    ours, kept = patched(given), []
    handle = register_module_forward_hook(lambda module, args, output: kept.append((output, output.clone())) if _linear(module) else None)
    try:
        train(ours)
    finally:
        handle.remove()
    assert len(kept) == 14
    assert all(torch.equal(output, was) for output, was in kept)
    assert [each[0] for each in given] == [False, False]


def _linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.out_features != 128  # not the head, whose logits are not made


def test_a_graph_that_is_kept_gives_the_same_gradients_again(given: list[Any]):
    ours = patched(given)
    ids = tokens()
    loss = ours(ids, labels=labels_of(ids)).loss
    loss.backward(retain_graph=True)
    assert all(intact(given))
    first = {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}
    ours.zero_grad()
    loss.backward()
    assert all(torch.equal(parameter.grad, first[name]) for name, parameter in ours.named_parameters())


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_layers_computed_again_in_backward(reentrant: bool, given: list[Any]):
    """The tensors of the second forward are the ones written over; a second backward makes them anew."""
    stock, ours = llama(), patched(given)
    for model in (stock, ours):
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()  # reentrant checkpointing asks for it
        for _ in range(2):
            train(model)
    same_gradients(ours, stock)
    assert [each[0] for each in given] == [True] * 8  # two layers, twice, in two steps


def test_copies_donate_what_is_their_own(given: list[Any]):
    ours = patched(given)
    other = copy.deepcopy(ours)
    hooked(other.model.layers[0].mlp)
    train(other)
    train(ours)
    assert [each[0] for each in given] == [False, True, True, True]
