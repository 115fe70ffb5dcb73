"""A step in less precision, or in several parts: GradScaler's decisions, and micro batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import liger_patch
from tests.liger_patch.models import gradients, labels_of, llama, same_gradients, tokens

LR = 0.1


def trio() -> tuple[nn.Module, nn.Module, nn.Module]:
    """Stock, patched, and a stock one that computes in fp32."""
    stock, ours, exact = llama(), llama(), llama()
    liger_patch.auto(ours)
    return stock, ours, exact


def all_of(model: nn.Module) -> Tensor:
    return torch.cat([grad.flatten() for grad in gradients(model).values()])


class Scaled:
    """A model trained in fp16 under autocast by SGD and a GradScaler."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)

    def backward(self, seed: int, factor: float = 1.0) -> Tensor:
        """Gradients of the parameters, unscaled; and the loss."""
        ids = tokens(seed=seed)
        with torch.autocast("cpu", torch.float16):
            loss = self.model(ids, labels=labels_of(ids)).loss
        self.optimizer.zero_grad()
        self.scaler.scale(factor * loss).backward()
        self.scaler.unscale_(self.optimizer)
        return loss.detach()

    def update(self) -> tuple[bool, float]:
        """Whether the optimizer's step was made, and the scale from now on."""
        before = [p.detach().clone() for p in self.model.parameters()]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        moved = [not torch.equal(p, q) for p, q in zip(self.model.parameters(), before, strict=True)]
        assert all(moved) or not any(moved), "a step is made whole or not at all"
        return all(moved), self.scaler.get_scale()


def test_the_scaler_decides_as_for_the_stock_model() -> None:
    """Its scale grows after two good steps, and halves with the step skipped where a gradient is infinite."""
    stock, ours, _ = trio()
    runs = [Scaled(stock, 2.0**12), Scaled(ours, 2.0**12)]
    seen = []
    for seed, factor in enumerate((1.0, 1.0, float("inf"), 1.0)):
        losses = [run.backward(seed, factor) for run in runs]
        # Weights have moved apart by what fp16 rounds; a loss is a mean of such differences.
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
        theirs, mine = [run.update() for run in runs]
        assert mine == theirs
        seen.append(mine)
    assert seen == [(True, 2.0**12), (True, 2.0**13), (False, 2.0**12), (True, 2.0**12)]


def test_a_scale_that_overflows_fp16_is_found() -> None:
    """No gradient is finite by accident: what a kernel multiplies in fp32 must still overflow where it is stored in fp16."""
    stock, ours, _ = trio()
    for model in (stock, ours):
        run = Scaled(model, 2.0**40)
        run.backward(1)
        assert run.update() == (False, 2.0**39)


def test_gradients_unscaled_are_no_further_from_those_in_fp32() -> None:
    stock, ours, exact = trio()
    theirs, mine, truth = [], [], []
    for seed in range(6):  # of one batch, which of two orders of rounding errs less is chance
        ids = tokens(seed=seed)
        exact.zero_grad()
        exact(ids, labels=labels_of(ids)).loss.backward()
        truth.append(all_of(exact))
        for model, found in ((stock, theirs), (ours, mine)):
            Scaled(model, 2.0**12).backward(seed)
            found.append(all_of(model))
    right = torch.cat(truth)
    allowed = torch.linalg.vector_norm(torch.cat(theirs) - right)
    assert 0 < allowed < 0.01 * torch.linalg.vector_norm(right)
    # A tenth for another order of as many roundings.
    assert torch.linalg.vector_norm(torch.cat(mine) - right) <= 1.1 * allowed


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
def test_four_micro_batches_are_one_batch(as_tensor: bool) -> None:
    """Each has another number of labels that count; what a mean divides by is the number of all."""
    whole, parts, stock = llama(), llama(), llama()
    liger_patch.auto(whole)
    liger_patch.auto(parts)
    ids = tokens(batch=8, length=11)
    labels = ids.masked_fill(torch.arange(11) < torch.arange(8)[:, None], -100)
    count = int((labels[:, 1:] != -100).sum())
    for model in (whole, stock):
        model(ids, labels=labels).loss.backward()
    losses = []
    for some, of in zip(ids.chunk(4), labels.chunk(4), strict=True):
        loss = parts(some, labels=of, num_items_in_batch=torch.tensor(count) if as_tensor else count).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(sum(losses), stock(ids, labels=labels).loss.detach(), rtol=1e-6, atol=0)
    assert len({round(loss.item(), 3) for loss in losses}) == 4
    same_gradients(parts, stock)
    same_gradients(parts, whole)
