"""Cases of the gated linear units."""

from __future__ import annotations

import math
from collections.abc import Callable

from .table import BF16, HALVES, Case, Inputs, Maker, Table

# --- swiglu -----------------------------------------------------------------------------------------------------------------------------


def _swiglu(*shape: int, scale: float = 1.0) -> Callable[[Maker], Inputs]:
    return lambda m: {"gate": m.normal(*shape, scale=scale), "up": m.normal(*shape)}


def _swiglu_of(value: float, *shape: int) -> Callable[[Maker], Inputs]:
    return lambda m: {"gate": m.full(*shape, value=value), "up": m.normal(*shape)}


SWIGLU = Table(
    op="swiglu",
    diff=("gate", "up"),
    rows=(
        "gate",
        "up",
    ),
    typical=Case("typical", _swiglu(2, 5, 63)),
    sized=lambda n: Case(f"{n}-rows", _swiglu(n, 3, 40)),
    cases=(
        Case("1x1", _swiglu(1, 1), draws=32),
        Case("1x63", _swiglu(1, 63), draws=4, dtypes=HALVES),
        Case("7x1000", _swiglu(7, 1000), dtypes=HALVES),
        Case("3x5000", _swiglu(3, 5000)),
        Case("vector", _swiglu(63), draws=4),
        Case("no-rows", _swiglu(0, 63)),
        Case("no-columns", _swiglu(3, 0)),
        Case("64x128", _swiglu(64, 128)),
    ),
    hostile=(
        Case("1e4", _swiglu(3, 63, scale=1e4), dtypes=HALVES),
        Case("1e-4", _swiglu(3, 63, scale=1e-4), dtypes=HALVES),
        Case("zero", _swiglu_of(0.0, 3, 63)),
        Case("minus-200", _swiglu_of(-200.0, 3, 63), dtypes=HALVES),  # exp(200) is beyond fp32
        Case("nan", _swiglu_of(math.nan, 3, 63)),
        Case("large-cotangent", _swiglu(3, 63), scale=1e4),
    ),
    launches=(Case("8192x14336", _swiglu(8192, 14336)), Case("16384x8192", _swiglu(16384, 8192))),
    on_gpu=(Case("1000x14336", _swiglu(1000, 14336)), Case("3x1000x5000", _swiglu(3, 1000, 5000))),
    large=Case("large", _swiglu(2**31 // 8192 + 3, 8192), dtypes=(BF16,)),
)
