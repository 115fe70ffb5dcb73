"""What to do where memory does not suffice for a head: a note on PyTorch's own error, which stays the object that it is.

Whoever catches that error by its type, or looks into its text, finds what PyTorch raised; a traceback prints the note under it. Python 3.10
knows no notes: there the text grows.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._head import Head

PATCHED = ("linear_cross_entropy", "vocab_parallel_linear_cross_entropy")  # what `liger_patch.auto` gives a model


class Pass(NamedTuple):
    """A pass over the rows of a head, which makes gradients of x, weight and bias as `needs` says, in forward or in backward."""

    op: str  # the public function
    head: Head
    needs: tuple[bool, ...]
    forward: bool
    how: str  # the weight's gradient is summed
    logits: int  # bytes at a time, as `memory_budget` counts
    row: int  # of them, the least that it can be
    dx_sum: int = 0  # bytes of a sum of dx in fp32, beside dx
    instead: str = "exact"  # another way to sum, without a buffer in fp32
    ranks: bool = False  # others run the same, each with its share

    @property
    def kept(self) -> torch.dtype:
        """Of the weight's gradient, once it is made."""
        dtype = self.head.weight.dtype
        return torch.float32 if self.forward and dtype is torch.float16 else dtype

    @property
    def fp32(self) -> int:
        """Bytes of a sum of the weight's gradient beside that gradient."""
        return 4 * self.head.weight.numel() if self.needs[1] and self.how == "fp32" and self.kept.itemsize < 4 else 0

    @property
    def sums_elsewhere(self) -> int:
        """Bytes in fp32 that `instead` takes at most: "exact" may sum dx, and the weight's gradient for some classes."""
        from ._head import CLASSES  # which imports this module

        x, weight, _ = self.head
        return 4 * (x.numel() * self.needs[0] + 2 * CLASSES * weight.shape[1]) if self.instead == "exact" else 0

    @property
    def made(self) -> int:
        """Bytes of gradients and their sums."""
        x, weight, _ = self.head
        return x.numel() * x.element_size() * self.needs[0] + weight.numel() * self.kept.itemsize * self.needs[1] + self.fp32 + self.dx_sum


def explain(error: BaseException, of: Pass) -> None:
    """Say on an error what the pass that raised it has in memory at a time, and with which options it takes less."""
    half, ways = of.logits // 2, []
    smaller = half >= of.row
    if smaller:
        ways.append(f"memory_budget={half}, half of those logits, or less")
    if of.fp32 > of.sums_elsewhere:
        ways.append(f'accumulate="{of.instead}", which does without a sum in fp32 of {mib(of.fp32)}')
    if of.forward and any(of.needs):
        ways.append('save="recompute", which keeps no gradients from forward to backward')
    has = [f"{mib(of.logits)} of logits at a time"] * bool(of.logits) + [f"{mib(of.made)} of gradients and their sums"] * bool(of.made)
    remedy = f"Call it{' on all ranks' if of.ranks else ''} with {'; or with '.join(ways)}" if ways else "It takes less for fewer rows"
    text = (
        f"{of.op}: out of memory in {'forward' if of.forward else 'backward'}, with {' and '.join(has) or 'no logits'}; nothing is lost. "
    )
    text += remedy
    if smaller and of.op in PATCHED:
        text += f". In a patched model: liger_patch.auto(model, memory_budget={half})"
    note(error, text)


def explain_scaling(error: BaseException, op: str, made: tuple[Tensor | None, ...]) -> None:
    """Say on an error of a backward that has only to scale what forward `made` how it can do without both."""
    size = sum(t.numel() * t.element_size() for t in made if t is not None)
    note(
        error,
        f"{op}: out of memory in backward, which makes gradients from the {mib(size)} that forward made; nothing is lost. Call it with "
        'save="recompute", which makes them in backward alone, from as much of the logits at a time as memory_budget says',
    )


def note(error: BaseException, text: str) -> None:
    """Add `text` to what a traceback prints of `error`."""
    if sys.version_info >= (3, 11):
        error.add_note(text)
    else:
        error.args = (f"{error}\n{text}", *error.args[1:])


def mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
