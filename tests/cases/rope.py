"""Cases of the rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .table import BF16, FP16, FP32, HALVES, Case, Inputs, Maker, Table

# --- rope -------------------------------------------------------------------------------------------------------------------------------


def _rope(
    b: int, h: int, hk: int, t: int, d: int, *, shared: bool = True, tables: torch.dtype | None = None, scale: float = 1.0
) -> Callable[[Maker], Inputs]:  # fmt: skip
    """Queries and keys as attention has them, [B, T, heads, D] in memory; angles as a model has them, each twice."""

    def make(m: Maker) -> Inputs:
        q, k = m.normal(b, t, h, d, scale=scale).transpose(1, 2), m.normal(b, t, hk, d, scale=scale).transpose(1, 2)
        position = torch.arange(t, device=m.device).expand(1 if shared else b, t)
        if not shared and m.device.type != "meta":
            position = position + 17 * torch.arange(b, device=m.device)[:, None]
        angle = position[..., None] * 1e4 ** (-torch.arange(0, d, 2, device=m.device) / d)
        angle = torch.cat((angle, angle), -1)
        return {"q": q, "k": k, "cos": angle.cos().to(tables or m.dtype), "sin": angle.sin().to(tables or m.dtype)}

    return make


def _rope_any_tables(m: Maker) -> Inputs:
    """cos and sin whose halves differ: the definition holds for these too."""
    return {"q": m.normal(2, 3, 5, 8), "k": m.normal(2, 1, 5, 8), "cos": m.normal(2, 5, 8), "sin": m.normal(1, 5, 8)}


def _rope_options(
    b: int, h: int, hk: int, t: int, d: int, width: int, *, axes: int = 1, batch: int | None = None, form: str = "BHTD", seen: str = "BTHD"
) -> Callable[[Maker], Inputs]:  # fmt: skip
    """Heads with axes in the order `form`, in memory in the order `seen`; no k for hk = 0, to go with ALONE. cos and sin: any numbers."""
    sizes = {"B": b, "T": t, "D": d}

    def make(m: Maker) -> Inputs:
        def heads(n: int) -> Tensor | None:
            x = m.normal(*({**sizes, "H": n}[axis] for axis in seen))
            return x.permute([seen.index(axis) for axis in form]) if n else None

        q, k = heads(h), heads(hk)
        lead = (() if axes == 1 else (axes,)) + (() if batch == 0 else (batch or b,))
        tables: Inputs = {"cos": m.normal(*lead, t, width), "sin": m.normal(*lead, t, width)}
        return {"q": q, **({} if k is None else {"k": k}), **tables}

    return make


def _rope_nan(m: Maker) -> Inputs:
    """One channel that is turned and one that passes through are no numbers; nor is one angle."""
    inputs = _rope_options(2, 3, 0, 5, 8, 6)(m)
    inputs["q"][0, 1, 2, 1:8:6] = math.nan  # type: ignore[index]
    inputs["cos"][1, 3, 2] = math.inf  # type: ignore[index]
    return inputs


ALONE: dict[str, Any] = {"k": None}
PAIRS = {"layout": "interleaved"}
BY_TOKEN = {"unsqueeze_dim": 2}
SECTIONS = {"sections": (2, 1, 2)}
THREES = {"sections": (5, 3, 2), "section_order": "interleaved"}

_OPTIONS = (
    Case("alone", _rope_options(2, 3, 0, 5, 8, 8), ALONE),
    Case("alone-own-tables", _rope_options(2, 3, 0, 5, 8, 8, batch=1, form="BTHD"), ALONE | BY_TOKEN | PAIRS),
    Case("partial", _rope_options(2, 3, 2, 5, 16, 6), dtypes=HALVES),
    Case("partial-odd", _rope_options(1, 3, 1, 3, 9, 4)),
    Case("pairs", _rope_options(2, 3, 1, 5, 8, 8), PAIRS, dtypes=HALVES),
    Case("pairs-odd", _rope_options(1, 3, 1, 3, 7, 6), PAIRS, dtypes=HALVES),
    Case("one-pair", _rope_options(1, 3, 1, 3, 2, 2), PAIRS, draws=4),
    Case("pairs-partial-n-wide", _rope_options(2, 3, 1, 5, 16, 3), PAIRS | {"rotary_dim": 6}),
    Case("n-wide", _rope_options(2, 3, 1, 5, 16, 8), {"rotary_dim": 16}),
    Case("n-wide-partial", _rope_options(2, 3, 1, 5, 16, 4), {"rotary_dim": 8}),
    Case("by-token", _rope_options(2, 3, 1, 5, 8, 8, form="BTHD"), BY_TOKEN),
    Case("by-token-pairs-partial", _rope_options(2, 3, 1, 5, 8, 4, form="BTHD"), BY_TOKEN | PAIRS),
    Case("by-token-heads-first", _rope_options(2, 3, 1, 5, 8, 8, form="BTHD", seen="HBDT"), BY_TOKEN),
    Case("channels-first", _rope_options(2, 3, 1, 5, 8, 6, seen="DTHB"), PAIRS),
    Case("2-d-tables", _rope_options(3, 2, 1, 5, 8, 8, batch=0)),
    Case("sections", _rope_options(2, 3, 1, 5, 10, 10, axes=3), SECTIONS, dtypes=HALVES),
    Case("sections-pairs", _rope_options(2, 3, 1, 5, 12, 10, axes=3, batch=1), SECTIONS | PAIRS),
    Case("sections-n-wide", _rope_options(2, 3, 1, 5, 12, 5, axes=3, batch=0), SECTIONS | {"rotary_dim": 10}),
    Case("sections-empty", _rope_options(2, 3, 1, 5, 12, 10, axes=3), {"sections": [0, 5, 0]}),
    Case("threes", _rope_options(2, 3, 1, 5, 20, 20, axes=3), THREES, dtypes=HALVES),
    Case("threes-pairs", _rope_options(2, 3, 1, 5, 24, 20, axes=3, form="BTHD"), THREES | PAIRS | BY_TOKEN),
    Case("threes-n-wide", _rope_options(2, 3, 1, 5, 24, 10, axes=3), THREES | PAIRS | {"rotary_dim": 20}),
)

ROPE = Table(
    op="rope",
    diff=("q", "k"),
    rows=(
        "q",
        "k",
    ),
    linear=True,
    typical=Case("typical", _rope(2, 3, 1, 5, 10, shared=False)),
    sized=lambda n: Case(f"{n}-tokens", _rope(2, 4, 2, n, 8)),
    cases=(
        Case("1x1", _rope(1, 1, 1, 1, 2), draws=16),
        Case("odd", _rope(1, 3, 1, 7, 6), dtypes=HALVES),
        Case("grouped", _rope(2, 9, 3, 5, 64), dtypes=HALVES),
        Case("more-k", _rope(1, 1, 4, 3, 16)),
        Case("own-positions", _rope(3, 2, 2, 5, 16, shared=False)),
        Case("halves-differ", _rope_any_tables),
        Case("tables-fp32", _rope(2, 4, 2, 5, 16, tables=FP32), dtypes=(BF16, FP16)),
        Case("tables-bf16", _rope(2, 4, 2, 5, 16, tables=BF16), dtypes=(FP32,)),
        Case("no-tokens", _rope(2, 4, 2, 0, 16)),
        Case("no-batch", _rope(0, 4, 2, 5, 16)),
        Case("d-80", _rope(1, 2, 1, 3, 80)),
        *_OPTIONS,
    ),
    hostile=(
        Case("1e4", _rope(2, 3, 1, 5, 10, scale=1e4)),
        Case("zero", _rope(2, 3, 1, 5, 10, scale=0.0)),
        Case("nan", _rope(2, 3, 1, 5, 10, scale=math.nan)),
        Case("large-cotangent", _rope(2, 3, 1, 5, 10), scale=1e4),
    ),
    launches=(
        Case("b4-t4096-q32-k8-d128", _rope(4, 32, 8, 4096, 128)),
        Case("b8-t2048-q16-k8-d64", _rope(8, 16, 8, 2048, 64)),
        Case("pairs-b4-t4096-q32-k8-d128", _rope_options(4, 32, 8, 4096, 128, 128, batch=1), PAIRS),
        Case("pairs-partial-b4-t4096-q32-k2-d128", _rope_options(4, 32, 2, 4096, 128, 32, batch=1), PAIRS | {"rotary_dim": 64}),
        Case("partial-b4-t2048-q32-k8-d80", _rope_options(4, 32, 8, 2048, 80, 32, batch=1)),
        Case(
            "threes-b4-t4096-q32-k8-d128",
            _rope_options(4, 32, 8, 4096, 128, 128, axes=3),
            {"sections": (24, 20, 20), "section_order": "interleaved"},
        ),
    ),
    on_gpu=(
        Case("t1000-q32-k8-d128", _rope(2, 32, 8, 1000, 128, shared=False)),
        Case("t1000-q71-k1-d256", _rope(1, 71, 1, 1000, 256)),
        Case("t1000-q32-k8-d128-pairs", _rope_options(2, 32, 8, 1000, 128, 96), PAIRS),
        Case(
            "t1000-q16-d256-alone",
            _rope_options(2, 16, 0, 1000, 256, 64, axes=3, form="BTHD"),
            ALONE | THREES | BY_TOKEN | {"sections": (12, 10, 10)},
        ),
    ),
    large=Case("large", _rope(2**31 // (4096 * 8 * 128) + 1, 8, 1, 4096, 128), dtypes=(BF16,)),
)

# Every option at once, and no k.
ROPE_ALONE = replace(
    ROPE,
    typical=Case("typical-alone", _rope_options(2, 3, 0, 5, 24, 20, axes=3, batch=1, form="BTHD"), ALONE | THREES | PAIRS | BY_TOKEN),
    sized=lambda n: Case(f"{n}-tokens-alone", _rope_options(2, 4, 0, n, 12, 10, axes=3, form="BTHD"), ALONE | SECTIONS | PAIRS | BY_TOKEN),
    cases=tuple(c for c in _OPTIONS if "k" in c.options),
    hostile=(Case("nan-alone", _rope_nan, ALONE | PAIRS),),
    launches=(),
    on_gpu=tuple(c for c in ROPE.on_gpu if "k" in c.options),
    large=Case(
        "large-alone",
        _rope_options(2**31 // (4096 * 8 * 128) + 1, 8, 0, 4096, 128, 64, batch=1, form="BTHD"),
        ALONE | PAIRS | BY_TOKEN,
        dtypes=(BF16,),
    ),
)
