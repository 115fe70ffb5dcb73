r"""Experts of a mixture by kernels: how each product is cut, the launches, and the forward and backward made of them.

What is to be measured stands in one table: `cut` picks an entry by the rows that an expert has on average, which shapes tell. A token's
result depends on its own numbers and on the entry, and not on which tokens are with it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _launch
from ._check import dense
from ._launch import blocks, cdiv, copies_blocks, launch, next_power_of_2
from ._moe_gradients import _experts_bias_kernel, _experts_slope_kernel, _experts_sum_kernel, _experts_weight_kernel
from ._moe_products import (
    BY_COLUMN,
    BY_TERM,
    CODES,
    PACKINGS,
    _experts_act_kernel,
    _experts_rows_kernel,
    _experts_slopes_kernel,
    _experts_up_kernel,
)
from ._moe_routing import Routing, Tiles, tiles_of
from ._moe_rows import Grads, How


class Tile(NamedTuple):
    """How a product is cut: tiles of bm by bn, bk terms at a time; `group` tiles of rows are walked for each tile of columns."""

    bm: int
    bn: int  # in `up`, of gate and of up each
    bk: int
    stages: int
    warps: int
    group: int = 8
    blocks: bool = False  # operands come by descriptors, where the GPU and their layout allow it


class Cut(NamedTuple):
    """The tile of each product; those of the first four have one bm."""

    up: Tile
    rows: Tile
    down: Tile
    dx: Tile
    dgate_up: Tile
    ddown: Tile


CUTS = {  # by the rows of an expert, at least; fp32 apart, whose products take no tensor cores
    64: Cut(
        up=Tile(128, 128, 64, 4, 8, blocks=True),
        rows=Tile(128, 256, 64, 3, 8, group=2, blocks=True),
        down=Tile(128, 256, 64, 3, 8, group=4, blocks=True),
        dx=Tile(128, 256, 64, 3, 8, group=2, blocks=True),
        dgate_up=Tile(256, 128, 64, 5, 8, blocks=True),  # a loop that loads by indices of its own has half the stages
        ddown=Tile(128, 256, 64, 5, 8, blocks=True),
    ),
    0: Cut(Tile(16, 128, 64, 5, 4), *3 * [Tile(16, 128, 128, 3, 4)], *2 * [Tile(128, 128, 16, 2, 4)]),
}
FULL = Cut(*4 * [Tile(64, 32, 16, 2, 4)], *2 * [Tile(64, 64, 16, 3, 4)])
ACT_ROWS, ACT_COLUMNS = 4, 256
WIDE = 1024  # columns of an expert from which on tokens are copied for their places


def cut(slots: int, experts: int, dtype: torch.dtype) -> Cut:
    """How the products of `slots` rows of `experts` are cut."""
    return FULL if dtype is torch.float32 else next(c for least, c in CUTS.items() if slots >= least * experts)


@cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type in ("cpu", "meta"):
        return 227 * 1024 if _launch.NVIDIA else 64 * 1024
    return int(getattr(torch.get_device_module(device.type).get_device_properties(device), "shared_memory_per_block_optin", 64 * 1024))


def _meta(tile: Tile, t: Tensor, width: int, gathers: bool = False) -> dict[str, Any]:
    """The options of a product: no more stages than memory has room for operands, `width` columns wide."""
    room = _shared(t.device) // ((tile.bm + width) * tile.bk * t.element_size())
    return {
        "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "GROUP": tile.group,
        "num_warps": tile.warps, "num_stages": max(2, min(tile.stages, 2 * room - 1 if gathers else room)),
    }  # fmt: skip


def _how(how: How) -> dict[str, Any]:
    return {"ACT": CODES[how.activation], "PACKED": PACKINGS[how.packed if how.gated else None]}


def _even(n: int) -> bool:
    return n % 16 == 0


# --- products over rows -----------------------------------------------------------------------------------------------------------------


def _by_place(x: Tensor, routing: Routing, tile: Tile, inner: int) -> tuple[Tensor, Tensor | None]:
    """x, a row for each token, and the token of each place. Or a copy with a row for each place, whose blocks the GPU copies faster than it
    gathers rows: where experts are wide, that is worth it.
    """
    if tile.blocks and inner >= WIDE and x.shape[1] * x.element_size() % 16 == 0 and copies_blocks(x.device):
        return x.index_select(0, routing.token), None
    return x, routing.token


def _weight_blocks(w: Tensor, width: int, tile: Tile) -> tuple[Any, int | None]:
    """`w [E, N, K]`, or what gives blocks of it, `width` rows each; which way those lie."""
    if tile.blocks:
        if w.stride(2) == 1 and (found := blocks(w, [1, width, tile.bk])) is not None:
            return found, BY_COLUMN
        if w.stride(1) == 1 and (found := blocks(w.transpose(1, 2), [1, tile.bk, width])) is not None:
            return found, BY_TERM
    return w, None


def _row_blocks(a: Tensor, rows: int, columns: int, wanted: bool) -> tuple[Any, bool]:
    """`a`, or what gives blocks of it; whether it does."""
    found = blocks(a, [rows, columns]) if wanted else None
    return (a, False) if found is None else (found, True)


def _up(
    x: Tensor, gate_up: Tensor, bias: Tensor | None, gu: Tensor | None, h: Tensor | None, tiles: Tiles, how: How, tile: Tile,
    token: Tensor | None,
) -> None:  # fmt: skip
    """Write gu and h, each where it is given. With `token`, x has the rows of tokens."""
    halves = 2 if how.gated else 1
    terms, inner = x.shape[1], gate_up.shape[1] // halves
    x_any, a_blocks = _row_blocks(x, tile.bm, tile.bk, tile.blocks and token is None)
    w_any, w_blocks = _weight_blocks(gate_up, tile.bn * (2 if how.gated and how.packed == "interleaved" else 1), tile)
    launch(
        _experts_up_kernel, (len(tiles.at) * cdiv(inner, tile.bn),), x.device, x_any, w_any, bias, token, tiles.at, gu, h,
        terms, inner, x.stride(0), *gate_up.stride(), how.limited, how.alpha, **_how(how), A_BLOCKS=a_blocks, W_BLOCKS=w_blocks,
        EVEN=terms % tile.bk == 0, EVEN_N=_even(inner), **_meta(tile, x, tile.bn * halves),
    )  # fmt: skip


def _rows(a: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, tiles: Tiles, tile: Tile, token: Tensor | None = None) -> None:
    """Write `a [P, K]` times each row's expert of `w [E, N, K]`, transposed, and its bias. With `token`, `a` has the rows of tokens."""
    terms, columns = w.shape[2], w.shape[1]
    (a_any, a_blocks), (w_any, w_blocks) = _row_blocks(a, tile.bm, tile.bk, tile.blocks and token is None), _weight_blocks(w, tile.bn, tile)
    launch(
        _experts_rows_kernel, (len(tiles.at) * cdiv(columns, tile.bn),), a.device, a_any, w_any, bias, token, tiles.at, out,
        terms, columns, a.stride(0), *w.stride(), A_BLOCKS=a_blocks, W_BLOCKS=w_blocks, EVEN=terms % tile.bk == 0, EVEN_N=_even(columns),
        **_meta(tile, a, tile.bn),
    )  # fmt: skip


def _act(gu: Tensor, topk_weight: Tensor | None, h: Tensor, routing: Routing, how: How) -> None:
    """Write h, times w where it is given."""
    (slots, inner), bn = h.shape, min(ACT_COLUMNS, next_power_of_2(h.shape[1]))
    launch(
        _experts_act_kernel, (cdiv(slots, ACT_ROWS) * cdiv(inner, bn),), h.device, gu, topk_weight, routing.order, routing.offsets, h,
        len(routing.by_size), inner, how.limited, how.alpha, **_how(how), BM=ACT_ROWS, BN=bn, num_warps=4,
    )  # fmt: skip


def _down(
    dy: Tensor, gu: Tensor, down: Tensor, topk_weight: Tensor, routing: Routing, tiles: Tiles, how: How, tile: Tile, token: Tensor | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dgu, w h, the parts of dw), each where it is wanted."""
    slots, inner = len(gu), down.shape[2]
    bn = min(ACT_COLUMNS, next_power_of_2(inner))
    # Of fp16 in fp32: before w multiplies it, it may be beyond the range. Else w h takes its place.
    narrow = gu.dtype is torch.float16
    dh = gu.new_empty(slots, inner, dtype=torch.float32 if narrow else gu.dtype)
    wh = None if not wanted[1] else gu.new_empty(slots, inner) if narrow else dh
    _rows(dy, down.transpose(1, 2), None, dh, tiles, tile, token)
    dgu = dense(gu) if wanted[0] else None
    parts = gu.new_empty(slots, cdiv(inner, bn), dtype=torch.float32) if wanted[2] else None
    launch(
        _experts_slopes_kernel, (cdiv(slots, ACT_ROWS) * cdiv(inner, bn),), dy.device, dh, topk_weight, routing.order, routing.offsets,
        gu, dgu, wh, parts, len(routing.by_size), inner, how.limited, how.alpha, **_how(how), BM=ACT_ROWS, BN=bn, num_warps=4,
    )  # fmt: skip
    return dgu, wh, parts


# --- sums -------------------------------------------------------------------------------------------------------------------------------


def token_sums(rows: Tensor, place: Tensor, topk_weight: Tensor | None, k: int, out: Tensor) -> None:
    """Write of each token's rows the sum, weighted where weights are given."""
    h = rows.shape[1]
    block = min(1024, next_power_of_2(h))
    launch(
        _experts_sum_kernel, (len(place) // k * cdiv(h, block),), rows.device, rows, place, topk_weight, out, h,
        K=k, BLOCK=block, num_warps=max(1, block // 256),
    )  # fmt: skip


def _weight_slopes(parts: Tensor, dy: Tensor, topk_index: Tensor, down_bias: Tensor | None, routing: Routing, out: Tensor) -> None:
    """Write dw."""
    slots, width = parts.shape
    launch(
        _experts_slope_kernel, (cdiv(slots, 16),), dy.device, parts, routing.place, dy, topk_index, down_bias, out, slots, width,
        dy.shape[1], dy.stride(0), topk_index.shape[1], R=16, BLOCK=next_power_of_2(width), BLOCK_H=128, num_warps=4,
    )  # fmt: skip


def _weight(
    a: Tensor, b: Tensor, out: Tensor, routing: Routing, tile: Tile, a_token: Tensor | None = None, b_token: Tensor | None = None
) -> None:
    """Write Σ_p a_pᵀ b_p for each expert; of what has a `token`, the rows are those of tokens."""
    experts, m, n = out.shape
    a_any, a_blocks = _row_blocks(a, tile.bk, tile.bm, tile.blocks and a_token is None)
    b_any, b_blocks = _row_blocks(b, tile.bk, tile.bn, tile.blocks and b_token is None)
    gathers = a_token is not None or b_token is not None
    launch(
        _experts_weight_kernel, (experts * cdiv(m, tile.bm) * cdiv(n, tile.bn),), a.device, a_any, b_any, a_token, b_token, routing.offsets,
        routing.by_size, out, m, n, a.stride(0), b.stride(0), *out.stride(), A_BLOCKS=a_blocks, B_BLOCKS=b_blocks, EVEN_M=_even(m),
        EVEN_N=_even(n), **_meta(tile, a, tile.bn, gathers=gathers),
    )  # fmt: skip


def _bias(a: Tensor, out: Tensor, routing: Routing, topk_weight: Tensor | None) -> None:
    """Write Σ_p a_p for each expert; of tokens' rows, weighted, where weights are given."""
    experts, n = out.shape
    launch(
        _experts_bias_kernel, (experts * cdiv(n, 128),), a.device, a, routing.token, routing.order, topk_weight, routing.offsets,
        routing.by_size, out, n, a.stride(0), GATHER=topk_weight is not None, R=32, BLOCK=128, num_warps=4,
    )  # fmt: skip


# --- forward and backward ---------------------------------------------------------------------------------------------------------------


def _cut_of(routing: Routing, x: Tensor) -> Cut:
    return cut(len(routing.order), len(routing.by_size), x.dtype)


def forward(
    x: Tensor, gate_up: Tensor, down: Tensor, topk_weight: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    gu: Tensor | None, y: Tensor, routing: Routing, how: How,
) -> None:  # fmt: skip
    """Write y, and gu where it is given. x is `[T, H]` with unit stride in its rows; topk_weight, biases and outputs are contiguous."""
    c = _cut_of(routing, x)
    tiles, slots, inner = tiles_of(routing, c.up.bm), len(routing.order), down.shape[2]
    h = x.new_empty(slots, inner)
    xs, token = _by_place(x, routing, c.up, inner)
    _up(xs, gate_up, gate_up_bias, gu, h, tiles, how, c.up, token)
    del xs
    rows = x.new_empty(slots, x.shape[1])
    _rows(h, down, down_bias, rows, tiles, c.rows)
    token_sums(rows, routing.place, topk_weight, topk_weight.shape[-1], y)


def backward(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, topk_weight: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    topk_index: Tensor, gu: Tensor | None, routing: Routing, how: How, grads: Grads,
) -> None:  # fmt: skip
    """Write those of `grads` that are given. dy and x have unit stride in their rows; gu is made again where it is None."""
    dx, dgate_up, ddown, dtopk, dgate_up_bias, ddown_bias = grads
    c, wide = _cut_of(routing, x), down.shape[2]
    if ddown_bias is not None:
        _bias(dy, ddown_bias, routing, topk_weight)
    inner = any(g is not None for g in (dx, dgate_up, dgate_up_bias))
    if not inner and ddown is None and dtopk is None:
        return
    tiles = tiles_of(routing, c.up.bm)
    xs, token = _by_place(x, routing, c.up, wide) if gu is None or dgate_up is not None else (x, routing.token)
    if gu is None:
        gu = x.new_empty(len(routing.order), gate_up.shape[1])
        _up(xs, gate_up, gate_up_bias, gu, None, tiles, how, c.up, token)
    ds, dy_token = _by_place(dy, routing, c.down, wide)
    dgu, parts = None, None
    if inner or dtopk is not None:
        wanted = inner, ddown is not None, dtopk is not None
        dgu, wh, parts = _down(ds, gu, down, topk_weight, routing, tiles, how, c.down, dy_token, wanted)
    else:
        wh = x.new_empty(len(gu), wide)
        _act(gu, topk_weight, wh, routing, how)
    if parts is not None and dtopk is not None:
        _weight_slopes(parts, dy, topk_index, down_bias, routing, dtopk)
    if wh is not None and ddown is not None:
        _weight(ds, wh, ddown, routing, c.ddown, a_token=dy_token)
    del ds, wh
    if dgu is None:
        return
    if dgate_up is not None:
        _weight(dgu, xs, dgate_up, routing, c.ddown if token is None else c.dgate_up, b_token=token)
    del xs
    if dgate_up_bias is not None:
        _bias(dgu, dgate_up_bias, routing, None)
    if dx is not None:
        rows = x.new_empty(len(routing.order), x.shape[1])
        _rows(dgu, gate_up.transpose(1, 2), None, rows, tiles, c.dx)
        token_sums(rows, routing.place, None, topk_weight.shape[-1], dx)
