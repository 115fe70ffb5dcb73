"""Cases of the router of a mixture of experts, and of its auxiliary losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .table import BF16, FP32, HALVES, Case, Inputs, Maker, Table

# --- moe_router -------------------------------------------------------------------------------------------------------------------------


def _router(*shape: int, bias: bool = False, scale: float = 2.0, shift: float = 0.0) -> Callable[[Maker], Inputs]:
    def make(m: Maker) -> Inputs:
        inputs: Inputs = {"logits": m.normal(*shape, scale=scale, shift=shift)}
        if bias:
            inputs["bias"] = m.normal(shape[-1], scale=0.2, dtype=FP32)
        return inputs

    return make


def _router_where(value: float, *shape: int) -> Callable[[Maker], Inputs]:
    """Every third logit at a special value."""

    def make(m: Maker) -> Inputs:
        return {"logits": m.normal(*shape).masked_fill(torch.arange(shape[-1], device=m.device) % 3 == 1, value)}

    return make


def _how(k: int, *, softmax: bool = True, **more: object) -> dict[str, object]:
    """Options of a call that returns what the contract judges: what has a derivative."""
    return {"k": k, "score": "softmax" if softmax else "sigmoid", **more}


FOUR_WAYS = {
    "softmax-normalized": {},
    "softmax": {"normalize": False, "scale": 2.5},
    "sigmoid-normalized": {"softmax": False, "scale": 2.5},
    "sigmoid": {"softmax": False, "normalize": False},
}

MOE_ROUTER = Table(
    op="moe_router",
    diff=("logits",),
    rows=("logits",),
    typical=Case("typical", _router(2, 5, 60, bias=True), _how(4, softmax=False, groups=(5, 3, "top2"), scale=2.5), draws=4),
    sized=lambda n: Case(f"{n}-rows", _router(n, 40, bias=True), _how(3, normalize=False)),
    cases=(
        *(Case(name, _router(7, 60), _how(4, **how), dtypes=HALVES, draws=8) for name, how in FOUR_WAYS.items()),  # type: ignore[arg-type]
        *(Case(f"{name}-bias", _router(7, 60, bias=True), _how(4, **how), draws=8) for name, how in FOUR_WAYS.items()),  # type: ignore[arg-type]
        Case("one-expert", _router(3, 1), _how(1), draws=4),
        Case("k-1", _router(9, 8), _how(1, softmax=False, normalize=False), draws=8),
        Case("k-all", _router(9, 13), _how(13), draws=8),
        Case("k-40", _router(3, 63), _how(40, softmax=False), draws=8),
        Case("1024-experts", _router(3, 1024), _how(16, normalize=False), draws=4),
        Case("groups-max", _router(7, 60), _how(4, groups=(5, 3, "max"), normalize=False), draws=8),
        Case("groups-of-1", _router(7, 6), _how(2, groups=(6, 3, "max")), draws=8),
        Case("groups-all-kept", _router(7, 60), _how(4, groups=(5, 5), softmax=False), draws=8),
        Case("vector", _router(60), _how(4), draws=16),
        Case("no-rows", _router(0, 60), _how(4)),
        Case("no-rows-3d", _router(3, 0, 8), _how(2)),
        Case("200x8", _router(200, 8), _how(2)),
    ),
    hostile=(
        *(Case(f"1e4-{name}", _router(5, 60, scale=1e4), _how(4, **how), dtypes=HALVES) for name, how in FOUR_WAYS.items()),  # type: ignore[arg-type]
        *(Case(f"zero-{name}", _router(5, 60, scale=0.0), _how(4, **how)) for name, how in FOUR_WAYS.items()),  # type: ignore[arg-type]
        *(Case(f"nan-{name}", _router_where(math.nan, 5, 60), _how(4, **how)) for name, how in FOUR_WAYS.items()),  # type: ignore[arg-type]
        *(Case(f"infinity-{name}", _router_where(math.inf, 5, 60), _how(4, **how)) for name, how in FOUR_WAYS.items()),  # type: ignore[arg-type]
        *(Case(f"minus-infinity-{name}", _router_where(-math.inf, 5, 60), _how(45, **how)) for name, how in FOUR_WAYS.items()),  # type: ignore[arg-type]
        Case("nan-groups", _router_where(math.nan, 5, 60), _how(4, groups=(5, 3), normalize=False)),
        Case("sums-that-underflow", _router(5, 60, shift=-500.0), _how(4, softmax=False), dtypes=HALVES, draws=8),
        Case("large-cotangent", _router(5, 60), _how(4), scale=1e4),
    ),
    launches=(
        Case("16384x8-mixtral", _router(16384, 8), _how(2)),
        Case("16384x128-qwen3", _router(16384, 128), _how(8)),
        Case("16384x60-qwen2", _router(16384, 60), _how(4, normalize=False)),
        Case("16384x160-deepseek-v2", _router(16384, 160), _how(6, groups=(8, 3, "max"), normalize=False, scale=16.0)),
        Case("16384x256-deepseek-v3", _router(16384, 256, bias=True), _how(8, groups=(8, 4), softmax=False, scale=2.5)),
        Case("16384x16-llama4", _router(16384, 16), _how(1, softmax=False, normalize=False)),
        Case("16384x64-ernie", _router(16384, 64, bias=True), _how(6)),
        Case("4096x1024", _router(4096, 1024), _how(16)),
    ),
    on_gpu=(
        Case("5000x128", _router(5000, 128), _how(8)),
        Case("5000x160", _router(5000, 160), _how(6, groups=(8, 3, "max"), normalize=False)),
        Case("5000x1000", _router(5000, 1000), _how(8, softmax=False)),
    ),
    large=Case("large", _router(2**31 // 1024 + 3, 1024), _how(2), dtypes=(BF16,)),
)


# --- moe_load_balancing_loss, moe_z_loss ------------------------------------------------------------------------------------------------


def _routed(*shape: int, k: int = 0, mask: int = 0, scale: float = 2.0, shift: float = 0.0) -> Callable[[Maker], Inputs]:
    """Logits, k choices of each token unless that is 0, and a mask of the last `mask` axes of the tokens unless that is 0."""

    def make(m: Maker) -> Inputs:
        inputs: Inputs = {"logits": m.normal(*shape, scale=scale, shift=shift)}
        if k:
            inputs["index"] = m.targets(*shape[:-1], k, classes=shape[-1], every=0)
        if mask:
            inputs["mask"] = m.targets(*shape[-1 - mask : -1], classes=3, every=0)
        return inputs

    return make


def _row_of(value: float, *shape: int, k: int = 0, mask: bool = False) -> Callable[[Maker], Inputs]:
    """The second token's logits at a special value; with a mask, of that one."""

    def make(m: Maker) -> Inputs:
        inputs = _routed(*shape, k=k)(m)
        inputs["logits"][1] = value  # type: ignore[index]
        if mask:
            inputs["mask"] = torch.arange(shape[0], device=m.device) != 1
        return inputs

    return make


def _all_masked(*shape: int, k: int = 0) -> Callable[[Maker], Inputs]:
    return lambda m: {**_routed(*shape, k=k)(m), "mask": torch.zeros(shape[0], dtype=torch.bool, device=m.device)}


def _last_two(n: int, e: int, k: int = 0) -> Callable[[Maker], Inputs]:
    """The last two tokens alone count: all others could be left out."""

    def make(m: Maker) -> Inputs:
        return {**_routed(n, e, k=k)(m), "mask": torch.arange(n, device=m.device) >= n - 2}

    return make


def _losses(k: int) -> tuple[tuple[Case, ...], tuple[Case, ...], tuple[Case, ...], tuple[Case, ...]]:
    """The cases of a loss, its hostile ones, its launches and those for a GPU."""
    return (
        (
            Case("1x8", _routed(1, 8, k=k), draws=16),
            Case("7x60", _routed(7, 60, k=k), dtypes=HALVES, draws=8),
            Case("one-expert", _routed(3, 1, k=k), draws=4),
            Case("vector", _routed(60, k=k), draws=16),
            Case("3d-mask", _routed(3, 5, 13, k=k, mask=2), draws=8),
            Case("layers-mask", _routed(3, 7, 60, k=k, mask=1), draws=8),
            Case("all-masked", _all_masked(5, 60, k=k)),
            Case("no-rows", _routed(0, 60, k=k)),
            Case("no-rows-mask", _routed(3, 0, 60, k=k, mask=1)),
            Case("1024-experts", _routed(37, 1024, k=k), draws=4),
            Case("600x8", _routed(600, 8, k=k), draws=4),
        ),
        (
            Case("1e4", _routed(5, 60, k=k, scale=1e4), dtypes=HALVES, draws=8),
            Case("shifted", _routed(5, 60, k=k, shift=3e4), dtypes=(FP32,), draws=8),
            Case("zero", _routed(5, 60, k=k, scale=0.0), draws=8),
            *(Case(f"row-of-{value}", _row_of(value, 5, 60, k=k)) for value in (math.nan, math.inf, -math.inf)),
            *(Case(f"masked-row-of-{value}", _row_of(value, 5, 60, k=k, mask=True), draws=8) for value in (math.nan, math.inf, -math.inf)),
            Case("large-cotangent", _routed(5, 60, k=k), scale=1e4, draws=8),
        ),
        (
            Case("16384x128", _routed(16384, 128, k=k)),
            Case("16384x60-mask", _routed(4, 4096, 60, k=k, mask=1)),
            Case("16384x8", _routed(16384, 8, k=k)),
            Case("4096x1024", _routed(4096, 1024, k=k)),
        ),
        (Case("20000x128", _routed(20000, 128, k=k, mask=1), draws=4), Case("5000x1000", _routed(5000, 1000, k=k), draws=4)),
    )


def _loss(op: str, k: int) -> Table:
    cases, hostile, launches, on_gpu = _losses(k)
    return Table(
        op=op,
        diff=("logits",),
        rows=("logits", "index", "mask") if k else ("logits", "mask"),
        typical=Case("typical", _routed(2, 5, 60, k=k, mask=1), draws=8),
        sized=lambda n: Case(f"{n}-rows", _routed(n, 40, k=k, mask=1)),
        cases=cases,
        hostile=hostile,
        launches=launches,
        on_gpu=on_gpu,
        large=Case("large", _last_two(2**31 // 1024 + 3, 1024, k), dtypes=(BF16,)),
    )


MOE_LOAD_BALANCING_LOSS = _loss("moe_load_balancing_loss", 2)
MOE_Z_LOSS = _loss("moe_z_loss", 0)
