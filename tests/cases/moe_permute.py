"""Cases of the way to the experts of a mixture, and back."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .table import BF16, FP16, FP32, FP64, HALVES, Case, Inputs, Maker, Table


def _choices(m: Maker, *tokens: int, e: int, k: int, every: int, only: int | None) -> Tensor:
    """Of any `every` choices one is no expert (none where that is 0); all choices are `only`."""
    index = m.targets(*tokens, k, classes=e, every=every)
    return index if only is None else torch.full_like(index, only)


def _permute(
    *tokens: int, e: int, k: int, h: int, every: int = 0, only: int | None = None, scale: float = 1.0, value: float | None = None
) -> Callable[[Maker], Inputs]:
    """Every other token has the `value`, where there is one."""

    def make(m: Maker) -> Inputs:
        x = m.normal(*tokens, h, scale=scale)
        if value is not None:
            x.view(-1, h)[::2] = value
        return {"x": x, "topk_index": _choices(m, *tokens, e=e, k=k, every=every, only=only)}

    return make


def _unpermute(
    *tokens: int, e: int, k: int, h: int, every: int = 0, only: int | None = None, scale: float = 1.0, value: float | None = None,
    weight: torch.dtype | None = FP32,
) -> Callable[[Maker], Inputs]:  # fmt: skip
    """Every other row has the `value`, where there is one."""

    def make(m: Maker) -> Inputs:
        rows = m.normal(math.prod(tokens) * k, h, scale=scale)
        if value is not None:
            rows[::2] = value
        index = _choices(m, *tokens, e=e, k=k, every=every, only=only)
        wide = FP64 if m.dtype is FP64 else weight
        return {
            "rows": rows,
            "plan": places(index, e),
            "topk_weight": None if weight is None else m.normal(*tokens, k, scale=0.2, shift=0.5, dtype=wide),
        }

    return make


def places(index: Tensor, experts: int) -> Tensor:
    """The row of each choice; −1 − its row where it is no expert."""
    e = index.reshape(-1)
    kept = (e >= 0) & (e < experts)
    order = torch.where(kept, e, experts).argsort(stable=True)
    row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return torch.where(kept, row, -1 - row).to(torch.int32).view(index.shape)


def _how(e: int) -> dict[str, object]:
    """Options of a call that returns what the contract judges: what has a derivative."""
    return {"num_experts": e}


MOE_PERMUTE = Table(
    op="moe_permute",
    diff=("x",),
    rows=("x", "topk_index"),
    typical=Case("typical", _permute(2, 3, e=3, k=2, h=20, every=4), _how(3)),
    sized=lambda n: Case(f"{n}-rows", _permute(n, 2, e=3, k=2, h=10), _how(3)),
    cases=(
        Case("1x1", _permute(1, e=1, k=1, h=1), _how(1)),
        Case("7x70", _permute(7, e=4, k=3, h=70), _how(4), dtypes=HALVES),
        Case("absent", _permute(3, 3, e=4, k=3, h=24, every=2), _how(4), dtypes=HALVES),
        Case("all-absent", _permute(3, e=2, k=2, h=24, only=-1), _how(2)),
        Case("one-expert", _permute(9, e=3, k=1, h=24, only=1), _how(3)),
        Case("many-experts", _permute(4, e=40, k=5, h=8), _how(40)),
        Case("wide", _permute(2, e=3, k=2, h=2100), _how(3)),
        Case("no-rows", _permute(0, e=3, k=2, h=24), _how(3)),
        Case("no-rows-3d", _permute(2, 0, e=3, k=2, h=24), _how(3)),
        Case("vector", _permute(e=3, k=2, h=16), _how(3)),
    ),
    hostile=(
        Case("1e30", _permute(5, e=4, k=3, h=20, scale=1e30), _how(4), dtypes=(FP32, BF16)),
        Case("nan", _permute(5, e=4, k=3, h=20, every=3, value=math.nan), _how(4), dtypes=HALVES),  # rows of no expert are 0
        Case("infinity", _permute(5, e=4, k=3, h=20, every=3, value=math.inf), _how(4)),
        Case("large-cotangent", _permute(5, e=4, k=3, h=20), _how(4), scale=3e4, dtypes=(FP16,)),
    ),
    launches=(
        Case("qwen3-30b", _permute(8192, e=128, k=8, h=2048), _how(128)),
        Case("deepseek-v3", _permute(4096, e=256, k=8, h=7168), _how(256)),
        Case("granite-3b", _permute(4096, e=40, k=6, h=1536), _how(40)),
        Case("llama4", _permute(4096, e=16, k=1, h=5120), _how(16)),
    ),
    on_gpu=(
        Case("ragged", _permute(1000, e=7, k=3, h=520, every=5), _how(7), dtypes=HALVES),
        Case("qwen3", _permute(500, e=128, k=8, h=2048), _how(128)),
        Case("deepseek-v3", _permute(100, e=256, k=8, h=7168), _how(256)),
    ),
    large=Case("large", _permute(2**31 // 4096 + 3, e=1, k=1, h=4096), _how(1), dtypes=(BF16,)),  # its order is that of the tokens
    linear=True,
)

MOE_UNPERMUTE = Table(
    op="moe_unpermute",
    diff=("rows", "topk_weight"),
    rows=(),
    typical=Case("typical", _unpermute(2, 3, e=3, k=2, h=20, every=4), draws=2),
    sized=lambda n: Case(f"{n}-rows", _unpermute(n, 2, e=3, k=2, h=10)),
    cases=(
        Case("1x1", _unpermute(1, e=1, k=1, h=1), draws=16),
        Case("7x70", _unpermute(7, e=4, k=3, h=70), dtypes=HALVES, draws=2),
        Case("no-weight", _unpermute(7, e=4, k=3, h=70, every=4, weight=None), dtypes=HALVES, draws=2),
        Case("bf16-weight", _unpermute(5, e=4, k=3, h=24, weight=BF16), draws=4),
        Case("absent", _unpermute(3, 3, e=4, k=3, h=24, every=2), dtypes=HALVES, draws=2),
        Case("all-absent", _unpermute(3, e=2, k=2, h=24, only=-1)),
        Case("one-expert", _unpermute(9, e=3, k=1, h=24, only=1), draws=2),
        Case("many-experts", _unpermute(4, e=40, k=5, h=8), draws=4),
        Case("wide", _unpermute(2, e=3, k=2, h=2100), draws=2),
        Case("no-rows", _unpermute(0, e=3, k=2, h=24)),
        Case("no-rows-3d", _unpermute(2, 0, e=3, k=2, h=24)),
        Case("vector", _unpermute(e=3, k=2, h=16), draws=4),
    ),
    hostile=(
        Case("1e4", _unpermute(5, e=4, k=3, h=20, scale=1e4), dtypes=HALVES, draws=2),
        Case("nan", _unpermute(6, e=4, k=3, h=20, every=2, value=math.nan), dtypes=HALVES),  # rows of no expert are not read
        Case("infinity", _unpermute(6, e=4, k=3, h=20, every=2, value=math.inf)),
        Case("large-cotangent", _unpermute(5, e=4, k=3, h=20), scale=1e3, draws=2),
    ),
    launches=(
        Case("qwen3-30b", _unpermute(8192, e=128, k=8, h=2048)),
        Case("deepseek-v3", _unpermute(4096, e=256, k=8, h=7168)),
        Case("granite-3b", _unpermute(4096, e=40, k=6, h=1536, weight=BF16)),
        Case("llama4", _unpermute(4096, e=16, k=1, h=5120)),
    ),
    on_gpu=(
        Case("ragged", _unpermute(1000, e=7, k=3, h=520, every=5), dtypes=HALVES),
        Case("qwen3", _unpermute(500, e=128, k=8, h=2048)),
        Case("deepseek-v3", _unpermute(100, e=256, k=8, h=7168)),
    ),
    large=Case("large", _unpermute(2**31 // 4096 + 3, e=1, k=1, h=4096), dtypes=(BF16,)),
)
