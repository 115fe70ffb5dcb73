r"""Rows of tokens to the ranks that have the experts they chose, and what came of them back.

Rank r has the experts [r E_r, (r + 1) E_r). By "all_to_all" a token goes once to each rank that has an expert of its choice: to ranks, it
is sorted as tokens are to experts, by `moe_permute`, and what comes back is summed by `moe_unpermute`: in fp32, in the order of the ranks,
rounded once. How many rows a rank gets, the host must know: it reads one number for each pair of ranks. By "all_gather" every token goes to
every rank, and nobody has to be asked. Both ways lead through the same three steps, which backward takes with dy in place of x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ._backend import Backend
from ._check import FLOATS
from ._vjp import Needs, Pair
from ._vocab_parallel import Shard
from .moe_permute import moe_permute, parts
from .moe_unpermute import moe_unpermute

EXCHANGES = ("all_to_all", "all_gather")
_DTYPES = tuple(str(dtype) for dtype in FLOATS)
_WANTED = ("not wanted", "wanted")


class Same(NamedTuple):
    """What must be alike on all ranks, the remedy, and the words for its numbers where they are no quantity."""

    name: str
    remedy: str
    words: tuple[str, ...] = ()


SAME = (
    Same("number of experts (the first axis of gate_up)", "each of W ranks has E / W, so W must divide E"),
    Same("last axis of x", "it is that of one model"),
    Same("number of choices (the last axis of topk_index)", "mark those that are no expert with -1"),
    Same("dtype of x", "convert it with .to(...)", _DTYPES),
    Same("dtype of topk_weight", "convert it with .to(...)", _DTYPES),
    Same("exchange", "pass one on all of them", EXCHANGES),
    Same("gradient of x", "call .requires_grad_() on all of them or on none", _WANTED),
    Same("gradient of topk_weight", "call .requires_grad_() on all of them or on none", _WANTED),
    Same("backward", "some argument must ask for a gradient on all of them or on none", _WANTED),
    Same("number of tokens", 'pad with tokens whose topk_index is -1, or pass exchange="all_to_all"'),
)


class Way(NamedTuple):
    """Between tokens and the ranks of their experts."""

    shard: Shard
    place: Tensor  # [T, n], int32: where the rows of a token are among those sent; negative where there is none
    counts: Tensor | None  # [2, ranks], int64, on the CPU: rows to each rank, and from each; None where all tokens go to all ranks
    rows: Pair  # of moe_unpermute

    def out(self, t: Tensor) -> Tensor:
        """`[T, n]`, a row for each token, to the ranks: those that this one gets."""
        if self.counts is None:
            return _gather(t, self.shard).flatten(0, 1)
        rows = self.rows.bwd(moe_unpermute.residuals(None, None, self.place), t, needs=(True, False), donate=False)[0]
        assert rows is not None  # as asked
        return self.give(rows)

    def give(self, rows: Tensor) -> Tensor:
        """Rows that lie in the order in which they go."""
        assert self.counts is not None  # else `gather` is all
        to, of = self.counts.tolist()
        got = rows.new_empty(sum(of), rows.shape[1])
        _exchange(rows[: sum(to)], got, self.shard, to, of)
        return got

    def home(self, rows: Tensor) -> Tensor:
        """What came of the rows that this rank got, back to where they came from: `[T, n]`, the sum for each token."""
        back = rows.new_empty(self.place.numel(), rows.shape[1])
        if self.counts is None:
            _exchange(rows, back, self.shard)
        else:
            to, of = self.counts.tolist()
            _exchange(rows, back[: sum(to)], self.shard, of, to)
        y: Tensor = self.rows.fwd(back, None, self.place, needs=(False, False))[0]
        return y


class Got(NamedTuple):
    """What `moe_experts` of this rank takes."""

    x: Tensor  # [R, H]
    topk_index: Tensor  # [R, k], int32, among the experts of this rank
    topk_weight: Tensor  # [R, k]


def _flat(t: Tensor) -> Tensor:
    """`t` by one axis: a view, if it is contiguous. (Which says nothing of an empty tensor's strides; `view` looks at them.)"""
    return t.contiguous().as_strided((t.numel(),), (1,))


def _bytes(t: Tensor) -> Tensor:
    """The memory of `t`, with its last axis that much longer."""
    return _flat(t).view(torch.uint8).view(*t.shape[:-1], t.shape[-1] * t.element_size())


def _of_bytes(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The opposite."""
    t = t.clone(memory_format=torch.contiguous_format)  # no view of a part: where that begins, the dtype may not
    return _flat(t).view(dtype).view(*t.shape[:-1], t.shape[-1] // dtype.itemsize)


def _gather(t: Tensor, shard: Shard) -> Tensor:
    """`t` of every rank, along a new first axis. Of bytes: no backend has to know the dtype."""
    return _of_bytes(shard.gather(_bytes(t)), t.dtype)


def _exchange(rows: Tensor, got: Tensor, shard: Shard, to: list[int] | None = None, of: list[int] | None = None) -> None:
    """Write what the other ranks send; without numbers of rows, as many from each. Of bytes, too."""
    dist.all_to_all_single(_bytes(got), _bytes(rows), of, to, group=shard.members)


def dispatch(
    op: str, x: Tensor, topk_index: Tensor, topk_weight: Tensor, experts: int, exchange: str, shard: Shard, needs: Needs, backend: Backend
) -> tuple[Way, Got]:  # fmt: skip
    """Send the tokens. x is `[T, H]`, the choices `[T, k]`; `experts` are those of this rank."""
    ranks, me, tokens = shard.classes // experts, shard.members.rank(), len(x)
    index = torch.where((topk_index >= 0) & (topk_index < shard.classes), topk_index, -1).to(torch.int32)
    choices = packed(index, topk_weight, experts)
    sums = moe_unpermute.pairs[backend]
    dtypes = FLOATS.index(x.dtype), FLOATS.index(topk_weight.dtype)
    wanted = needs[0], needs[3], any(needs)
    mine = experts, x.shape[1], index.shape[1], *dtypes, EXCHANGES.index(exchange), *map(int, wanted)
    if exchange == "all_gather":
        if x.device.type == "cpu":  # a GPU would be waited for
            agreed(op, shard, (*mine, tokens), index.new_zeros(ranks))
        place = torch.arange(ranks * tokens, device=x.device, dtype=torch.int32).view(ranks, tokens).T.contiguous()
        way = Way(shard, place, None, sums)
        rows, choices = way.out(x), way.out(choices)
    else:
        of = ranks_of(index, experts, ranks)
        rows, residuals = moe_permute.pairs[backend].fwd(x, of, ranks, True, needs=(False,))
        plan = parts(residuals.aux, of, ranks)
        every = agreed(op, shard, (*mine, 0), plan.counts)
        way = Way(shard, plan.place, torch.stack((every[me], every[:, me])), sums)
        rows, choices = way.give(rows), way.give(choices.index_select(0, plan.token))
    return way, Got(rows, *unpacked(choices, index.shape[1], topk_weight.dtype, experts, me * experts))


def ranks_of(index: Tensor, experts: int, ranks: int) -> Tensor:
    """The ranks that each token goes to, each once and in their order: `[T, min(k, ranks)]`, `ranks` where there is none."""
    to = torch.where(index >= 0, index // experts, ranks).sort(-1)[0]
    again = F.pad(to[:, 1:] == to[:, :-1], (1, 0))
    return to.masked_fill(again, ranks).sort(-1)[0][:, : min(to.shape[1], ranks)].contiguous()


def packed(index: Tensor, topk_weight: Tensor, experts: int) -> Tensor:
    """The choices of each token, and how many experts its rank has, as bytes: they travel together."""
    return torch.cat((_bytes(F.pad(index, (0, 1), value=experts)), _bytes(topk_weight)), 1)


def unpacked(choices: Tensor, k: int, dtype: torch.dtype, experts: int, first: int) -> tuple[Tensor, Tensor]:
    """topk_index among the experts from `first` on, and topk_weight, which is NaN where the sender has another number of experts."""
    at = 4 * k + 4
    index, weight = _of_bytes(choices[:, :at], torch.int32), _of_bytes(choices[:, at:], dtype)
    sound = index[:, k:] == experts
    return torch.where(sound, index[:, :k] - first, 0), torch.where(sound, weight, torch.nan)


def agreed(op: str, shard: Shard, mine: tuple[int, ...], counts: Tensor) -> Tensor:
    """The counts of all ranks, `[ranks, ranks]` on the CPU, by one gather; an error, on every rank, where they are not called alike."""
    header = counts.new_empty(len(counts) + len(mine), dtype=torch.int64)
    header[: len(counts)].copy_(counts)
    for i, number in enumerate(mine):
        header[len(counts) + i].fill_(number)
    every = shard.gather(header).cpu()
    for same, column in zip(SAME, every[:, len(counts) :].T, strict=True):
        if bool((column != column[0]).any()):
            got = [same.words[n] if same.words else n for n in column.tolist()]
            raise ValueError(f"{op}: all ranks must have the same {same.name}, got {got}, in the order of the ranks; {same.remedy}")
    return every[:, : len(counts)]


# --- the definition's weights -----------------------------------------------------------------------------------------------------------


class _Gathered(torch.autograd.Function):
    """A tensor of every rank, along a new first axis. Gradients of all ranks come home."""

    @staticmethod
    def forward(t: Tensor, shard: Shard) -> Tensor:
        return _gather(t, shard)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Shard], output: Tensor) -> None:
        ctx.shard = inputs[1]

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Any, None]:
        return _Summed.apply(d, ctx.shard), None


class _Summed(_Gathered):
    """The opposite: of a tensor for each rank that of this one, summed over all."""

    @staticmethod
    def forward(every: Tensor, shard: Shard) -> Tensor:
        got = torch.empty_like(every, memory_format=torch.contiguous_format)
        _exchange(every.flatten(1), got.flatten(1), shard)
        return got.sum(0)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Any, None]:
        return _Gathered.apply(d, ctx.shard), None


def whole(t: Tensor | None, shard: Shard) -> Tensor | None:
    """The experts of all ranks; a rank's own get the gradients of all."""
    if t is None or not shard.group:
        return t
    every: Any = _Gathered.apply(t, shard)
    return every.flatten(0, 1)
