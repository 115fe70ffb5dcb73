"""Cases of group_norm."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .table import BF16, FP32, HALVES, Case, Inputs, Maker, Table


def _group_norm(
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
            "weight": m.normal(shape[1], shift=1.0, dtype=dtype) if weight else None,
            "bias": m.normal(shape[1], dtype=bias_dtype or dtype) if bias else None,
        }

    return make


def _group_of(value: float, *shape: int, groups: int, all_of_it: bool = True) -> Callable[[Maker], Inputs]:
    """The second group of the first sample is `value`, or its first element is."""

    def make(m: Maker) -> Inputs:
        inputs = _group_norm(*shape)(m)
        rows = inputs["x"].view(shape[0] * groups, -1)  # type: ignore[union-attr]
        rows[1, : None if all_of_it else 1] = value
        return inputs

    return make


def _channels_last(m: Maker) -> Inputs:
    inputs = _group_norm(2, 6, 5, 7)(m)
    inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]
    return inputs


def _case(name: str, groups: int, make: Callable[[Maker], Inputs], **more: object) -> Case:
    options = {"num_groups": groups, **more.pop("options", {})}  # type: ignore[dict-item]
    return Case(name, make, options, **more)  # type: ignore[arg-type]


GROUP_NORM = Table(
    op="group_norm",
    diff=("x", "weight", "bias"),
    rows=("x",),
    typical=_case("typical", 3, _group_norm(2, 6, 5, 7)),
    sized=lambda n: _case(f"{n}-samples", 2, _group_norm(n, 4, 3, 5)),
    cases=(
        _case("one-element", 1, _group_norm(1, 1), draws=32),
        _case("groups-of-one", 6, _group_norm(5, 6), draws=4, dtypes=HALVES),
        _case("groups-of-two", 1, _group_norm(1, 2), options={"eps": 0.1}, draws=32),
        _case("rank-2", 4, _group_norm(7, 40), dtypes=HALVES, draws=8),
        _case("rank-2-many", 16, _group_norm(130, 64)),
        _case("rank-3", 3, _group_norm(2, 9, 63), dtypes=HALVES, draws=8),
        _case("rank-4", 4, _group_norm(3, 12, 7, 7), dtypes=HALVES, draws=8),
        _case("rank-5", 2, _group_norm(2, 6, 3, 4, 5), draws=8),
        _case("one-group", 1, _group_norm(3, 10, 6, 6), draws=8),
        _case("instance", 10, _group_norm(3, 10, 6, 6), draws=8),
        _case("32-groups", 32, _group_norm(3, 64, 8, 8), draws=8),
        _case("samples-of-one", 8, _group_norm(70, 16, 2, 2), dtypes=(BF16,)),
        _case("no-samples", 3, _group_norm(0, 6, 5)),
        _case("no-weight", 3, _group_norm(3, 6, 5, 5, weight=False), draws=8),
        _case("no-bias", 3, _group_norm(3, 6, 5, 5, bias=False), draws=8),
        _case("neither", 3, _group_norm(3, 6, 5, 5, weight=False, bias=False), draws=8),
        _case("parameters-fp32", 3, _group_norm(3, 6, 5, 5, dtype=FP32), dtypes=(BF16,), draws=8),
        _case("bias-fp32", 3, _group_norm(3, 6, 5, 5, bias_dtype=FP32), dtypes=(BF16,), draws=8),
        _case("parameters-bf16", 3, _group_norm(3, 6, 5, 5, dtype=BF16), dtypes=(FP32,), draws=8),
        _case("channels-last", 3, _channels_last, draws=8),
        _case("large-backward", 2, _group_norm(2, 12, 50, 50), dtypes=(BF16,)),
        _case("shared", 2, _group_norm(2, 6, 130, 130)),
        _case("shared-channels", 1, _group_norm(2, 1100, 33), dtypes=(BF16,)),
        _case("shared-neither", 1, _group_norm(1, 640, 9, 9, weight=False, bias=False)),
        _case("shared-no-samples", 2, _group_norm(0, 6, 130, 130), dtypes=(BF16,)),
        _case("wide", 3, _group_norm(4, 6, 130, 130)),
        _case("wide-channels", 1, _group_norm(9, 40, 20, 21), dtypes=(BF16,)),
        _case("wide-neither", 8, _group_norm(1, 8, 40001, weight=False, bias=False), dtypes=(BF16,)),
    ),
    hostile=(
        _case("1e4", 6, _group_norm(3, 24, 5, 5, scale=1e4), dtypes=HALVES),
        _case("1e-4", 6, _group_norm(3, 24, 5, 5, scale=1e-4), dtypes=HALVES),
        _case("mean-1e4", 2, _group_norm(8, 24, 5, 5, shift=1e4), dtypes=(FP32,)),
        _case("mean-1e4-shared", 2, _group_norm(2, 6, 130, 130, shift=1e4), dtypes=(FP32,)),
        _case("mean-1e4-wide", 3, _group_norm(4, 6, 130, 130, shift=1e4), dtypes=(FP32,)),
        _case("mean-100", 6, _group_norm(8, 24, 5, 5, shift=100.0), dtypes=HALVES),
        _case("zero-group", 6, _group_of(0.0, 3, 24, 5, 5, groups=6), dtypes=HALVES),
        _case("constant-group", 6, _group_of(1.5, 3, 24, 4, 8, groups=6), dtypes=HALVES),
        _case("zero-group-no-eps", 6, _group_of(0.0, 3, 24, 5, 5, groups=6), options={"eps": 0.0}),
        _case("huge-eps", 6, _group_norm(3, 24, 5, 5), options={"eps": 1e6}),
        _case("nan-group", 6, _group_of(math.nan, 3, 24, 5, 5, groups=6)),
        _case("inf-group", 6, _group_of(math.inf, 3, 24, 5, 5, groups=6)),
        _case("one-inf", 6, _group_of(math.inf, 3, 24, 5, 5, groups=6, all_of_it=False)),
        _case("one-nan-shared", 2, _group_of(math.nan, 2, 6, 130, 130, groups=2, all_of_it=False), dtypes=(BF16,)),
        _case("one-inf-wide", 3, _group_of(math.inf, 4, 6, 130, 130, groups=3, all_of_it=False), dtypes=(BF16,)),
        _case("large-cotangent", 6, _group_norm(3, 24, 5, 5), scale=1e4),
    ),
    launches=tuple(
        _case("x".join(map(str, shape)) + f"-{groups}", groups, _group_norm(*shape))
        for groups, shape in (
            (32, (64, 512, 8, 8)),
            (32, (32, 256, 14, 14)),
            (32, (8, 320, 64, 64)),
            (32, (32, 320, 64, 64)),
            (32, (2, 128, 512, 512)),
            (4, (1, 128, 512, 512)),
            (32, (65536, 512)),
        )
    ),
    on_gpu=(
        _case("64x512x8x8", 32, _group_norm(64, 512, 8, 8)),
        _case("32x256x14x14", 32, _group_norm(32, 256, 14, 14)),
        _case("8x320x64x64", 32, _group_norm(8, 320, 64, 64)),
        _case("32x320x64x64", 32, _group_norm(32, 320, 64, 64)),
        _case("mean-1e4-2x128x512x512", 32, _group_norm(2, 128, 512, 512, shift=1e4), dtypes=(FP32,)),
        _case("2x128x512x512", 32, _group_norm(2, 128, 512, 512)),
        _case("1x96x401x403", 3, _group_norm(1, 96, 401, 403)),
        _case("65536x512", 32, _group_norm(65536, 512)),
        _case("70001x129", 43, _group_norm(70001, 129)),
    ),
    large=_case("large", 8, _group_norm(2**31 // 4096 + 3, 64, 8, 8), dtypes=(BF16,)),
)
