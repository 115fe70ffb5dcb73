"""Accelerate's own loop over a patched model. What `prepare_model` does to one model in one step: tests/liger_patch/test_training.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import liger_patch
from tests.liger_patch.models import llama

from .runs import LOSS, rows, same

accelerate = pytest.importorskip("accelerate")


def train(model: nn.Module, precision: str, when: str, every: int = 2, epochs: int = 2) -> tuple[list[float], list[float]]:
    """Losses of every batch, and the norms of the gradients of every step. `when` to patch: before prepare, after it, or never."""
    if when == "before":
        liger_patch.auto(model)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=every)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    data: Any = DataLoader(rows(12), batch_size=2)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    if when == "after":
        liger_patch.auto(model)
    losses, norms = [], []
    for _ in range(epochs):
        for batch in data:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accumulated_steps(precision: str, when: str) -> None:
    (expected, theirs), (got, ours) = (train(llama(), precision, w) for w in ("never", when))
    assert (len(expected), len(theirs)) == (12, 6), "a step every second batch"
    # In bf16 each product is rounded by up to 4e-3, of which a loss, a mean over some 20 rows, keeps a tenth, and the steps carry it on.
    rel = {"no": LOSS, "bf16": 1e-3}[precision]
    same(got, expected, rel)
    same(ours, theirs, 10 * rel)
