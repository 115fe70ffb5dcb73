"""The rows of a head whose target counts: only they enter its matrix products.

On a GPU only the device knows how many they are. Where there are rows enough for it to matter, the host waits for that number, once a pass,
until the work queued before is done; the device then idles for some ten microseconds. Where all logits fit the budget at once, or a CUDA
graph is being captured, every row enters, and those that do not count have a gradient of 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", Tensor, Tensor | None)

TILE = 64  # rows: chunks are multiples of it where they can be


@dataclass(frozen=True)
class Chunk:
    """Some of the rows that count: `at` is where they stand among those, `index` which rows they are, None for the rows `at` themselves."""

    at: slice
    index: Tensor | None

    def take(self, t: Tensor) -> Tensor:
        """Their rows of `t`; a view where there is no index."""
        return t[self.at] if self.index is None else t.index_select(0, self.index)

    def own(self, t: T) -> T:
        """What a kernel that is given the index finds the rows of `t` by: all of it, or the rows `at`. One element is for every row."""
        return t if t is None or self.index is not None or t.shape[0] == 1 else t[self.at]


@dataclass(frozen=True)
class Kept:
    """The rows that count: how many, and which; None where all do."""

    count: int
    index: Tensor | None

    def chunks(self, fit: int) -> Iterator[Chunk]:
        """All of them, at most `fit` at a time."""
        for at in cut(self.count, fit):
            yield Chunk(at, None if self.index is None else self.index[at])


def cut(n: int, fit: int) -> list[slice]:
    """`n` rows in slices of `fit`, a multiple of TILE where it can be; the last has what is left.

    Not in even ones: a product of 832 rows takes a GPU as long as one of 1024, whose tiles its multiprocessors share as evenly.
    """
    if n <= fit:
        return [slice(0, n)] if n else []
    rows = max(1, fit if fit < TILE else fit // TILE * TILE)
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def kept(target: Tensor, ignore_index: int, at_once: int) -> Kept:
    """Those of `[N]` targets that count; all of them where `at_once` rows or fewer need no second look, see above."""
    n, kind = len(target), target.device.type
    if kind != "cpu" and (n <= at_once or kind == "meta" or (kind == "cuda" and torch.cuda.is_current_stream_capturing())):
        return Kept(n, None)
    if kind != "cuda":
        index = (target != ignore_index).nonzero().squeeze(-1)
        return Kept(len(index), None if len(index) == n else index)
    counts = target != ignore_index
    index = torch.nonzero_static(counts, size=n, fill_value=-1).squeeze(-1)
    count = _on_host(counts.sum())
    return Kept(count, None if count == n else index[:count])


def _on_host(number: Tensor) -> int:
    """A number of the device's, waited for."""
    here = torch.empty((), dtype=number.dtype, pin_memory=True)
    here.copy_(number, non_blocking=True)
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(number.device))
    there.synchronize()
    return int(here)
