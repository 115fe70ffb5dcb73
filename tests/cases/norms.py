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
        Case("9x10000", _rms_norm(9, 10000), dtypes=(BF16,)),
        Case("9x16384", _rms_norm(9, 16384)),
        Case("wide-16385", _rms_norm(9, 16385), {"cast": "gemma"}),
        Case("wide-32784", _rms_norm(9, 32784)),
        Case("wide", _rms_norm(3, 70001), {"offset": 0.5}),
        Case("wide-no-weight", _rms_norm(2, 65537, weight=False), dtypes=(BF16,)),
        Case("wide-gemma", _rms_norm(9, 65600, weight_dtype=FP32), {"cast": "gemma"}, dtypes=(BF16,)),
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
            (1024, 32768, {}),
            (8192, 2304, {"offset": 1.0, "cast": "gemma"}),
            (512, 131072, {}),
        )
    ),
    on_gpu=(
        Case("4096x4096", _rms_norm(4096, 4096)),
        Case("1000x32768", _rms_norm(1000, 32768)),
        Case("1000x65536", _rms_norm(1000, 65536)),
        Case("70000x127", _rms_norm(70000, 127)),
        Case("500x131073", _rms_norm(500, 131073)),
    ),
    large=Case("large", _rms_norm(2**31 // 4096 + 3, 4096), dtypes=(BF16,)),
)


# --- add_rms_norm -----------------------------------------------------------------------------------------------------------------------


def _add_rms_norm(
    *shape: int, weight: bool = True, weight_dtype: torch.dtype | None = None, scale: float = 1.0
) -> Callable[[Maker], Inputs]:  # fmt: skip
    def make(m: Maker) -> Inputs:
        x, residual = m.normal(*shape, scale=scale), m.normal(*shape, scale=scale)
        return {"x": x, "residual": residual, "weight": m.normal(shape[-1], shift=1.0, dtype=weight_dtype) if weight else None}

    return make


def _sum_of(value: float, *shape: int) -> Callable[[Maker], Inputs]:
    """A row whose sum is `value`: of one part where that is special, of opposites where it is 0."""

    def make(m: Maker) -> Inputs:
        inputs = _add_rms_norm(*shape)(m)
        inputs["x"][1] = -inputs["residual"][1] if value == 0 else value  # type: ignore[index]
        return inputs

    return make


ADD_RMS_NORM = Table(
    op="add_rms_norm",
    diff=("x", "residual", "weight"),
    rows=("x", "residual"),
    typical=Case("typical", _add_rms_norm(2, 5, 63), {"offset": 0.5}),
    sized=lambda n: Case(f"{n}-rows", _add_rms_norm(n, 3, 40)),
    cases=(
        Case("1x1", _add_rms_norm(1, 1), {"eps": 0.1}, draws=32),
        Case("1x63", _add_rms_norm(1, 63), draws=4, dtypes=HALVES),
        Case("7x1000", _add_rms_norm(7, 1000), dtypes=HALVES),
        Case("vector", _add_rms_norm(63), draws=4),
        Case("no-rows", _add_rms_norm(0, 63)),
        Case("no-rows-3d", _add_rms_norm(3, 0, 8)),
        Case("64x128", _add_rms_norm(64, 128)),
        Case("no-weight", _add_rms_norm(3, 63, weight=False)),
        Case("gemma", _add_rms_norm(3, 63), {"offset": 1.0, "cast": "gemma"}),
        Case("none", _add_rms_norm(3, 63), {"cast": "none"}),
        Case("weight-fp32", _add_rms_norm(3, 63, weight_dtype=FP32), dtypes=(BF16,)),
        Case("weight-fp32-gemma", _add_rms_norm(3, 63, weight_dtype=FP32), {"offset": 1.0, "cast": "gemma"}, dtypes=(BF16,)),
        Case("weight-fp32-none", _add_rms_norm(3, 63, weight_dtype=FP32), {"cast": "none"}, dtypes=(BF16,)),
        Case("9x10000", _add_rms_norm(9, 10000), dtypes=(BF16,)),
        Case("9x16384", _add_rms_norm(9, 16384)),
        Case("wide-16385", _add_rms_norm(9, 16385), {"cast": "gemma"}),
        Case("wide-32784", _add_rms_norm(9, 32784)),
        Case("wide", _add_rms_norm(3, 70001), {"offset": 0.5}),
        Case("wide-no-weight", _add_rms_norm(2, 65537, weight=False), dtypes=(BF16,)),
    ),
    hostile=(
        Case("1e4", _add_rms_norm(3, 63, scale=1e4), dtypes=HALVES),
        Case("1e-4", _add_rms_norm(3, 63, scale=1e-4), dtypes=HALVES),
        Case("zero-sum", _sum_of(0.0, 3, 63), dtypes=HALVES),
        Case("huge-eps", _add_rms_norm(3, 63), {"eps": 1e6}),
        Case("nan-row", _sum_of(math.nan, 3, 63)),
        Case("inf-row", _sum_of(math.inf, 3, 63)),
        Case("large-cotangent", _add_rms_norm(3, 63), scale=1e4),
    ),
    launches=tuple(
        Case(f"{n}x{h}", _add_rms_norm(n, h), options)
        for n, h, options in (
            (8192, 4096, {}),
            (65536, 128, {}),
            (2048, 16384, {}),
            (1024, 32768, {}),
            (8192, 2304, {"offset": 1.0, "cast": "gemma"}),
            (512, 131072, {}),
        )
    ),
    on_gpu=(
        Case("4096x4096", _add_rms_norm(4096, 4096)),
        Case("1000x32768", _add_rms_norm(1000, 32768)),
        Case("1000x65536", _add_rms_norm(1000, 65536)),
        Case("70000x127", _add_rms_norm(70000, 127)),
        Case("500x131073", _add_rms_norm(500, 131073)),
    ),
    large=Case("large", _add_rms_norm(2**31 // 4096 + 3, 4096), dtypes=(BF16,)),
)


# --- layer_norm -------------------------------------------------------------------------------------------------------------------------


def _layer_norm(
    *shape: int,
    weight: bool = True,
    bias: bool = True,
    dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
) -> Callable[[Maker], Inputs]:
    def make(m: Maker) -> Inputs:
        return {
            "x": m.normal(*shape, scale=scale, shift=shift),
            "weight": m.normal(shape[-1], shift=1.0, dtype=dtype) if weight else None,
            "bias": m.normal(shape[-1], dtype=bias_dtype or dtype) if bias else None,
        }

    return make


def _layer_norm_row_of(value: float, *shape: int) -> Callable[[Maker], Inputs]:
    def make(m: Maker) -> Inputs:
        inputs = _layer_norm(*shape)(m)
        inputs["x"][1] = value  # type: ignore[index]
        return inputs

    return make


LAYER_NORM = Table(
    op="layer_norm",
    diff=("x", "weight", "bias"),
    rows=("x",),
    typical=Case("typical", _layer_norm(2, 5, 63)),
    sized=lambda n: Case(f"{n}-rows", _layer_norm(n, 3, 40)),
    cases=(
        Case("1x1", _layer_norm(1, 1), draws=32),
        Case("1x2", _layer_norm(1, 2), {"eps": 0.1}, draws=32),
        Case("1x63", _layer_norm(1, 63), draws=4, dtypes=HALVES),
        Case("7x1000", _layer_norm(7, 1000), dtypes=HALVES),
        Case("vector", _layer_norm(63), draws=4),
        Case("no-rows", _layer_norm(0, 63)),
        Case("no-rows-3d", _layer_norm(3, 0, 8)),
        Case("64x128", _layer_norm(64, 128)),
        Case("no-weight", _layer_norm(3, 63, weight=False)),
        Case("no-bias", _layer_norm(3, 63, bias=False)),
        Case("neither", _layer_norm(3, 63, weight=False, bias=False)),
        Case("parameters-fp32", _layer_norm(3, 63, dtype=FP32), dtypes=(BF16,)),
        Case("bias-fp32", _layer_norm(3, 63, bias_dtype=FP32), dtypes=(BF16,)),
        Case("parameters-bf16", _layer_norm(3, 63, dtype=BF16), dtypes=(FP32,)),
        Case("9x10000-no-bias", _layer_norm(9, 10000, bias=False), dtypes=(BF16,)),
        Case("9x16384", _layer_norm(9, 16384)),
        Case("wide-32768-no-weight", _layer_norm(2, 32768, weight=False), dtypes=(BF16,)),
        Case("wide-32784", _layer_norm(9, 32784)),
        Case("wide", _layer_norm(3, 70001)),
        Case("wide-backward", _layer_norm(3, 16385), dtypes=(BF16,)),
        Case("wide-neither", _layer_norm(2, 65537, weight=False, bias=False), dtypes=(BF16,)),
        Case("wide-no-weight", _layer_norm(9, 65600, weight=False, bias_dtype=FP32), dtypes=(BF16,)),
    ),
    hostile=(
        Case("1e4", _layer_norm(3, 63, scale=1e4), dtypes=HALVES),
        Case("1e-4", _layer_norm(3, 63, scale=1e-4), dtypes=HALVES),
        Case("mean-1e4", _layer_norm(30, 63, shift=1e4), dtypes=(FP32,)),
        Case("mean-1e4-1000", _layer_norm(7, 1000, shift=1e4), dtypes=(FP32,)),
        Case("mean-1e4-wide", _layer_norm(9, 70001, shift=1e4), dtypes=(FP32,)),
        Case("mean-1e4-wide-32784", _layer_norm(9, 32784, shift=1e4), dtypes=(FP32,)),
        Case("mean-100", _layer_norm(30, 63, shift=100.0), dtypes=HALVES),
        Case("zero-row", _layer_norm_row_of(0.0, 3, 63), dtypes=HALVES),
        Case("constant-row", _layer_norm_row_of(1.5, 3, 64), dtypes=HALVES),
        Case("zero-row-no-eps", _layer_norm_row_of(0.0, 3, 63), {"eps": 0.0}),
        Case("huge-eps", _layer_norm(3, 63), {"eps": 1e6}),
        Case("nan-row", _layer_norm_row_of(math.nan, 3, 63)),
        Case("inf-row", _layer_norm_row_of(math.inf, 3, 63)),
        Case("large-cotangent", _layer_norm(3, 63), scale=1e4),
    ),
    launches=tuple(
        Case(f"{n}x{h}", _layer_norm(n, h))
        for n, h in ((8192, 4096), (65536, 128), (2048, 16384), (1024, 32768), (8192, 1280), (512, 131072))
    ),
    on_gpu=(
        Case("4096x4096", _layer_norm(4096, 4096)),
        Case("mean-1e4-4096x4096", _layer_norm(4096, 4096, shift=1e4), dtypes=(FP32,)),
        Case("1000x32768", _layer_norm(1000, 32768)),
        Case("1000x65536", _layer_norm(1000, 65536)),
        Case("70000x127", _layer_norm(70000, 127)),
        Case("500x131073", _layer_norm(500, 131073)),
    ),
    large=Case("large", _layer_norm(2**31 // 4096 + 3, 4096), dtypes=(BF16,)),
)
