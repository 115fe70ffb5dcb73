"""Too little memory, on purpose, for the functions of heads; and the note of the error that follows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import liger_fn
from tests.numerics import untouched
from tests.sample import flat

N, H, V = 32, 8, 512
LIMIT = 40_000  # bytes; the logits of these take 65,536, the gradient of the weight 16,384
REFUSED = "out of memory: tried to allocate more than a test allows"
MAKERS = (
    *((torch, name) for name in ("empty", "zeros", "empty_like", "zeros_like")),
    *((torch.Tensor, name) for name in ("new_empty", "new_zeros", "new_full")),
)


@contextmanager
def scarce(limit: int) -> Iterator[None]:
    """In this block, whoever asks PyTorch by name for more than `limit` bytes at once gets the error of a GPU that is full."""

    def guarded(make: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            if made.device.type != "meta" and made.untyped_storage().nbytes() > limit:
                raise torch.OutOfMemoryError(REFUSED)
            return made

        return ask

    with ExitStack() as stack:
        for owner, name in MAKERS:
            stack.enter_context(patch.object(owner, name, guarded(getattr(owner, name))))
        yield


def arguments(name: str, dtype: torch.dtype = torch.float32, device: Any = "cpu", n: int = N, v: int = V, h: int = H) -> dict[str, Any]:
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).to(dtype)

    heads = {"x": normal(n, h).requires_grad_(), "weight": normal(v, h).requires_grad_()}
    if name.endswith("distill"):
        return heads | {"x_teacher": normal(n, h), "weight_teacher": normal(v, h)}
    return heads | {"target": torch.randint(v, (n,), generator=g, device=device)}


def summed(name: str, given: dict[str, Any], **options: Any) -> Tensor:
    return sum(y.sum() for y in flat(getattr(liger_fn, name)(**given, **options)))  # type: ignore[return-value]


def trained(run: Callable[[], Tensor], given: dict[str, Any]) -> tuple[Tensor, ...]:
    loss = run()
    return loss.detach(), *torch.autograd.grad(loss, (given["x"], given["weight"]))


def noted(error: BaseException, *, text: str = REFUSED) -> str:
    """The note of an error that is PyTorch's own otherwise."""
    assert type(error) is torch.OutOfMemoryError
    if hasattr(error, "add_note"):
        assert error.args == (text,)
        (note,) = error.__notes__
        return note
    assert str(error).startswith(text)
    return str(error)


def budget_in(note: str) -> int:
    return int(re.search(r"memory_budget=(\d+)", note)[1])  # type: ignore[index]


def failing(run: Callable[[], Tensor], when: str, given: dict[str, Any], limit: int = LIMIT) -> str:
    """The note of the error that `run`, or its backward, raises where memory is scarce; inputs and their gradients stay as they are."""
    leaves = given["x"], given["weight"]
    for t in leaves:
        t.grad = torch.ones_like(t)
    with untouched([t for t in (*given.values(), *(t.grad for t in leaves)) if torch.is_tensor(t)]):
        if when == "forward":
            with scarce(limit), pytest.raises(torch.OutOfMemoryError) as caught:
                run()
        else:
            loss = run()
            with scarce(limit), pytest.raises(torch.OutOfMemoryError) as caught:
                loss.backward()
    return noted(caught.value)
