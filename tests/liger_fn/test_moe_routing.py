"""Where each choice goes: the plain form against a loop over the choices, and the kernels against the plain form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import liger_fn
from liger_fn._moe_routing import BLOCK, Routing, Tiles, empty_routing, most_tiles, plain_route, plain_tiles, route, tiles_of
from tests.numerics import assert_same_bits

SHAPES = [(37, 5, 2), (1, 4, 1), (3 * BLOCK // 2 + 1, 3, 2), (9, 130, 4), (0, 3, 2), (5, 1, 3)]


def choices(t: int, e: int, k: int, device: torch.device, *, absent: bool = False, dtype: torch.dtype = torch.int64) -> Tensor:
    """Of choices every third is no expert, by each of four ways to say so."""
    draw = torch.Generator(device).manual_seed(t + e + k)
    index = torch.randint(e, (t, k), device=device, generator=draw, dtype=dtype)
    if absent:
        index.view(-1)[::3] = torch.tensor([-1, e, -(2**31), 2**31 - 1], device=device, dtype=dtype).repeat(t * k)[
            : len(index.view(-1)[::3])
        ]
    return index


def kernels(index: Tensor, experts: int, m: int) -> tuple[Routing, Tiles]:
    if liger_fn.backend(torch.empty(0, device=index.device)) == "reference":
        pytest.skip("needs Triton, or its interpreter")
    routing = empty_routing(index.numel(), experts, index.device)
    route(index, routing)
    return routing, tiles_of(routing, m)


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize(("t", "e", "k"), SHAPES)
def test_plain_is_a_loop(t: int, e: int, k: int, absent: bool, device: torch.device) -> None:
    index = choices(t, e, k, device, absent=absent)
    got = plain_route(index, e)
    slots = [[s for s, chosen in enumerate(index.view(-1).tolist()) if chosen == one] for one in range(e)]
    sizes, kept = [len(s) for s in slots], [s for one in slots for s in one]
    assert got.order.tolist()[: len(kept)] == kept
    assert sorted(got.order.tolist()) == list(range(t * k))
    assert got.token.tolist() == [s // k for s in got.order.tolist()]
    assert got.place.tolist() == [kept.index(s) if s in kept else -1 for s in range(t * k)]
    assert got.offsets.tolist() == [sum(sizes[:one]) for one in range(e + 1)]
    assert got.by_size.tolist() == sorted(range(e), key=lambda one: -sizes[one])
    for m in (1, 4, 64):
        tiles = [[one, sum(sizes[:one]) + at, min(m, n - at), 0] for one, n in enumerate(sizes) for at in range(0, n, m)]
        most = most_tiles(t * k, e, m)
        assert plain_tiles(got, m).at.tolist() == tiles + [[-1, 0, 0, 0]] * (most - len(tiles))


@pytest.mark.parametrize(("absent", "dtype"), [(False, torch.int64), (True, torch.int64), (True, torch.int32)])
@pytest.mark.parametrize(("t", "e", "k"), SHAPES)
def test_kernels_are_plain(t: int, e: int, k: int, absent: bool, dtype: torch.dtype, device: torch.device) -> None:
    index = choices(t, e, k, device, absent=absent, dtype=dtype)
    routing, tiles = kernels(index, e, 16)
    want = plain_route(index, e)
    assert_same_bits(routing, want, "routing")
    assert_same_bits([tiles.at, tiles_of(routing, 64).at], [plain_tiles(want, m).at for m in (16, 64)], "tiles")


def test_a_number_beyond_32_bits_is_no_expert(device: torch.device) -> None:
    index = torch.tensor([[2**32 + 1, 1], [-(2**32), 0]], device=device)
    want = torch.tensor([-1, 1, -1, 0], device=device, dtype=torch.int32)
    assert torch.equal(plain_route(index, 2).place, want)
    assert torch.equal(kernels(index, 2, 16)[0].place, want)


def test_most_tiles_is_enough_and_reached() -> None:
    for slots, experts, m in ((0, 3, 4), (1, 3, 4), (13, 3, 4), (64, 5, 16), (7, 30, 16)):
        one_each = min(experts - 1, slots)
        sizes = [1] * one_each + [slots - one_each]
        assert sum(-(-n // m) for n in sizes) <= most_tiles(slots, experts, m) <= slots
    assert most_tiles(13, 3, 4) == 6 >= sum(-(-n // 4) for n in (1, 1, 11))
