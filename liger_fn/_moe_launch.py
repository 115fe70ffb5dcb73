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
from ._launch import cdiv, launch, next_power_of_2
from ._moe_gradients import _experts_bias_kernel, _experts_slope_kernel, _experts_sum_kernel, _experts_weight_kernel
from ._moe_products import (
    CODES,
    PACKINGS,
    _experts_act_kernel,
    _experts_down_kernel,
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


class Cut(NamedTuple):
    """The tile of each product; those of the first four have one bm."""

    up: Tile
    rows: Tile
    down: Tile
    dx: Tile
    weight: Tile
    apart: bool = False  # activations in passes of their own, between plain products


def _alike(tile: Tile, weight: Tile) -> Cut:
    """One tile for all products over rows."""
    return Cut(tile, tile, tile, tile, weight)


CUTS = {  # by the rows of an expert, at least; fp32 apart, whose products take no tensor cores
    64: Cut(
        up=Tile(128, 128, 64, 3, 8),
        rows=Tile(128, 256, 64, 3, 8),
        down=Tile(128, 128, 64, 3, 8),
        dx=Tile(128, 256, 64, 3, 8),
        weight=Tile(128, 256, 64, 5, 8),  # a loop that loads by indices of its own has half the stages
    ),
    0: _alike(Tile(16, 64, 128, 4, 4), weight=Tile(64, 64, 64, 5, 4)),
}
FULL = _alike(Tile(64, 32, 32, 2, 4), weight=Tile(64, 64, 32, 3, 4))
ACT_ROWS, ACT_COLUMNS = 8, 256


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
    """The options of a product: as many stages of its operands, `width` columns wide, as memory has room for."""
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


def _up(
    x: Tensor, gate_up: Tensor, bias: Tensor | None, gu: Tensor | None, h: Tensor | None, routing: Routing, tiles: Tiles, how: How, c: Cut
) -> None:  # fmt: skip
    """Write gu and h, each where it is given."""
    if c.apart:
        gu = x.new_empty(len(routing.order), gate_up.shape[1]) if gu is None else gu
        _rows(x, gate_up, bias, gu, tiles, c.up, routing.token)
        if h is not None:
            _act(gu, None, h, routing, how)
        return
    terms, inner = x.shape[1], gate_up.shape[1] // (2 if how.gated else 1)
    launch(
        _experts_up_kernel, (len(tiles.at) * cdiv(inner, c.up.bn),), x.device, x, gate_up, bias, routing.token, tiles.at, gu, h,
        terms, inner, x.stride(0), *gate_up.stride(), how.limited, how.alpha, **_how(how), EVEN=terms % c.up.bk == 0, EVEN_N=_even(inner),
        **_meta(c.up, x, c.up.bn * (2 if how.gated else 1)),
    )  # fmt: skip


def _rows(a: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, tiles: Tiles, tile: Tile, token: Tensor | None = None) -> None:
    """Write `a [P, K]` times each row's expert of `w [E, N, K]`, transposed, and its bias. With `token`, `a` has the rows of tokens."""
    terms, columns = w.shape[2], w.shape[1]
    launch(
        _experts_rows_kernel, (len(tiles.at) * cdiv(columns, tile.bn),), a.device, a, w, bias, token, tiles.at, out,
        terms, columns, a.stride(0), *w.stride(), EVEN=terms % tile.bk == 0, EVEN_N=_even(columns), **_meta(tile, a, tile.bn),
    )  # fmt: skip


def _act(gu: Tensor, topk_weight: Tensor | None, h: Tensor, routing: Routing, how: How) -> None:
    """Write h, times w where it is given."""
    (slots, inner), bn = h.shape, min(ACT_COLUMNS, next_power_of_2(h.shape[1]))
    launch(
        _experts_act_kernel, (cdiv(slots, ACT_ROWS) * cdiv(inner, bn),), h.device, gu, topk_weight, routing.order, routing.offsets, h,
        len(routing.by_size), inner, how.limited, how.alpha, **_how(how), BM=ACT_ROWS, BN=bn, num_warps=4,
    )  # fmt: skip


def _down(
    dy: Tensor, gu: Tensor, down: Tensor, topk_weight: Tensor, routing: Routing, tiles: Tiles, how: How, c: Cut, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dgu, w h, the parts of dw), each where it is wanted."""
    (slots, inner), w = (len(gu), down.shape[2]), down.transpose(1, 2)
    bn = min(ACT_COLUMNS, next_power_of_2(inner)) if c.apart else c.down.bn
    dgu, wh = dense(gu) if wanted[0] else None, gu.new_empty(slots, inner) if wanted[1] else None
    parts = gu.new_empty(slots, cdiv(inner, bn), dtype=torch.float32) if wanted[2] else None
    if c.apart:
        dh = gu.new_empty(slots, inner, dtype=torch.float32)  # dw is a sum over it, that plain PyTorch rounds once
        _rows(dy, w, None, dh, tiles, c.down, routing.token)
        launch(
            _experts_slopes_kernel, (cdiv(slots, ACT_ROWS) * cdiv(inner, bn),), dy.device, dh, topk_weight, routing.order, routing.offsets,
            gu, dgu, wh, parts, len(routing.by_size), inner, how.limited, how.alpha, **_how(how), BM=ACT_ROWS, BN=bn, num_warps=4,
        )  # fmt: skip
        return dgu, wh, parts
    launch(
        _experts_down_kernel, (len(tiles.at) * cdiv(inner, bn),), dy.device, dy, w, topk_weight, routing.order, routing.token, tiles.at,
        gu, dgu, wh, parts, w.shape[2], inner, dy.stride(0), *w.stride(), how.limited, how.alpha, **_how(how),
        EVEN=w.shape[2] % c.down.bk == 0, EVEN_N=_even(inner), **_meta(c.down, dy, bn),
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


def _weight(a: Tensor, b: Tensor, out: Tensor, routing: Routing, tile: Tile, gather_a: bool) -> None:
    """Write Σ_p a_pᵀ b_p for each expert; of a or else of b the rows are those of tokens."""
    experts, m, n = out.shape
    launch(
        _experts_weight_kernel, (experts * cdiv(m, tile.bm) * cdiv(n, tile.bn),), a.device, a, b, routing.token, routing.offsets,
        routing.by_size, out, m, n, a.stride(0), b.stride(0), *out.stride(), GATHER_A=gather_a, GATHER_B=not gather_a, EVEN_M=_even(m),
        EVEN_N=_even(n), **_meta(tile, a, tile.bn, gathers=True),
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
    tiles, slots = tiles_of(routing, c.up.bm), len(routing.order)
    h = x.new_empty(slots, down.shape[2])
    _up(x, gate_up, gate_up_bias, gu, h, routing, tiles, how, c)
    rows = x.new_empty(slots, x.shape[1])
    _rows(h, down, down_bias, rows, tiles, c.rows)
    token_sums(rows, routing.place, topk_weight, topk_weight.shape[-1], y)


def backward(
    dy: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, topk_weight: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    topk_index: Tensor, gu: Tensor | None, routing: Routing, how: How, grads: Grads,
) -> None:  # fmt: skip
    """Write those of `grads` that are given. dy and x have unit stride in their rows; gu is made again where it is None."""
    dx, dgate_up, ddown, dtopk, dgate_up_bias, ddown_bias = grads
    c = _cut_of(routing, x)
    if ddown_bias is not None:
        _bias(dy, ddown_bias, routing, topk_weight)
    inner = any(g is not None for g in (dx, dgate_up, dgate_up_bias))
    if not inner and ddown is None and dtopk is None:
        return
    tiles = tiles_of(routing, c.up.bm)
    if gu is None:
        gu = x.new_empty(len(routing.order), gate_up.shape[1])
        _up(x, gate_up, gate_up_bias, gu, None, routing, tiles, how, c)
    dgu, parts = None, None
    if inner or dtopk is not None:
        dgu, wh, parts = _down(dy, gu, down, topk_weight, routing, tiles, how, c, (inner, ddown is not None, dtopk is not None))
    else:
        wh = x.new_empty(len(gu), down.shape[2])
        _act(gu, topk_weight, wh, routing, how)
    if parts is not None and dtopk is not None:
        _weight_slopes(parts, dy, topk_index, down_bias, routing, dtopk)
    if wh is not None and ddown is not None:
        _weight(dy, wh, ddown, routing, c.weight, gather_a=True)
    if dgu is None:
        return
    if dgate_up is not None:
        _weight(dgu, x, dgate_up, routing, c.weight, gather_a=False)
    if dgate_up_bias is not None:
        _bias(dgu, dgate_up_bias, routing, None)
    if dx is not None:
        rows = x.new_empty(len(routing.order), x.shape[1])
        _rows(dgu, gate_up.transpose(1, 2), None, rows, tiles, c.dx)
        token_sums(rows, routing.place, None, topk_weight.shape[-1], dx)
