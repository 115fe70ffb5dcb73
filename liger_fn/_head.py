r"""The matrix products of a head, chunk by chunk: logits a = x wᵀ + b that never exist all at once, and what their gradient g goes to.

    dx = g w        dw = gᵀ x        db = Σ_rows g

`by_tokens` goes through the rows of x. Each row's logits are whole there, so that losses can be made of them; dx is complete, dw and db are
sums over chunks. `by_classes` goes through the rows of w. It needs the rows' statistics, and makes the logits once more; dw and db are
complete. The turn of logits into their gradient, in place, is the caller's.

Sums over chunks: in the weight's dtype ("weight"), where each chunk rounds once more; or in fp32 ("fp32"), where a product over the tokens
of a whole chunk is added at a time, and the sum rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import _check, _head_kernels, _memory
from ._check import wide_dtype
from ._kept_rows import Chunk, Kept, cut, kept
from ._launch import cdiv
from ._loss_rows import Part

Needs = tuple[bool, ...]
Accumulate = Literal["auto", "weight", "fp32", "exact"]
ACCUMULATE = ("auto", "weight", "fp32", "exact")
# The logits of a chunk's rows, of all classes or of a part: look at them, and where the last says so turn them into their gradient.
Turn = Callable[[Tensor, Chunk, Part | None, bool], None]

LIFT = 1024.0  # float16 keeps small probabilities as subnormals, or not at all
RUN = 512  # terms an fp32 product of a chunk sums one after another
ROWS, LEAST_BYTES = 1024, 128 * 2**20  # of logits at a time, see `default_budget`
MOST_BYTES = 512 * 2**20  # of them where each chunk reads and writes all of dw
FEW = 16  # chunks whose shares of dw may each be rounded: with more, their error would pass that of 16-bit logits and a rounding
DX_SUM = 512 * 2**20  # bytes of fp32 that a sum of dx over classes may take
EXACT = 512 * 2**20  # and with the logits, where those do not fall under a quarter of their budget
CLASSES = 4096  # classes of all rows at a time, or narrow products are slower than more of them, of twice as many classes and fewer rows


class Head(NamedTuple):
    """What makes logits of hidden states."""

    x: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]

    def logits(self, x: Tensor, buffer: Tensor, classes: slice) -> Tensor:
        """Of some rows of x, for some classes, in the memory of `buffer`."""
        w = self.weight[classes]
        out = buffer[: x.shape[0] * w.shape[0]].view(x.shape[0], w.shape[0])
        return torch.mm(x, w.T, out=out) if self.bias is None else torch.addmm(self.bias[classes], x, w.T, out=out)


def fit(head: Head, keep: Kept | None, budget: int) -> int:
    """How many rows' logits, and copies of rows where they have to be gathered, take `budget` bytes; one at least."""
    (v, h), size = head.weight.shape, head.weight.element_size()
    each = v if keep is None or keep.index is None else v + 2 * h
    return max(1, budget // (size * each))


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False, runs: bool = True) -> None:
    """`out = a b`, or `out += a b`; `out` may be fp32 where a and b are of 16 bits.

    In fp32 the order of a long sum shows. A library splits one large product's sum into runs by itself; the smaller products of chunks it
    may not, so their runs are made short here, for an error no larger than the large product's.
    """
    if out.dtype is not a.dtype:
        if a.device.type == "cuda":
            torch.addmm(out, a, b, out=out, out_dtype=out.dtype) if add else torch.mm(a, b, out=out, out_dtype=out.dtype)
        else:
            out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=1 if add else 0)
        return
    run = RUN if runs and a.dtype is torch.float32 else max(1, a.shape[1])
    for i in range(0, max(1, a.shape[1]), run):
        torch.addmm(out, a[:, i : i + run], b[i : i + run], beta=1 if add or i else 0, out=out)


class Gradients:
    """The gradients of one head: dx by rows, dw and db complete or as sums over chunks. What is not wanted is None."""

    def __init__(self, head: Head, needs: Needs, keep: Kept, *, sums: torch.dtype, runs: bool) -> None:
        """`needs` of x, weight and bias; `sums` is the dtype of dw, `runs` whether the products of fp32 are those of chunks."""
        x, weight, bias = head
        self.head, self.keep, self.runs = head, keep, runs
        self.dx = None if not needs[0] else torch.empty_like(x) if keep.index is None else torch.zeros_like(x)
        self.dweight = torch.empty_like(weight, dtype=sums) if needs[1] else None
        self.dbias = torch.zeros_like(bias, dtype=wide_dtype(bias)) if bias is not None and needs[2] else None
        self._empty = True
        if not keep.count:
            for t in (self.dx, self.dweight):
                if t is not None:
                    t.zero_()

    def rows(self, chunk: Chunk, g: Tensor) -> None:
        """dx of a chunk from the gradient of its logits."""
        if self.dx is None:
            return
        if chunk.index is None:
            product(g, self.head.weight, self.dx[chunk.at], runs=self.runs)
            return
        some = self.dx.new_empty(g.shape[0], self.dx.shape[1])
        product(g, self.head.weight, some, runs=self.runs)
        self.dx.index_copy_(0, chunk.index, some)

    def add(self, x: Tensor, g: Tensor) -> None:
        """Add a chunk's share to dw and db."""
        if self.dweight is not None:
            product(g.T, x, self.dweight, add=not self._empty, runs=self.runs)
            self._empty = False
        if self.dbias is not None:
            self.dbias += g.sum(0, dtype=self.dbias.dtype)


def by_tokens(
    head: Head, keep: Kept, rows: int, turn: Turn, gradients: Gradients | None, *, grad: bool, sums: bool = False
) -> None:  # fmt: skip
    """At most `rows` rows at a time: their logits, `turn`, and their gradients; those of weight and bias where `sums`."""
    chunks, every = list(keep.chunks(rows)), slice(0, head.weight.shape[0])
    buffer = head.weight.new_empty(max((c.at.stop - c.at.start for c in chunks), default=0) * every.stop)
    for chunk in chunks:
        x = chunk.take(head.x)
        a = head.logits(x, buffer, every)
        turn(a, chunk, None, grad)
        if gradients is not None and grad:
            gradients.rows(chunk, a)
            if sums:
                gradients.add(x, a)


Rows = tuple[Tensor, Tensor]  # of the kept rows, statistics [n, 2] and log-probabilities [n]


class Fused(NamedTuple):
    """What the kernels of `_head_kernels` take for the turn of logits into losses and gradients. They write no logits."""

    target: Tensor  # [N], contiguous
    ignore_index: int
    ceiling: float  # multiplies the logits
    losses: Callable[[Kept, Rows], None]  # takes in what `statistics` found
    known: Callable[[Kept], Rows | None]  # the same, of rows that a `Turn` has seen whole, where it can be told
    factors: Callable[[Kept, Rows], tuple[Tensor, Tensor | None]]  # of the rows' gradients, see `_head_kernels.gradient`


Make = Callable[[slice, slice, Tensor], Tensor]  # the gradient of the logits of some kept rows and some classes, in a buffer


def statistics(fused: Fused, head: Head, keep: Kept, x: Tensor) -> Rows:
    """Of every kept row; and its loss. `x` are those rows."""
    target = fused.target if keep.index is None else fused.target.index_select(0, keep.index)
    stats = torch.empty(keep.count, 2, dtype=torch.float32, device=x.device)
    rows = stats, stats.new_empty(keep.count)
    _head_kernels.statistics(x, head.weight, target, fused.ignore_index, fused.ceiling, *rows)
    fused.losses(keep, rows)
    return rows


def straight(fused: Fused, head: Head, keep: Kept, x: Tensor, rows: Rows) -> Make:
    """Gradients from the products' accumulators."""
    target = fused.target if keep.index is None else fused.target.index_select(0, keep.index)
    (stats, log_prob), (hot, warm) = rows, fused.factors(keep, rows)

    def make(at: slice, classes: slice, buffer: Tensor) -> Tensor:
        out = _head_kernels.rows_in(buffer, at.stop - at.start, classes.stop - classes.start)
        _head_kernels.gradient(
            x[at], head.weight[classes], target[at], classes.start, out, stats[at], log_prob[at], hot[at],
            None if warm is None else warm[at], fused.ceiling,
        )  # fmt: skip
        return out

    return make


def turned(turn: Turn, head: Head, keep: Kept, x: Tensor) -> Make:
    """The same by a product and `turn`, of rows whose statistics are known; `x` are the kept rows."""

    def make(at: slice, classes: slice, buffer: Tensor) -> Tensor:
        a = head.logits(x[at], buffer, classes)
        turn(a, Chunk(at, None if keep.index is None else keep.index[at]), Part(classes.start, head.weight.shape[0]), True)
        return a

    return make


def sliced(head: Head, m: int, budget: int, *, dx: bool) -> tuple[int, int]:
    """How many classes, and how many of `m` rows, make the logits of `by_classes` at a time: all rows, if CLASSES classes of them fit.

    What the sum of dx takes leaves them less, where both were over EXACT.
    """
    (v, h), size, wide = head.weight.shape, head.weight.element_size(), wide_dtype(head.weight).itemsize
    left = min(budget, max(budget // 4, EXACT - wide * m * h)) if dx else budget
    width = min(v, max(1, left // (size * m) // 256 * 256))
    if width >= min(v, CLASSES):
        return width, m
    width = min(v, 2 * CLASSES)
    return width, min(m, max(1, max(left // 2, left - wide * width * h) // (size * width)))


def by_classes(head: Head, keep: Kept, x: Tensor, budget: int, make: Make, gradients: Gradients, *, dx: bool) -> None:
    """Some classes at a time, see `sliced`: the gradient of their logits, and their rows of dw, db.

    Where the rows come in blocks too, the sum of a few classes' dw is kept in fp32. With `dx`, that is summed over the classes, in fp32.
    `x` are the kept rows.
    """
    v, m = head.weight.shape[0], keep.count
    dw, db = gradients.dweight, gradients.dbias
    if not m:
        return
    width, rows = sliced(head, m, budget, dx=dx)
    buffer = head.weight.new_empty(rows * cdiv(width, 8) * 8)
    blocks = cut(m, rows)
    slab = None if dw is None or len(blocks) == 1 else dw.new_empty(width, dw.shape[1], dtype=wide_dtype(dw))
    sums = torch.empty_like(x, dtype=wide_dtype(x)) if dx else None
    for i in range(0, v, width):
        classes = slice(i, min(i + width, v))
        for at in blocks:
            a = make(at, classes, buffer)
            if sums is not None:
                product(a, head.weight[classes], sums[at], add=i > 0, runs=gradients.runs)
            if dw is not None:
                product(a.T, x[at], dw[classes] if slab is None else slab[: a.shape[1]], add=at.start > 0, runs=gradients.runs)
            if db is not None:
                db[classes] += a.sum(0, dtype=db.dtype)
        if slab is not None and dw is not None:
            dw[classes].copy_(slab[: classes.stop - i])
    if sums is not None and gradients.dx is not None:
        if keep.index is None:
            gradients.dx.copy_(sums)
        else:
            gradients.dx.index_copy_(0, keep.index, sums.to(gradients.dx.dtype))


def blank(found: tuple[Tensor | None, ...], dropped: Tensor) -> None:
    """Make some of N rows 0, in each `[..., N]`."""
    for t in found:
        if t is not None:
            t.masked_fill_(dropped, 0.0)


def now(reduction: str, save: str) -> bool:
    """Are the gradients made in forward, and only scaled in backward?"""
    return reduction != "none" and save == "grads"


def late(weight: Tensor) -> bool:
    """Does a mean divide what forward made in backward only? fp16 has no room for less, and the digits of fp32 are worth another pass."""
    return weight.dtype is not torch.bfloat16


def scaled(
    op: str, made: tuple[Tensor | None, ...], dtype: torch.dtype, factor: Tensor, needs: Needs, donate: bool, scale: Callable[..., None]
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients that forward made, times a factor, in `dtype`; in their own memory where nobody will read it again.

    What takes most memory comes first: where there is too little, no gradient has been written over, and the backward can be run again.
    """
    wanted = [t if need else None for t, need in zip(made, needs, strict=True)]
    try:
        grads = [t if t is None or (donate and t.dtype is dtype) else torch.empty_like(t, dtype=dtype) for t in wanted]
        for t, out in sorted(zip(wanted, grads, strict=True), key=lambda pair: -1 if pair[0] is None else pair[0].numel(), reverse=True):
            if t is not None:
                scale(t, factor, out)
    except torch.OutOfMemoryError as error:
        _memory.explain_scaling(error, op, made)
        raise
    return tuple(grads)


def lift(like: Tensor, factor: float, *weights: Tensor | None) -> Tensor:
    """What float16's unscaled gradients of logits are made larger by, so that a gradient of `factor`, times the weights, still fits."""
    most = like.new_full((1,), max(1.0, factor))
    for w in weights:
        if w is not None and w.numel():
            most = most * w.abs().nan_to_num(1.0, 1.0, 1.0).amax().clamp(min=1.0)
    return LIFT / most


def default_budget(weight: Tensor) -> int:
    """Bytes of logits at a time, as measured on an H100: those of ROWS rows keep the products near their rate, and so do LEAST_BYTES."""
    return max(ROWS * weight.shape[0] * weight.element_size(), LEAST_BYTES)


def settle(head: Head, keep: Kept, accumulate: str, memory_budget: int, wanted: bool = True) -> tuple[str, int]:
    """How the weight's gradient, if it is `wanted`, is summed, "weight", "fp32" or "exact", and the rows of a chunk."""
    weight, some = head.weight, memory_budget or default_budget(head.weight)
    rows = fit(head, keep, some)
    if keep.count <= rows or weight.dtype in (torch.float32, torch.float64):
        return "weight" if accumulate == "auto" or keep.count <= rows else accumulate, rows
    if accumulate == "auto":
        larger = rows
        if wanted and not memory_budget:
            larger = fit(head, keep, max(some, min(2 * ROWS * weight.shape[0] * weight.element_size(), MOST_BYTES)))
        if len(cut(keep.count, larger)) <= FEW:
            return "weight", larger
        small = not memory_budget and keep.count >= 4 * weight.shape[1]  # the buffer of "fp32" takes half of what the logits would
        accumulate = "fp32" if small or 4 * weight.numel() <= some else "exact"
    if accumulate == "fp32" and not memory_budget:
        # The rounded gradient will take this much, once the logits are gone.
        rows = fit(head, keep, max(some, weight.numel() * weight.element_size()))
    return accumulate if keep.count > rows else "weight", rows


def walk(
    op: str,
    head: Head,
    target: Tensor,
    ignore_index: int,
    turn: Turn,
    needs: Needs,
    accumulate: str,
    memory_budget: int,
    *,
    forward: bool,
    fused: Fused | None = None,
    found: tuple[Tensor | None, ...] = (),
) -> tuple[Tensor | None, ...]:
    """Call `turn` with the logits of every row that counts, and make of what it leaves in them the gradients that `needs` names.

    Args:
        op: the public function, of which an error speaks.
        target: `[N]`. turn: see `Turn`; with a `Part`, only after it has seen the same rows whole, or where that is long done.
        forward: `turn` must see every row whole, wanted gradients or not; a gradient of fp16 is then unscaled, and returned in fp32.
        fused: takes the turn's place where a forward makes no gradients, or exact ones.
        found: what `turn` writes to, `[..., N]`, which is made 0 in the rows that it will not see.
    """
    weight, some = head.weight, memory_budget or default_budget(head.weight)
    keep = kept(target, ignore_index, fit(head, None, some))
    if keep.index is not None:
        blank(found, target == ignore_index)
    how, rows = settle(head, keep, accumulate, memory_budget, needs[1])
    whole = how == "exact" and needs[1] and 4 * keep.count * weight.shape[1] <= DX_SUM  # dx as a sum over classes saves two passes
    try:
        return _walked(head, keep, how, rows, some, whole, turn, needs, forward, fused)
    except torch.OutOfMemoryError as error:
        size, dx, exact = weight.element_size(), whole and needs[0], how == "exact" and needs[1]
        row, seen = weight.shape[0] * size, fused is not None and (whole or not any(needs))  # by kernels that write no logits
        logits = min(rows, keep.count) * row if not seen and (forward or not exact or (needs[0] and not whole)) else 0
        if exact:
            logits = max(logits, prod(sliced(head, keep.count, some, dx=dx)) * size)
        _memory.explain(error, _memory.Pass(op, head, needs, forward, how, logits, row, 4 * keep.count * weight.shape[1] * dx))
        raise


def _walked(
    head: Head, keep: Kept, how: str, rows: int, some: int, whole: bool, turn: Turn, needs: Needs, forward: bool, fused: Fused | None
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """`walk`, once its ways are chosen: `some` bytes of logits at a time, dx `whole` as a sum over classes."""
    weight, bias = head.weight, head.bias
    exact, direct = how == "exact" and needs[1], fused is not None and not any(needs)
    x = head.x.index_select(0, keep.index) if (exact or direct) and keep.index is not None else head.x
    seen = statistics(fused, head, keep, x) if fused is not None and keep.count and (whole or direct) else None
    if not any(needs):
        if seen is None:
            by_tokens(head, keep, rows, turn, None, grad=False)
        return None, None, None
    stored = torch.float32 if forward and weight.dtype is torch.float16 else weight.dtype
    sums = torch.float32 if how == "fp32" and weight.dtype is not torch.float64 else stored
    made = Gradients(head, needs, keep, sums=sums, runs=keep.count > rows)
    rest = not exact or (needs[0] and not whole)  # of the gradients, by tokens
    if rest or (forward and seen is None):
        by_tokens(head, keep, rows, turn, made, grad=rest, sums=not exact)
    if exact:
        seen = seen or (None if fused is None else fused.known(keep))
        make = turned(turn, head, keep, x) if seen is None or fused is None else straight(fused, head, keep, x, seen)
        by_classes(head, keep, x, some, make, made, dx=whole and needs[0])
    dw, db = made.dweight, made.dbias
    return made.dx, None if dw is None else dw.to(stored), None if db is None or bias is None else db.to(stored)


# --- arguments --------------------------------------------------------------------------------------------------------------------------


def head_arguments(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """The tensors of a head and its targets, checked, in the dtype that autocast wants."""
    _check.floating(op, x=x, weight=weight)
    _check.optional(op, bias=bias)
    _check.rank(op, "x", x, 1)
    _check.at_least_one(op, "the last axis of x", x.shape[-1])
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: weight must be [V, {x.shape[-1]}] (vocabulary, last axis of x) with V at least 1, got {list(weight.shape)}"
        )
    if bias is not None:
        _check.shape(op, "bias", bias, weight.shape[:1], "the first axis of weight")
    target = _check.classes(op, target, x.shape[:-1], "x without its last axis")
    _check.same_device(op, x, weight=weight, bias=bias, target=target)
    x, weight, bias = _check.autocast(x), _check.autocast(weight), None if bias is None else _check.autocast(bias)
    _check.same_dtype(op, x, weight=weight, bias=bias)
    return x, weight, bias, target


def budget(op: str, memory_budget: int | None) -> int:
    """Bytes; 0 for what the sizes suggest."""
    return 0 if memory_budget is None else int(_check.integer(op, "memory_budget (bytes)", memory_budget, 1))
