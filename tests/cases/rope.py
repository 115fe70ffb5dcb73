"""Cases of the rotary embedding."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

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
    ),
    on_gpu=(Case("t1000-q32-k8-d128", _rope(2, 32, 8, 1000, 128, shared=False)), Case("t1000-q71-k1-d256", _rope(1, 71, 1, 1000, 256))),
    large=Case("large", _rope(2**31 // (4096 * 8 * 128) + 1, 8, 1, 4096, 128), dtypes=(BF16,)),
)
