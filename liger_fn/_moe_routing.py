r"""From the experts that tokens chose to rows sorted by expert, without the host ever waiting for the device.

A slot is one choice of one token, s = t k + j. Sorted by expert, and by slot within one, slots have places 0 … T k − 1. Rows of expert e
are places `offsets[e]` to `offsets[e + 1]`. A choice that is no expert (expert parallelism marks absent ones so) comes last, without a
place.

A product over sorted rows is cut into tiles of at most m rows of one expert each. How many there are only the device knows, but there are
never more than `most_tiles`: that many programs are launched, and those without a tile stop at once.

In kernels: each block of slots counts its experts; running sums over experts and blocks are the first place of each expert in each block;
a slot's place is that plus its rank among those of its block that chose alike. Nothing is atomic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import cdiv, jit, launch, next_power_of_2, tl

LIMIT = 2**31 - 2**16  # of slots: their numbers, and those of the last program's, are int32
BLOCK = 128  # slots that one program ranks, each against each


class Routing(NamedTuple):
    """Where each slot goes, all int32."""

    order: Tensor  # [T k]: the slot at each place
    token: Tensor  # [T k]: the token of that slot
    place: Tensor  # [T k]: the place of each slot, -1 where its choice is no expert
    offsets: Tensor  # [E + 1]: the first place of each expert, and the end of the last
    by_size: Tensor  # [E]: the experts, those with most rows first


class Tiles(NamedTuple):
    """The rows of all experts in tiles of at most m."""

    at: Tensor  # [most_tiles, 4], int32: expert, first place, rows, 0; expert -1 where there is no tile
    m: int


def countable(op: str, topk_index: Tensor) -> None:
    """The slots must have int32 numbers."""
    if topk_index.numel() >= LIMIT:
        raise ValueError(
            f"{op}: topk_index must have fewer than 2^31 - 2^16 elements, got {list(topk_index.shape)}; split the tokens into several calls"
        )


def empty_routing(slots: int, experts: int, device: torch.device) -> Routing:
    """Memory for the routing of `slots` to `experts`."""
    return Routing(*(torch.empty(n, device=device, dtype=torch.int32) for n in (slots, slots, slots, experts + 1, experts)))


def most_tiles(slots: int, experts: int, m: int) -> int:
    """No routing of `slots` to `experts` has more tiles of `m` rows."""
    return min(slots // m + experts, slots)


# --- plain PyTorch ----------------------------------------------------------------------------------------------------------------------


def plain_route(topk_index: Tensor, experts: int) -> Routing:
    """The routing. `topk_index` is `[T, k]`, of any integer dtype."""
    slots, k = topk_index.numel(), topk_index.shape[1]
    e = topk_index.reshape(-1)
    e = torch.where((e >= 0) & (e < experts), e, experts).to(torch.int32)
    e, order = torch.sort(e, stable=True)
    at = torch.arange(slots, device=e.device, dtype=torch.int32)
    place = torch.empty_like(at).scatter_(0, order, torch.where(e < experts, at, -1))
    offsets = torch.searchsorted(e, torch.arange(experts + 1, device=e.device, dtype=torch.int32), out_int32=True)
    by_size = torch.sort(offsets.diff(), descending=True, stable=True)[1]
    return Routing(order.to(torch.int32), (order // k).to(torch.int32), place, offsets, by_size.to(torch.int32))


def plain_tiles(routing: Routing, m: int) -> Tiles:
    """Its tiles of at most `m` rows."""
    slots, offsets = routing.order.numel(), routing.offsets
    each = (offsets.diff() + (m - 1)) // m
    ends = torch.cumsum(each, 0, dtype=torch.int32)
    tile = torch.arange(most_tiles(slots, len(ends), m), device=offsets.device, dtype=torch.int32)
    e = torch.searchsorted(ends, tile, right=True)
    none = (e == len(ends)).unsqueeze(1)
    e = e.clamp(max=len(ends) - 1)
    first = offsets[e] + (tile - (ends - each)[e]) * m
    at = torch.stack((e.to(torch.int32), first, (offsets[e + 1] - first).clamp(max=m), torch.zeros_like(first)), 1)
    return Tiles(torch.where(none, -(torch.arange(4, device=at.device, dtype=at.dtype) == 0).to(at.dtype), at), m)


# --- kernels ----------------------------------------------------------------------------------------------------------------------------


@jit
def _expert_of(index_ptr, slot, N, E):
    """The expert of each slot; E where that is none, E + 1 beyond the last slot."""
    e = tl.load(index_ptr + slot, mask=slot < N, other=0)
    e = tl.where((e >= 0) & (e < E), e, E).to(tl.int32)
    return tl.where(slot < N, e, E + 1)


@jit
def _route_counts_kernel(index_ptr, counts_ptr, N, blocks, E, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """How many slots of each block chose each expert: [E + 1, blocks]."""
    block = tl.program_id(0)
    counts = tl.histogram(_expert_of(index_ptr, block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK), N, E), BINS)
    bins = tl.arange(0, BINS)
    tl.store(counts_ptr + bins.to(tl.int64) * blocks + block, counts, mask=bins <= E)


@jit
def _route_places_kernel(
    index_ptr, counts_ptr, sums_ptr, order_ptr, token_ptr, place_ptr, offsets_ptr, N, blocks, E, K, BLOCK: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    """`sums` are the running sums of `counts`."""
    block = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    slot = block.to(tl.int64) * BLOCK + at
    inside = slot < N
    e = _expert_of(index_ptr, slot, N, E)
    rank = tl.sum(((e[:, None] == e[None, :]) & (at[:, None] > at[None, :])).to(tl.int32), 1)
    cell = e.to(tl.int64) * blocks + block
    place = rank + tl.load(sums_ptr + cell, mask=inside, other=0) - tl.load(counts_ptr + cell, mask=inside, other=0)
    tl.store(order_ptr + place, slot.to(tl.int32), mask=inside)
    tl.store(token_ptr + place, (slot // K).to(tl.int32), mask=inside)
    tl.store(place_ptr + slot, tl.where(e < E, place, -1), mask=inside)
    if block == 0:
        bins = tl.arange(0, BINS)
        start = bins.to(tl.int64) * blocks  # not `cell`, whose shape is another
        first = tl.load(sums_ptr + start, mask=bins <= E, other=0) - tl.load(counts_ptr + start, mask=bins <= E, other=0)
        tl.store(offsets_ptr + bins, first, mask=bins <= E)


@jit
def _route_sizes_kernel(offsets_ptr, by_size_ptr, E, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """The rank by size of BLOCK experts; of equal ones the lower number first."""
    other, mine = tl.arange(0, BINS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(offsets_ptr + other + 1, mask=other < E, other=0) - tl.load(offsets_ptr + other, mask=other < E, other=0)
    own = tl.load(offsets_ptr + mine + 1, mask=mine < E, other=0) - tl.load(offsets_ptr + mine, mask=mine < E, other=0)
    more = (rows[None, :] > own[:, None]) | ((rows[None, :] == own[:, None]) & (other[None, :] < mine[:, None]))
    rank = tl.sum((more & (other < E)[None, :]).to(tl.int32), 1)
    tl.store(by_size_ptr + rank, mine, mask=mine < E)


@jit
def _route_tiles_kernel(offsets_ptr, tile_ptr, parts, E, M: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK of the `parts` tiles: a tile's expert is the number of those whose tiles all come before it."""
    tile, e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BINS)
    rows = tl.load(offsets_ptr + e + 1, mask=e < E, other=0) - tl.load(offsets_ptr + e, mask=e < E, other=0)
    tiles = (rows + (M - 1)) // M
    before = (tl.cumsum(tiles, 0)[None, :] <= tile[:, None]) & (e < E)[None, :]
    mine = tl.sum(before.to(tl.int32), 1)
    done = (tile - tl.sum(tl.where(before, tiles[None, :], 0), 1)) * M
    some = (tile < parts) & (mine < E)
    begin = tl.load(offsets_ptr + mine, mask=some, other=0)
    left = tl.minimum(tl.load(offsets_ptr + mine + 1, mask=some, other=0) - begin - done, M)
    field = tl.arange(0, 4)[None, :]
    what = tl.where(field == 0, mine[:, None], tl.where(field == 1, (begin + done)[:, None], tl.where(field == 2, left[:, None], 0)))
    what = tl.where(some[:, None], what, tl.where(field == 0, -1, 0))
    tl.store(tile_ptr + tile.to(tl.int64)[:, None] * 4 + field, what, mask=(tile < parts)[:, None])


# --- launches ---------------------------------------------------------------------------------------------------------------------------


def route(topk_index: Tensor, routing: Routing) -> None:
    """Write the routing. `topk_index` is `[T, k]`, contiguous, int64 or int32."""
    slots, experts, device = topk_index.numel(), len(routing.by_size), topk_index.device
    blocks, bins = cdiv(slots, BLOCK), max(16, next_power_of_2(experts + 2))
    if slots == 0:
        routing.offsets.zero_()
    counts = torch.empty((experts + 1) * blocks, device=device, dtype=torch.int32)
    meta = {"BLOCK": BLOCK, "BINS": bins, "num_warps": 4}
    launch(_route_counts_kernel, (blocks,), device, topk_index, counts, slots, blocks, experts, **meta)
    sums = torch.cumsum(counts, 0, dtype=torch.int32)
    launch(
        _route_places_kernel, (blocks,), device, topk_index, counts, sums, *routing[:4], slots, blocks, experts, topk_index.shape[1], **meta
    )
    launch(_route_sizes_kernel, (cdiv(experts, 16),), device, *routing[3:], experts, BINS=bins, BLOCK=16, num_warps=4)


def tiles_of(routing: Routing, m: int) -> Tiles:
    """The tiles of at most `m` rows."""
    slots, experts, device = len(routing.order), len(routing.by_size), routing.order.device
    parts = most_tiles(slots, experts, m)
    at = torch.empty(parts, 4, device=device, dtype=torch.int32)
    meta = {"M": m, "BINS": max(16, next_power_of_2(experts + 1)), "BLOCK": 16, "num_warps": 4}
    launch(_route_tiles_kernel, (cdiv(parts, 16),), device, routing.offsets, at, parts, experts, **meta)
    return Tiles(at, m)
