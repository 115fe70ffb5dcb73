"""Memory under test: too little of it, on purpose, and how much of it a block takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

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
