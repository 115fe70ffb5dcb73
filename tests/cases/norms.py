"""Cases of the norms."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .table import BF16, FP32, HALVES, Case, Inputs, Maker, Table

# --- rms_norm ---------------------------------------------------------------------------------------------------------------------------


def _rms_norm(*shape: int, weight: bool = True, weight_dtype: torch.dtype | None = None, scale: float = 1.0) -> Callable[[Maker], Inputs]:
    def make(m: Maker) -> Inputs:
        return {"x": m.normal(*shape, scale=scale), "weight": m.normal(shape[-1], shift=1.0, dtype=weight_dtype) if weight else None}

    return make


def _row_of(value: float, *shape: int) -> Callable[[Maker], Inputs]:
    def make(m: Maker) -> Inputs:
        inputs = _rms_norm(*shape)(m)
        inputs["x"][1] = value  # type: ignore[index]
        return inputs

    return make


RMS_NORM = Table(
    op="rms_norm",
    diff=("x", "weight"),
    rows=("x",),
    typical=Case("typical", _rms_norm(2, 5, 63), {"offset": 0.5}),
    sized=lambda n: Case(f"{n}-rows", _rms_norm(n, 3, 40)),
    cases=(
        Case("1x1", _rms_norm(1, 1), {"eps": 0.1}, draws=32),  # with a small eps nothing but cancellation is left of dx
        Case("1x63", _rms_norm(1, 63), draws=4, dtypes=HALVES),
        Case("7x1000", _rms_norm(7, 1000), dtypes=HALVES),
        Case("vector", _rms_norm(63), draws=4),
        Case("no-rows", _rms_norm(0, 63)),
        Case("no-rows-3d", _rms_norm(3, 0, 8)),
        Case("64x128", _rms_norm(64, 128)),
        Case("no-weight", _rms_norm(3, 63, weight=False)),
        Case("gemma", _rms_norm(3, 63), {"offset": 1.0, "cast": "gemma"}),
        Case("none", _rms_norm(3, 63), {"cast": "none"}),
        Case("weight-fp32", _rms_norm(3, 63, weight_dtype=FP32), dtypes=(BF16,)),
        Case("weight-fp32-gemma", _rms_norm(3, 63, weight_dtype=FP32), {"offset": 1.0, "cast": "gemma"}, dtypes=(BF16,)),
        Case("weight-fp32-none", _rms_norm(3, 63, weight_dtype=FP32), {"cast": "none"}, dtypes=(BF16,)),
        Case("offset", _rms_norm(3, 63), {"offset": -0.5}),
    ),
    hostile=(
        Case("1e4", _rms_norm(3, 63, scale=1e4), dtypes=HALVES),
        Case("1e-4", _rms_norm(3, 63, scale=1e-4), dtypes=HALVES),
        Case("zero-row", _row_of(0.0, 3, 63), dtypes=HALVES),
        Case("zero-row-no-eps", _row_of(0.0, 3, 63), {"eps": 0.0}),
        Case("huge-eps", _rms_norm(3, 63), {"eps": 1e6}),
        Case("nan-row", _row_of(math.nan, 3, 63)),
        Case("inf-row", _row_of(math.inf, 3, 63)),
        Case("large-cotangent", _rms_norm(3, 63), scale=1e4),
    ),
    launches=tuple(
        Case(f"{n}x{h}", _rms_norm(n, h), options)
        for n, h, options in (
            (8192, 4096, {}),
            (65536, 128, {}),
            (2048, 16384, {}),
            (8192, 2304, {"offset": 1.0, "cast": "gemma"}),
        )
    ),
    on_gpu=(Case("4096x4096", _rms_norm(4096, 4096)), Case("1000x65536", _rms_norm(1000, 65536)), Case("70000x127", _rms_norm(70000, 127))),
    large=Case("large", _rms_norm(2**31 // 4096 + 3, 4096), dtypes=(BF16,)),
)
