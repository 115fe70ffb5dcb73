"""A short training of a tiny Llama, by one stock process and by the ranks of an engine, and what must be the same of both."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

import liger_fn
import liger_patch
from tests.liger_patch.models import llama, tokens

STEPS, LR = 3, 0.5
FUSED, SHARDED, LOGITS = "linear_cross_entropy", "vocab_parallel_linear_cross_entropy", "cross_entropy"
Named = dict[str, Tensor]


class Batch(NamedTuple):
    """Rows of tokens and their labels, and how many of those count in the whole batch, of which this may be a part."""

    ids: Tensor
    labels: Tensor
    items: int

    def part(self, number: int, of: int) -> Batch:
        return Batch(self.ids[number::of], self.labels[number::of], self.items)

    def arguments(self) -> dict[str, Any]:
        return {"input_ids": self.ids, "labels": self.labels, "num_items_in_batch": self.items, "use_cache": False}


def batch(step: int) -> Batch:
    """Rows with unlike numbers of labels that count: a mean over ranks of means over their own is wrong."""
    ids = tokens(seed=10 + step, batch=4)
    labels = ids.clone()
    labels[0, :7] = labels[1, -1] = labels[3, :2] = -100
    return Batch(ids, labels, int((labels[:, 1:] != -100).sum()))


class Trained(NamedTuple):
    """The losses of the whole batches, and the parameters at the end."""

    losses: list[float]
    parameters: Named


class Share(NamedTuple):
    """Which rows of a batch this rank has, and the group of the ranks that have the others; all rows, of no group, by default."""

    number: int = 0
    of: int = 1
    group: Any = None


@functools.cache
def alone(batch: Callable[[int], Batch] = batch, **options: Any) -> Trained:
    """What one stock process makes of the whole batches."""
    model = llama(**options)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=LR), []
    for step in range(STEPS):
        loss = model(**batch(step).arguments()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Trained(losses, whole(model))


def together(model: nn.Module, share: Share, *, batch: Callable[[int], Batch] = batch, parts: int = 1) -> Trained:
    """What the ranks make of them, each of its share of the rows, in so many `parts`.

    Engines take the mean of the ranks' gradients, so that each rank's loss counts as often as there are shares.
    """
    # One parameter at a time: an engine may leave some plain and make DTensors of others, and torch multiplies no list of both.
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=LR, foreach=False), []
    for step in range(STEPS):
        mine = batch(step).part(share.number, share.of)
        optimizer.zero_grad()
        total = torch.zeros(())
        for i in range(parts):
            last = i == parts - 1
            with nullcontext() if last else model.no_sync():  # type: ignore[operator]
                loss = model(**mine.part(i, parts).arguments()).loss
                (loss * share.of).backward()
            total += loss.detach()
        optimizer.step()
        if share.of > 1:
            dist.all_reduce(total, group=share.group)
        losses.append(total.item())
    return Trained(losses, whole(model))


WRAPPERS = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "module.")


def whole(model: nn.Module) -> Named:
    """Every parameter whole, under the name that it has in the stock model."""
    return {own_name(name): whole_of(p) for name, p in model.named_parameters()}


def own_name(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def whole_of(t: Tensor) -> Tensor:
    t = t.detach()
    return (t.full_tensor() if isinstance(t, DTensor) else t).cpu().clone()


def the_same(got: Trained, expected: Trained, *, rel: float = 1e-5, **options: Any) -> None:
    """Losses to the rounding of fp32, a sum in another order; parameters by how far the training took them.

    `rel` is of that way: gradients of fp32 agree to some 1e-6. Besides, each step rounds a parameter of both by half an epsilon of itself.
    """
    assert len(set(expected.losses)) == STEPS, "the model must have moved"
    for mine, theirs in zip(got.losses, expected.losses, strict=True):
        assert abs(mine - theirs) <= 2e-6 * theirs, f"losses {got.losses}, by one process {expected.losses}"
    assert got.parameters.keys() == expected.parameters.keys()
    start = whole(llama(**options))
    for name, theirs in expected.parameters.items():
        way, distance = torch.linalg.vector_norm(theirs - start[name]), torch.linalg.vector_norm(got.parameters[name] - theirs)
        rounding = STEPS * torch.finfo(theirs.dtype).eps * torch.linalg.vector_norm(theirs)
        assert way > 100 * rounding, f"{name} must have moved"
        assert distance <= rel * way + rounding, f"{name}: {float(distance / way):.3g} of its way"


@contextmanager
def losses_by(*expected: str) -> Iterator[None]:
    """In this block, losses come from these functions of liger_fn and from no other."""
    names, seen = (FUSED, SHARDED, LOGITS), set()
    originals = {name: getattr(liger_fn, name) for name in names}

    def seeing(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.add(name)
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(liger_fn, name, seeing(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(liger_fn, name, original)
    assert seen == set(expected), f"the loss came from {sorted(seen)}"


def patched_and_wrapped(wrap: Callable[[LlamaForCausalLM], nn.Module], when: str, **options: Any) -> nn.Module:
    """A tiny Llama in an engine, patched before the engine had it, or after."""
    model = llama(**options)
    if when == "before":
        liger_patch.auto(model, verify=False)  # proved in tests/liger_patch; what an engine has made of a model is proved here
    wrapped = wrap(model)
    if when == "after":
        liger_patch.auto(wrapped)
    return wrapped
