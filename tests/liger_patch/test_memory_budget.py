"""`memory_budget`: how much of the logits a patched model has at a time, which is what to change where memory does not suffice."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch

import liger_fn
import liger_patch
from liger_patch import PatchError
from tests.liger_patch.models import llama, same_gradients, tokens
from tests.memory import scarce

LIMIT = 40_000  # bytes; the logits of the rows below take 90,112, the gradients of the weights 16,384


def step(model: Any) -> torch.Tensor:
    ids = tokens(batch=16)
    loss: torch.Tensor = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach()


def head_row(report: liger_patch.Report) -> Any:
    return next(row for row in report if row.op == "linear_cross_entropy")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The budgets of the losses that were made."""
    seen: list[int | None] = []
    fused = liger_fn.linear_cross_entropy

    def seeing(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["memory_budget"])
        return fused(*args, **kwargs)

    monkeypatch.setattr(liger_fn, "linear_cross_entropy", seeing)
    return seen


@pytest.mark.parametrize("fresh", [True, False], ids=["a new model", "the same model"])
def test_the_remedy_of_the_note_works(fresh: bool):
    stock, model = llama(), llama()
    liger_patch.auto(model, verify=False)
    with liger_fn.use_backend("reference"):
        with scarce(LIMIT), pytest.raises(torch.OutOfMemoryError) as caught:
            step(model)
        assert all(p.grad is None for p in model.parameters())
        note = "\n".join(getattr(caught.value, "__notes__", [str(caught.value)]))
        number = int(re.search(r"liger_patch\.auto\(model, memory_budget=(\d+)\)", note)[1])  # type: ignore[index]
        model = llama() if fresh else model
        report = liger_patch.auto(model, verify=False, memory_budget=number)
        assert head_row(report).now == f"liger_fn.linear_cross_entropy(memory_budget={number})"
        with scarce(LIMIT):
            loss = step(model)
    torch.testing.assert_close(loss, step(stock), rtol=2e-6, atol=0)  # fp32
    same_gradients(model, stock)


def test_copies_carry_it(asked: list[int | None]):
    model = llama()
    liger_patch.auto(model, memory_budget=12345)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        asked.clear()
        step(other)
        assert asked == [12345]
        assert head_row(liger_patch.plan(other)).now.endswith("(memory_budget=12345)")
        liger_patch.auto(other)  # says nothing of it
        assert head_row(liger_patch.auto(other, memory_budget=54321)).status == "already"
        step(other)
        assert asked == [12345, 54321]
        assert liger_patch.verify(other).where("proved")
        liger_patch.revert(other)
        assert "memory_budget" not in str(liger_patch.auto(other))


def test_a_plan_and_a_block_change_nothing_for_good(asked: list[int | None]):
    model = llama()
    liger_patch.auto(model, memory_budget=1000)
    assert "memory_budget=2000" in str(liger_patch.plan(model, memory_budget=2000))
    asked.clear()
    with liger_patch.patched(model, verify=False, memory_budget=3000):
        step(model)
    step(model)
    assert asked == [3000, 1000]


def entered(model: Any, **options: Any) -> None:
    with liger_patch.patched(model, **options):
        pass


@pytest.mark.parametrize(("entry", "call"), [("auto", liger_patch.auto), ("plan", liger_patch.plan), ("patched", entered)])
@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "1 GiB"])
def test_wrong_values(entry: str, call: Any, wrong: Any):
    model = llama()
    with pytest.raises(ValueError, match=rf"^{entry}: memory_budget \(bytes\) must be an integer of at least 1, got"):
        call(model, memory_budget=wrong)
    assert not model.__dict__.get("_liger_patch")


def test_a_head_that_stays_stock_has_none():
    model = llama()
    with pytest.raises(PatchError, match="auto: memory_budget is of the loss that the output layer makes"):
        liger_patch.auto(model, memory_budget=1000, linear_cross_entropy=False)
    assert not liger_patch.plan(model).where("already")
    assert "memory_budget" not in str(liger_patch.auto(model, memory_budget=1000, linear_cross_entropy=False, strict=False))
