"""Cases of the experts of a mixture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from .table import BF16, FP16, FP32, FP64, HALVES, Case, Inputs, Maker, Table

RELU2 = {"activation": "relu2"}
GPT_OSS = {"activation": "clamped_swiglu", "packed": "interleaved", "limit": 1.0}


def experts(
    *tokens: int, e: int, k: int, h: int, i: int, halves: int = 2, bias: bool = False, weight: torch.dtype | None = None, every: int = 0,
    only: int | None = None, stored: bool = False, scale: float = 1.0,
) -> Callable[[Maker], Inputs]:  # fmt: skip
    """What makes the arguments. Of any `every` choices one is no expert, of none where that is 0; or all choices are `only`.

    stored: the weights lie in memory as [E, in, out].
    """

    def make(m: Maker) -> Inputs:
        def normal(rows: int, columns: int) -> torch.Tensor:
            by = columns**-0.5
            return m.normal(e, columns, rows, scale=by).transpose(1, 2) if stored else m.normal(e, rows, columns, scale=by)

        index = m.targets(*tokens, k, classes=e, every=every)
        return {
            "x": m.normal(*tokens, h, scale=scale),
            "gate_up": normal(halves * i, h),
            "down": normal(h, i),
            "topk_index": index if only is None else torch.full_like(index, only),
            "topk_weight": m.normal(*tokens, k, scale=0.2, shift=0.5, dtype=None if m.dtype is FP64 else weight),
            "gate_up_bias": m.normal(e, halves * i, scale=0.3) if bias else None,
            "down_bias": m.normal(e, h, scale=0.3) if bias else None,
        }

    return make


def _full(value: float) -> Callable[[Maker], Inputs]:
    make = experts(5, e=4, k=1, h=8, i=16)
    return lambda m: {**make(m), "x": m.full(5, 8, value=value)}


MOE_EXPERTS = Table(
    op="moe_experts",
    diff=("x", "gate_up", "down", "topk_weight", "gate_up_bias", "down_bias"),
    rows=("x", "topk_index", "topk_weight"),
    # topk_weight in bf16, so that autocast's dtype and its own are one: see test_autocast.
    typical=Case("typical", experts(2, 1, e=2, k=2, h=10, i=13, bias=True, weight=BF16, every=4), GPT_OSS, draws=3),
    sized=lambda n: Case(f"{n}-rows", experts(n, 2, e=2, k=2, h=3, i=5)),
    cases=(
        Case("1x1", experts(1, e=1, k=1, h=1, i=1), draws=12),
        Case("silu", experts(8, e=2, k=4, h=40, i=70), dtypes=HALVES, draws=3),
        Case("gpt-oss", experts(8, e=2, k=4, h=20, i=33, bias=True, stored=True, weight=FP32), GPT_OSS, dtypes=HALVES, draws=3),
        Case("vector", experts(e=2, k=8, h=16, i=30), {"packed": "interleaved"}, draws=4, dtypes=(BF16,)),
        # Of one token, dw is one of two orders of the same two sums: which of them errs less is luck over few draws.
        Case("vector-fp32", experts(e=2, k=8, h=16, i=30), {"packed": "interleaved"}, draws=64, dtypes=(FP32,)),
        Case("no-rows", experts(0, e=3, k=2, h=8, i=24)),
        Case("absent", experts(4, 3, e=2, k=4, h=24, i=32, every=2, weight=FP32), draws=2),
        Case("all-absent", experts(3, e=2, k=2, h=8, i=24, only=-1)),
        Case("one-expert", experts(20, e=2, k=1, h=8, i=24, only=1, bias=True), draws=3, dtypes=(FP32,)),
        Case("many-experts", experts(4, e=12, k=4, h=8, i=12), draws=2, dtypes=(BF16,)),
        # The square has heavy tails: over fewer rows, which of the two errs less is luck.
        Case("relu2", experts(64, e=2, k=4, h=16, i=28, halves=1, bias=True, weight=FP32), RELU2, dtypes=HALVES, draws=12),
        Case("gelu", experts(8, e=2, k=4, h=16, i=28), {"activation": "gelu"}, draws=3, dtypes=(FP32,)),
        Case("gelu-tanh", experts(8, e=2, k=4, h=16, i=28), {"activation": "gelu_tanh", "packed": "interleaved"}, draws=3, dtypes=(BF16,)),
        # A limit that every dtype has: of another, plain PyTorch compares with the rounded one, and which of the two errs is luck.
        Case("limit", experts(8, e=2, k=4, h=16, i=28), {"limit": 0.375}, draws=3),
        Case("minimax", experts(8, e=2, k=4, h=16, i=28), {"activation": "clamped_swiglu", "alpha": 1.5}, draws=3, dtypes=(BF16,)),
        Case("recompute", experts(8, e=2, k=4, h=16, i=28, bias=True), {"save": "recompute"}, draws=2, dtypes=(BF16,)),
    ),
    hostile=(
        Case("30", experts(8, e=2, k=4, h=12, i=21, scale=30.0), dtypes=HALVES, draws=8),
        Case("100-limit", experts(8, e=2, k=4, h=12, i=21, scale=1e2, bias=True), GPT_OSS, draws=3),
        Case("1e-4", experts(8, e=2, k=4, h=12, i=21, scale=1e-4), draws=3),
        Case("large-cotangent", experts(8, e=2, k=4, h=12, i=21), scale=1e3, draws=3),
        Case("zero", _full(0.0)),
        Case("nan", _full(math.nan)),  # of experts that no token chose, gradients are 0
    ),
    launches=(
        Case("8192x2048x768", experts(8192, e=16, k=8, h=2048, i=768, weight=FP32)),
        Case("gpt-oss-quarter", experts(4096, e=8, k=2, h=2880, i=2880, bias=True, stored=True), {**GPT_OSS, "limit": 7.0}),
        Case("few", experts(64, e=8, k=4, h=2048, i=768)),
    ),
    on_gpu=(
        Case("ragged", experts(1000, e=7, k=3, h=328, i=520), dtypes=HALVES),
        Case("gpt-oss", experts(1000, e=4, k=2, h=384, i=512, bias=True, stored=True), GPT_OSS, dtypes=(BF16, FP16)),
        Case("relu2", experts(1000, e=4, k=2, h=384, i=512, halves=1), RELU2),
        Case("few", experts(200, e=64, k=4, h=384, i=512, every=5)),
    ),
    large=Case("large", experts(2**31 // 4096 + 3, e=4, k=1, h=4096, i=64), dtypes=(BF16,)),
    autocast=True,
)

# On a rank alone: more ranks are in `tests.shards_experts`.
EXPERT_PARALLEL_MOE_EXPERTS = replace(MOE_EXPERTS, op="expert_parallel_moe_experts", cases=(), hostile=(), launches=(), on_gpu=())
