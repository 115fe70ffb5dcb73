r"""What a head whose vocabulary is cut over the ranks of a process group has beyond `_head`: the shards, the statistics of whole rows, dx.

Rank r has the rows [v_r, v_r + V_r) of the weight, and of each row of logits those columns. What they tell of the row is gathered, some
numbers a row, and `_loss_parts` makes the whole row's of it. Every rank makes the same numbers in the same order, so all have the same
bits. dx is a sum over the ranks, in fp32, a chunk of rows at a time.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _check, _memory
from ._check import wide_dtype
from ._head import Gradients, Head, Turn, by_classes, by_tokens, default_budget, fit, product, settle, sliced, turned
from ._kept_rows import Chunk, Kept, kept
from ._launch import cdiv, has_fp64
from ._loss_parts import Whole, joined, look, put
from ._loss_rows import Part, Rows, Terms
from ._vjp import Needs, Pair
from .cross_entropy import PLAIN, Parts


class Shard(NamedTuple):
    """The classes of this rank: which, of how many, and among whom."""

    group: str  # its name; empty for a rank alone
    first: int
    classes: int  # of all ranks

    @property
    def members(self) -> Any:
        """The process group. Operators take names, from which PyTorch finds it."""
        c10d: Any = dist.distributed_c10d
        return c10d._resolve_process_group(self.group)

    def within(self, part: Part | None) -> Part:
        """A slice of the shard's own columns, or all of them, among all classes."""
        return Part(self.first + (0 if part is None else part.first), self.classes)

    def gather(self, mine: Tensor) -> Tensor:
        """`mine` of every rank, along a new first axis."""
        group = self.members
        every = mine.new_empty(group.size(), *mine.shape)
        single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before PyTorch 2.13
        single(every.view(-1), mine.view(-1), group=group)
        return every


class Layout(NamedTuple):
    """What one gather at the start of a forward tells of all shards."""

    sound: Tensor | None  # no axes: they hold every class once; None where that is known
    weights: Tensor  # [ranks], the sum of the class weights of each, 0 where nobody asks


def layout(op: str, shard: Shard, weight: Tensor, terms: Terms) -> Layout:
    """See there. On a CPU, where looking costs nothing, shards that do not fit together are an error; on a GPU they make NaN."""
    wide, v = wide_dtype(weight), weight.shape[0]
    mine = weight.new_zeros(4, dtype=torch.float64 if has_fp64(weight.device) else wide)
    for i, number in enumerate((shard.first, v, shard.classes)):
        mine[i].fill_(number)
    if terms.smoothing:
        own = mine.new_full((), v) if terms.weight is None else terms.weight[shard.first : shard.first + v].sum(dtype=mine.dtype)
        mine[3].copy_(own)
    every = shard.gather(mine)
    first, order = every[:, 0].sort()
    ends = first + every[order, 1]
    joined = torch.cat((ends.new_zeros(1), ends)) == torch.cat((first, every[:1, 2]))
    sound = joined.all() & (every[:, 2] == every[0, 2]).all()
    if weight.device.type != "cpu":
        return Layout(sound, every[:, 3].to(wide))
    if not sound:
        shards = ", ".join(f"[{int(a)}, {int(a + n)}) of {int(size)}" for a, n, size, _ in every.tolist())
        raise ValueError(
            f"{op}: the ranks' rows of weight must be every class of the vocabulary once, got {shards}; shards of different sizes need "
            "vocab_start and vocab_size"
        )
    return Layout(None, every[:, 3].to(wide))


def statistics(
    a: Tensor, target: Tensor, ignore_index: int, terms: Terms, shard: Shard, of: Layout, rows: Rows, *, aux: bool
) -> Whole:  # fmt: skip
    """Of a chunk of rows, from this rank's columns of their logits."""
    mine = look(a, target, ignore_index, terms, shard.within(None), rows, aux=aux)
    return joined(shard.gather(mine), of.weights, target, ignore_index, shard.classes, of.sound)


def some(t: Tensor | None, chunk: Chunk) -> Tensor | None:
    """The rows of a chunk; one element is for every row."""
    return t if t is None or t.shape[0] == 1 else chunk.take(t)


# --- gradients --------------------------------------------------------------------------------------------------------------------------


class Summed:
    """dx, summed over the ranks while this one goes on: the sum of a chunk is waited for when the next has begun its own."""

    def __init__(self, head: Head, keep: Kept, shard: Shard, runs: bool) -> None:
        self.head, self.members, self.runs = head, shard.members, runs
        self.dx = torch.empty_like(head.x) if keep.index is None and keep.count else torch.zeros_like(head.x)
        self._begun: tuple[Any, Chunk, Tensor] | None = None

    def add(self, chunk: Chunk, g: Tensor) -> None:
        """Begin the sum of a chunk, from the gradient of this rank's logits."""
        share = g.new_empty(g.shape[0], self.head.x.shape[1], dtype=wide_dtype(g))
        product(g, self.head.weight, share, runs=self.runs)
        begun = dist.all_reduce(share, group=self.members, async_op=True), chunk, share
        self.finish()
        self._begun = begun

    def finish(self) -> None:
        """Wait for the sum that was begun, and round it."""
        if self._begun is not None:
            work, chunk, share = self._begun
            work.wait()
            put(self.dx, chunk, share.to(self.dx.dtype))
            self._begun = None


def walk(
    op: str, head: Head, target: Tensor, ignore_index: int, turn: Turn, needs: Needs, accumulate: str, memory_budget: int, shard: Shard, *,
    forward: bool
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """`_head.walk` over a shard: `turn` sees this rank's columns. dx is of all ranks; dw and db are this one's rows of theirs.

    Every rank must take the same chunks, whatever its own share of the classes: they are those that equal shards would have.
    """
    weight = head.weight
    like = Head(head.x, torch.empty(cdiv(shard.classes, shard.members.size()), weight.shape[1], dtype=weight.dtype, device="meta"))
    keep = kept(target, ignore_index, fit(like, None, memory_budget or default_budget(like.weight)))
    how, rows = settle(like, keep, accumulate, memory_budget)
    budget = memory_budget or default_budget(weight)
    try:
        return _walked(head, keep, how, rows, budget, turn, needs, shard, forward)
    except torch.OutOfMemoryError as error:
        row, exact = like.weight.shape[0] * weight.element_size(), how == "exact" and needs[1]
        logits = min(rows, keep.count) * row if forward or needs[0] or not exact else 0
        if exact:
            logits = max(logits, prod(sliced(head, keep.count, budget, dx=False)) * weight.element_size())
        _memory.explain(error, _memory.Pass(op, head, needs, forward, how, logits, row, ranks=True))
        raise


def _walked(
    head: Head, keep: Kept, how: str, rows: int, budget: int, turn: Turn, needs: Needs, shard: Shard, forward: bool
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """`walk`, once its ways are chosen."""
    weight, bias = head.weight, head.bias
    if not any(needs):
        by_tokens(head, keep, rows, turn, None, grad=False)
        return None, None, None
    stored = torch.float32 if forward and weight.dtype is torch.float16 else weight.dtype
    exact, sums = how == "exact" and needs[1], torch.float32 if how == "fp32" and weight.dtype is not torch.float64 else stored
    runs = keep.count > rows
    made = Gradients(head, (False, *needs[1:]), keep, sums=sums, runs=runs)
    dx = Summed(head, keep, shard, runs) if needs[0] else None

    def step(a: Tensor, chunk: Chunk, part: Part | None, grad: bool) -> None:
        turn(a, chunk, part, grad)
        if dx is not None and part is None:
            dx.add(chunk, a)

    if forward or needs[0] or not exact:
        by_tokens(head, keep, rows, step, made, grad=needs[0] or not exact, sums=not exact)
    if exact:
        x = head.x if keep.index is None else head.x.index_select(0, keep.index)
        by_classes(head, keep, x, budget, turned(turn, head, keep, x), made, dx=False)
    if dx is not None:
        dx.finish()
    dw, db = made.dweight, made.dbias
    return None if dx is None else dx.dx, None if dw is None else dw.to(stored), None if db is None or bias is None else db.to(stored)


# --- arguments, and the definition ------------------------------------------------------------------------------------------------------


def shard_of(op: str, group: Any, weight: Tensor, vocab_start: int | None, vocab_size: int | None) -> Shard:
    """The shard of this rank, checked as far as one rank can."""
    on = dist.is_available() and dist.is_initialized()
    if group is not None and not (on and isinstance(group, dist.ProcessGroup)):
        hint = "pass mesh.get_group(), or None for all ranks" if on else "call torch.distributed.init_process_group first"
        raise TypeError(f"{op}: group must be a torch.distributed.ProcessGroup that this rank is in, or None, got {group!r}; {hint}")
    if group is None and on:
        group = dist.group.WORLD
    v, ranks, rank = weight.shape[0], 1 if group is None else group.size(), 0 if group is None else group.rank()
    if (vocab_start is None) != (vocab_size is None):
        raise ValueError(
            f"{op}: vocab_start and vocab_size must come together, got vocab_start={vocab_start} and vocab_size={vocab_size}; pass neither "
            "where all ranks have as many rows of weight, in the order of the ranks"
        )
    first = rank * v if vocab_start is None else _check.integer(op, "vocab_start", vocab_start, 0)
    classes = ranks * v if vocab_size is None else _check.integer(op, "vocab_size", vocab_size, 1)
    if first + v > classes or (ranks == 1 and v != classes):
        raise ValueError(
            f"{op}: the rows of weight must be classes of the vocabulary{', all of them for a rank alone' if ranks == 1 else ''}, "
            f"got classes [{first}, {first + v}) and vocab_size={classes}; check vocab_start against what was cut off"
        )
    return Shard("" if ranks == 1 else group.group_name, first, classes)


def alone(op: Any, parts: Parts) -> Pair:
    """The pair of the same function for a rank alone."""
    pair: Pair = op.pairs["reference" if parts is PLAIN else "triton"]
    return pair


def whole(shard: Shard, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The head of all ranks, for the definition; of it, this rank's rows alone are differentiable."""
    if not shard.group:
        return weight, bias
    spans = shard.gather(torch.tensor([shard.first, weight.shape[0]], device=weight.device)).tolist()
    most, mine = max(v for _, v in spans), shard.members.rank()

    def joined(t: Tensor) -> Tensor:
        padded = torch.cat((t.detach(), t.new_zeros(most - t.shape[0], *t.shape[1:])))
        every = shard.gather(padded)
        parts = [(first, t if r == mine else every[r, :v]) for r, (first, v) in enumerate(spans)]
        return torch.cat([part for _, part in sorted(parts, key=lambda p: p[0])])

    return joined(weight), None if bias is None else joined(bias)
