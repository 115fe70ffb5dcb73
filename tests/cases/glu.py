"""Cases of the gated linear units."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .table import BF16, HALVES, Case, Inputs, Maker, Table

Make = Callable[[Maker], Inputs]
FALCON_H1 = {"gate_multiplier": 0.7, "up_multiplier": -1.3}

# --- swiglu, geglu, reglu ---------------------------------------------------------------------------------------------------------------


def _two(*shape: int, scale: float = 1.0) -> Make:
    return lambda m: {"gate": m.normal(*shape, scale=scale), "up": m.normal(*shape)}


def _two_of(value: float, *shape: int) -> Make:
    return lambda m: {"gate": m.full(*shape, value=value), "up": m.normal(*shape)}


def _packed(*shape: int, scale: float = 1.0) -> Make:
    return lambda m: {"gate_up": m.normal(*shape[:-1], 2 * shape[-1], scale=scale)}


def _packed_of(value: float, *shape: int) -> Make:
    return lambda m: {"gate_up": m.full(*shape[:-1], 2 * shape[-1], value=value)}


def _one(*shape: int, scale: float = 1.0) -> Make:
    return lambda m: {"x": m.normal(*shape, scale=scale)}


def _one_of(value: float, *shape: int) -> Make:
    return lambda m: {"x": m.full(*shape, value=value)}


def _table(op: str, diff: tuple[str, ...], of: Callable[..., Make], like: Callable[..., Make], *options: dict[str, Any]) -> Table:
    """The cases that all of the family have; `options` are what the op is called with besides, one after another."""
    return Table(
        op=op,
        diff=diff,
        rows=diff,
        typical=Case("typical", of(2, 5, 63)),
        sized=lambda n: Case(f"{n}-rows", of(n, 3, 40)),
        cases=(
            Case("1x1", of(1, 1), draws=32),
            Case("1x63", of(1, 63), draws=4, dtypes=HALVES),
            Case("7x1000", of(7, 1000), dtypes=HALVES),
            Case("3x5000", of(3, 5000)),
            Case("vector", of(63), draws=4),
            Case("no-rows", of(0, 63)),
            Case("no-columns", of(3, 0)),
            Case("64x128", of(64, 128)),
            *(Case("-".join(map(str, o.values())), of(7, 500), o, dtypes=HALVES) for o in options),
        ),
        hostile=(
            Case("1e20", like(1e20, 3, 63)),  # the square is beyond fp32
            Case("minus-1e20", like(-1e20, 3, 63)),
            *(
                Case("-".join(map(str, (name, *o.values()))), make, o, dtypes=HALVES, scale=scale)
                for o in ({}, *options)
                for name, make, scale in (
                    ("1e4", of(3, 63, scale=1e4), 1.0),
                    ("1e-4", of(3, 63, scale=1e-4), 1.0),
                    ("zero", like(0.0, 3, 63), 1.0),
                    ("minus-200", like(-200.0, 3, 63), 1.0),  # exp(200) is beyond fp32
                    ("nan", like(math.nan, 3, 63), 1.0),
                    ("inf", like(math.inf, 3, 63), 1.0),
                    ("minus-inf", like(-math.inf, 3, 63), 1.0),
                    ("large-cotangent", of(3, 63), 1e4),
                )
                if (name, o) != ("inf", {"approximate": "none"})  # torch's own F.gelu(inf) is NaN on a CPU, but in fp64
            ),
        ),
        launches=(Case("8192x14336", of(8192, 14336)), Case("16384x8192", of(16384, 8192))),
        on_gpu=(Case("1000x14336", of(1000, 14336)), Case("3x1000x5000", of(3, 1000, 5000))),
        large=Case("large", of(2**31 // 8192 + 3, 8192), dtypes=(BF16,)),
    )


SWIGLU = _table("swiglu", ("gate", "up"), _two, _two_of, FALCON_H1)
GEGLU = _table("geglu", ("gate", "up"), _two, _two_of, {"approximate": "none"}, FALCON_H1)
REGLU = _table("reglu", ("gate", "up"), _two, _two_of, FALCON_H1)

# --- packed, and without a gate ---------------------------------------------------------------------------------------------------------

SWIGLU_PACKED = _table("swiglu_packed", ("gate_up",), _packed, _packed_of, FALCON_H1)
GEGLU_PACKED = _table("geglu_packed", ("gate_up",), _packed, _packed_of, {"approximate": "none"})
RELU_SQUARED = _table("relu_squared", ("x",), _one, _one_of)

# --- swiglu_mlp -------------------------------------------------------------------------------------------------------------------------


def _mlp(*shape: int, inner: int, out: int | None = None, scale: float = 1.0) -> Make:
    h = shape[-1]

    def make(m: Maker) -> Inputs:
        by = max(h, 1) ** -0.5
        return {
            "x": m.normal(*shape, scale=scale),
            "w_gate": m.normal(inner, h, scale=by),
            "w_up": m.normal(inner, h, scale=by),
            "w_down": m.normal(h if out is None else out, inner, scale=max(inner, 1) ** -0.5),
        }

    return make


SWIGLU_MLP = Table(
    op="swiglu_mlp",
    diff=("x", "w_gate", "w_up", "w_down"),
    rows=("x",),
    typical=Case("typical", _mlp(2, 5, 24, inner=63)),
    sized=lambda n: Case(f"{n}-rows", _mlp(n, 3, 20, inner=40)),
    cases=(
        Case("1x1", _mlp(1, 1, inner=1), draws=32),
        Case("7x63", _mlp(7, 63, inner=1000), dtypes=HALVES, draws=2),
        Case("out", _mlp(7, 24, inner=40, out=9), draws=4),
        Case("vector", _mlp(63, inner=20), draws=4),
        Case("no-rows", _mlp(0, 24, inner=40)),
        Case("64x128", _mlp(64, 128, inner=96)),
        Case("multipliers", _mlp(7, 24, inner=40), FALCON_H1, dtypes=HALVES, draws=4),
    ),
    hostile=(
        Case("1e2", _mlp(3, 24, inner=63, scale=1e2), dtypes=HALVES),
        Case("1e-4", _mlp(3, 24, inner=63, scale=1e-4), dtypes=HALVES),
        Case("large-cotangent", _mlp(3, 24, inner=63), scale=1e4),
    ),
    launches=(Case("8192x4096x14336", _mlp(8192, 4096, inner=14336)),),
    on_gpu=(Case("1000x512x1408", _mlp(1000, 512, inner=1408)),),
    large=Case("large", _mlp(2**31 // 4096 + 3, 4096, inner=64, out=64), dtypes=(BF16,)),
    autocast=True,
)
