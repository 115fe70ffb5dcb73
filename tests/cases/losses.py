"""Cases of the losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .table import BF16, FP16, FP32, HALVES, Case, Inputs, Maker, Table

# --- cross_entropy ----------------------------------------------------------------------------------------------------------------------


def _cross_entropy(
    *shape: int, every: int = 3, scale: float = 2.0, shift: float = 0.0, weight: bool = False, items: int = 0
) -> Callable[[Maker], Inputs]:  # fmt: skip
    """Logits and targets; perhaps weights of the classes between 0.5 and 1.5, and the number that a mean divides by."""

    def make(m: Maker) -> Inputs:
        inputs: Inputs = {
            "logits": m.normal(*shape, scale=scale, shift=shift),
            "target": m.targets(*shape[:-1], classes=shape[-1], every=every),
        }
        if weight:
            inputs["weight"] = torch.linspace(0.5, 1.5, shape[-1], device=m.device, dtype=FP32)
        if items:
            inputs["num_items"] = torch.tensor(items, device=m.device)
        return inputs

    return make


def _logits_where(value: float, *shape: int) -> Callable[[Maker], Inputs]:
    """Some logits, never the target's, at a special value."""

    def make(m: Maker) -> Inputs:
        inputs = _cross_entropy(*shape, every=0)(m)
        logits, target = inputs["logits"], inputs["target"]
        assert logits is not None
        assert target is not None
        special = (torch.arange(shape[-1], device=m.device) + target.clamp(0)[..., None]) % 3 == 1
        special &= torch.arange(shape[-1], device=m.device) != target[..., None]
        return {"logits": logits.masked_fill(special, value), "target": target}

    return make


REDUCTIONS = ("mean", "sum", "none")
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0}

CROSS_ENTROPY = Table(
    op="cross_entropy",
    diff=("logits",),
    rows=(
        "logits",
        "target",
    ),
    typical=Case("typical", _cross_entropy(2, 5, 63, weight=True, items=11), EVERYTHING),
    sized=lambda n: Case(f"{n}-rows", _cross_entropy(n, 40, weight=True), EVERYTHING),
    cases=(
        *(Case(f"1x63-{r}", _cross_entropy(1, 63, every=0), {"reduction": r}, draws=32) for r in REDUCTIONS),
        *(Case(f"7x1000-{r}", _cross_entropy(7, 1000), {"reduction": r}, dtypes=HALVES, draws=8) for r in REDUCTIONS),
        *(Case(f"3d-{r}", _cross_entropy(2, 3, 63), {"reduction": r}, draws=8) for r in REDUCTIONS),
        *(Case(f"no-rows-{r}", _cross_entropy(0, 63), {"reduction": r}) for r in REDUCTIONS),
        *(Case(f"all-ignored-{r}", _cross_entropy(5, 63, every=1), {"reduction": r}) for r in REDUCTIONS),
        *(Case(f"weights-{r}", _cross_entropy(9, 63, weight=True), {"reduction": r}, draws=8) for r in REDUCTIONS),
        *(Case(f"smoothing-{r}", _cross_entropy(9, 63), {"reduction": r, "label_smoothing": 0.1}, draws=8) for r in REDUCTIONS),
        *(Case(f"z-{r}", _cross_entropy(9, 63), {"reduction": r, "z_loss": 1e-2}, draws=8) for r in REDUCTIONS),
        *(Case(f"softcap-{r}", _cross_entropy(9, 63), {"reduction": r, "softcap": 5.0}, draws=8) for r in REDUCTIONS),
        *(Case(f"everything-{r}", _cross_entropy(9, 63, weight=True), {"reduction": r, **EVERYTHING}, draws=8) for r in REDUCTIONS),
        Case("everything-40000", _cross_entropy(2, 40000, every=0, weight=True), EVERYTHING, draws=8),
        Case("all-ignored-everything", _cross_entropy(5, 63, every=1, weight=True), EVERYTHING),
        Case("smoothing-1", _cross_entropy(9, 63), {"label_smoothing": 1.0}, draws=8),
        Case("softcap-30", _cross_entropy(9, 63, scale=20.0), {"softcap": 30.0}, dtypes=HALVES, draws=8),
        Case("softcap-small", _cross_entropy(9, 63, scale=1e-3), {"softcap": 30.0, "reduction": "none"}, draws=8),
        Case("items-7", _cross_entropy(9, 63, items=7), draws=8),
        Case("one-logit-row", _cross_entropy(63, every=0), draws=32),
        Case("one-class", _cross_entropy(4, 1)),
        Case("40000-classes", _cross_entropy(2, 40000, every=0), draws=4),
        Case("64x128", _cross_entropy(64, 128), draws=4),
        Case("ignore-7", lambda m: {"logits": m.normal(9, 63), "target": m.targets(9, classes=9, every=0)}, {"ignore_index": 7}, draws=8),
        Case("int32-targets", lambda m: {"logits": m.normal(9, 63), "target": m.targets(9, classes=63).int()}, draws=8),
    ),
    hostile=(
        Case("1e4", _cross_entropy(5, 63, scale=1e4), dtypes=HALVES),
        Case("shifted", _cross_entropy(5, 63, shift=3e4), {"reduction": "none"}, dtypes=(FP32, FP16)),
        Case("zero", _cross_entropy(5, 63, scale=0.0), {"reduction": "none"}),
        Case("minus-infinity", _logits_where(-math.inf, 6, 63), {"reduction": "none"}),
        Case("nan", _logits_where(math.nan, 6, 63), {"reduction": "none"}),
        Case("softcap-1e4", _cross_entropy(5, 63, scale=1e4), {"softcap": 30.0}),
        Case("minus-infinity-everything", _logits_where(-math.inf, 6, 63), {"reduction": "none", **EVERYTHING}),
        Case("minus-infinity-smoothing", _logits_where(-math.inf, 6, 63), {"reduction": "none", "label_smoothing": 0.1}),
        Case("nan-everything", _logits_where(math.nan, 6, 63), {"reduction": "none", **EVERYTHING}),
        Case("large-cotangent", _cross_entropy(5, 63), {"reduction": "none"}, scale=1e4),
    ),
    launches=(
        Case("8192x128256", _cross_entropy(8192, 128256)),
        Case("8192x32000", _cross_entropy(8192, 32000)),
        Case("everything-8192x128256", _cross_entropy(8192, 128256, weight=True), EVERYTHING),
        Case("4096x1000", _cross_entropy(4096, 1000), {"reduction": "none"}),
    ),
    on_gpu=(
        *(Case(f"1000x128256-{r}", _cross_entropy(1000, 128256), {"reduction": r}, draws=4) for r in REDUCTIONS),
        Case("63x262145", _cross_entropy(63, 262145), {"reduction": "none"}),
        *(Case(f"everything-1000x50257-{r}", _cross_entropy(1000, 50257, weight=True), {"reduction": r, **EVERYTHING}) for r in REDUCTIONS),
    ),
    large=Case("large", _cross_entropy(2**31 // 128256 + 3, 128256, every=0), {"reduction": "none"}, dtypes=(BF16,)),
)

# --- linear_cross_entropy ---------------------------------------------------------------------------------------------------------------


def _linear_cross_entropy(
    *shape: int, v: int, bias: bool = False, every: int = 3, scale: float = 1.0, weights: bool = False, items: int = 0, exact: bool = False
) -> Callable[[Maker], Inputs]:  # fmt: skip
    """Hidden states and a head whose logits have a spread of a few; perhaps weights of classes and of tokens between 0.5 and 1.5.

    If `exact`, no dtype rounds a logit: of few rows, that rounding would decide a verdict by luck.
    """

    def make(m: Maker) -> Inputs:
        h = shape[-1]
        inputs: Inputs = {
            "x": m.normal(*shape, scale=scale),
            "weight": m.normal(v, h, scale=2 / math.sqrt(h)),
            "target": m.targets(*shape[:-1], classes=v, every=every),
            "bias": m.normal(v) if bias else None,
        }
        if exact:
            inputs["x"] = m.normal(*shape).sign_()
            inputs["weight"] = m.normal(v, h, scale=32 / math.sqrt(h)).round_().div_(16)
        if weights:
            tokens = math.prod(shape[:-1])
            inputs["class_weight"] = torch.linspace(0.5, 1.5, v, device=m.device, dtype=FP32)
            inputs["token_weight"] = torch.linspace(1.5, 0.5, tokens, device=m.device, dtype=FP32).view(shape[:-1])
        if items:
            inputs["num_items"] = torch.tensor(items, device=m.device)
        return inputs

    return make


SMALL_BUDGET = 4 * 100 * 3  # three fp32 rows of a hundred classes: several chunks

HEAD_EVERYTHING = {**EVERYTHING, "logit_scale": 0.5, "temperature": 0.8}
ACCUMULATE = ("weight", "fp32", "exact")

LINEAR_CROSS_ENTROPY = Table(
    op="linear_cross_entropy",
    diff=("x", "weight", "bias"),
    autocast=True,
    rows=(
        "x",
        "target",
    ),
    typical=Case(
        "typical",
        _linear_cross_entropy(2, 5, 24, v=63, bias=True, weights=True),
        {"reduction": "none", "memory_budget": SMALL_BUDGET, **HEAD_EVERYTHING},
    ),
    sized=lambda n: Case(f"{n}-rows", _linear_cross_entropy(n, 24, v=40, weights=True), HEAD_EVERYTHING),
    cases=(
        *(Case(f"1x63-{r}", _linear_cross_entropy(1, 63, v=100, every=0), {"reduction": r}, draws=32) for r in REDUCTIONS),
        *(Case(f"9x63-{r}", _linear_cross_entropy(9, 63, v=100, bias=True), {"reduction": r}, dtypes=HALVES, draws=8) for r in REDUCTIONS),
        *(
            Case(f"chunks-{r}", _linear_cross_entropy(17, 63, v=100, bias=True), {"reduction": r, "memory_budget": SMALL_BUDGET}, draws=8)
            for r in REDUCTIONS
        ),
        *(Case(f"no-rows-{r}", _linear_cross_entropy(0, 63, v=100, bias=True), {"reduction": r}) for r in REDUCTIONS),
        *(Case(f"all-ignored-{r}", _linear_cross_entropy(5, 24, v=63, every=1, bias=True), {"reduction": r}) for r in REDUCTIONS),
        *(
            Case(
                f"{how}-{r}",
                _linear_cross_entropy(23, 63, v=100, bias=True, weights=True),
                {"reduction": r, "accumulate": how, "memory_budget": SMALL_BUDGET, **HEAD_EVERYTHING},
                dtypes=HALVES,
                draws=4 if r == "none" else 16,
            )
            for how in ACCUMULATE
            for r in REDUCTIONS
        ),
        *(
            Case(
                f"recompute-{how}",
                _linear_cross_entropy(23, 63, v=100, bias=True, items=9),
                {"save": "recompute", "accumulate": how, "memory_budget": SMALL_BUDGET, "z_loss": 1e-2},
                dtypes=HALVES,
                draws=8,
            )
            for how in ACCUMULATE
        ),
        Case(
            "exact-9000-classes",
            _linear_cross_entropy(5, 8, v=9000, weights=True),
            {"accumulate": "exact", "memory_budget": 9000 * 8, **HEAD_EVERYTHING},
            draws=8,
        ),
        Case("scaled", _linear_cross_entropy(9, 63, v=100), {"logit_scale": 0.0625, "temperature": 0.7}, draws=8),
        Case("shift", _linear_cross_entropy(3, 5, 24, v=63, weights=True), {"shift": True, "memory_budget": SMALL_BUDGET}, draws=8),
        Case("h-1", _linear_cross_entropy(7, 1, v=63), draws=8),
        Case("one-class", _linear_cross_entropy(7, 24, v=1)),
        Case("one-row-budget", _linear_cross_entropy(5, 24, v=63), {"memory_budget": 1}, draws=8),
        Case("3d", _linear_cross_entropy(2, 3, 24, v=63), draws=8),
        Case("vector", _linear_cross_entropy(24, v=63, every=0), draws=32),
        Case("16-chunks", _linear_cross_entropy(64, 24, v=100, every=0), {"memory_budget": 4 * 100 * 2}, dtypes=(BF16,), draws=4),
        Case("many-chunks", _linear_cross_entropy(150, 24, v=100), {"memory_budget": SMALL_BUDGET}),
        Case("1000-classes", _linear_cross_entropy(16, 64, v=1000), draws=4),
    ),
    hostile=(
        Case("1e3", _linear_cross_entropy(5, 24, v=63, scale=1e3), {"reduction": "none"}),
        Case("zero", _linear_cross_entropy(5, 24, v=63, scale=0.0), {"reduction": "none"}),
        Case("nan", _linear_cross_entropy(5, 24, v=63, scale=math.nan, every=0), {"reduction": "none"}),
        Case("large-cotangent", _linear_cross_entropy(5, 24, v=63), {"reduction": "none"}, scale=1e4),
        Case("large-cotangent-mean", _linear_cross_entropy(5, 24, v=63), scale=1e4, draws=4),
    ),
    launches=(
        Case("8192x4096x128256", _linear_cross_entropy(8192, 4096, v=128256)),
        Case("16384x2048x32000", _linear_cross_entropy(16384, 2048, v=32000), {"reduction": "none"}),
    ),
    on_gpu=(
        *(Case(f"1000x2048x32000-{r}", _linear_cross_entropy(1000, 2048, v=32000), {"reduction": r}, draws=4) for r in REDUCTIONS),
        *(
            Case(
                f"chunks-4096x1024x50257-{r}",
                _linear_cross_entropy(4096, 1024, v=50257, bias=True),
                {"reduction": r, "memory_budget": 2**25},
            )
            for r in REDUCTIONS
        ),
    ),
    large=Case("large", _linear_cross_entropy(2**31 // 4096 + 3, 4096, v=1000, every=0, exact=True), {"reduction": "none"}, dtypes=(BF16,)),
)

# --- linear_log_prob --------------------------------------------------------------------------------------------------------------------

_OF_LOG_PROB = {"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.8}

LINEAR_LOG_PROB = Table(
    op="linear_log_prob",
    diff=("x", "weight", "bias"),
    autocast=True,
    rows=("x", "target"),
    typical=Case("typical", _linear_cross_entropy(2, 5, 24, v=63, bias=True), {"memory_budget": SMALL_BUDGET, **_OF_LOG_PROB}, draws=8),
    sized=lambda n: Case(f"{n}-rows", _linear_cross_entropy(n, 24, v=40), _OF_LOG_PROB),
    cases=(
        Case("1x63", _linear_cross_entropy(1, 63, v=100, every=0), draws=32),
        Case("9x63", _linear_cross_entropy(9, 63, v=100, bias=True), dtypes=HALVES, draws=8),
        *(
            Case(
                how,
                _linear_cross_entropy(17, 63, v=100, bias=True),
                {"accumulate": how, "memory_budget": SMALL_BUDGET, **_OF_LOG_PROB},
                dtypes=HALVES,
                draws=8,
            )
            for how in ACCUMULATE
        ),
        Case("chunks-all-count", _linear_cross_entropy(17, 63, v=100, every=0), {"memory_budget": SMALL_BUDGET}, draws=8),
        Case("no-rows", _linear_cross_entropy(0, 63, v=100, bias=True)),
        Case("all-ignored", _linear_cross_entropy(5, 24, v=63, every=1, bias=True)),
        Case("3d", _linear_cross_entropy(2, 3, 24, v=63), draws=8),
        Case("shift", _linear_cross_entropy(3, 5, 24, v=63), {"shift": True, "memory_budget": SMALL_BUDGET}, draws=8),
        Case("vector", _linear_cross_entropy(24, v=63, every=0), draws=32),
        Case("one-class", _linear_cross_entropy(7, 24, v=1)),
        Case("1000-classes", _linear_cross_entropy(16, 64, v=1000), draws=4),
    ),
    hostile=(
        Case("1e3", _linear_cross_entropy(5, 24, v=63, scale=1e3), draws=8),
        Case("zero", _linear_cross_entropy(5, 24, v=63, scale=0.0)),
        Case("nan", _linear_cross_entropy(5, 24, v=63, scale=math.nan, every=0)),
        Case("large-cotangent", _linear_cross_entropy(5, 24, v=63), scale=1e4, draws=4),
    ),
    launches=(Case("8192x4096x128256", _linear_cross_entropy(8192, 4096, v=128256), {"accumulate": "exact"}),),
    on_gpu=(
        Case("1000x2048x32000", _linear_cross_entropy(1000, 2048, v=32000), draws=4),
        *(
            Case(
                f"{how}-4096x1024x50257", _linear_cross_entropy(4096, 1024, v=50257, bias=True), {"accumulate": how, "memory_budget": 2**25}
            )
            for how in ACCUMULATE
        ),
    ),
    large=Case("large", _linear_cross_entropy(2**31 // 4096 + 3, 4096, v=1000, every=0, exact=True), dtypes=(BF16,)),
)

# --- softmax ----------------------------------------------------------------------------------------------------------------------------


def _softmax(*shape: int, scale: float = 2.0, shift: float = 0.0) -> Callable[[Maker], Inputs]:
    return lambda m: {"x": m.normal(*shape, scale=scale, shift=shift)}


def _softmax_where(value: float, *shape: int) -> Callable[[Maker], Inputs]:
    """Every third element at a special value."""

    def make(m: Maker) -> Inputs:
        x = m.normal(*shape)
        return {"x": x.masked_fill(torch.arange(shape[-1], device=m.device) % 3 == 1, value)}

    return make


SOFTMAX = Table(
    op="softmax",
    diff=("x",),
    rows=("x",),
    typical=Case("typical", _softmax(2, 5, 63)),
    sized=lambda n: Case(f"{n}-rows", _softmax(n, 3, 40)),
    cases=(
        Case("1x1", _softmax(1, 1), draws=8),
        Case("1x63", _softmax(1, 63), draws=8, dtypes=HALVES),
        Case("7x1000", _softmax(7, 1000), dtypes=HALVES),
        Case("vector", _softmax(63), draws=8),
        Case("no-rows", _softmax(0, 63)),
        Case("no-rows-3d", _softmax(3, 0, 8)),
        Case("64x128", _softmax(64, 128)),
        Case("2x40000", _softmax(2, 40000), draws=4),
    ),
    hostile=(
        Case("1e4", _softmax(5, 63, scale=1e4), dtypes=HALVES),
        Case("shifted", _softmax(5, 63, shift=3e4), dtypes=(FP32, FP16)),
        Case("zero", _softmax(5, 63, scale=0.0)),
        Case("minus-infinity", _softmax_where(-math.inf, 6, 63)),
        Case("minus-infinity-wide", _softmax_where(-math.inf, 2, 40000)),
        Case("nan", _softmax_where(math.nan, 6, 63)),
        Case("infinity", _softmax_where(math.inf, 6, 63)),
        Case("large-cotangent", _softmax(5, 63), scale=1e4),
    ),
    launches=(
        Case("8192x4096", _softmax(8192, 4096)),
        Case("8192x128256", _softmax(8192, 128256)),
        Case("65536x128", _softmax(65536, 128)),
    ),
    on_gpu=(Case("4096x4096", _softmax(4096, 4096)), Case("1000x128256", _softmax(1000, 128256)), Case("70000x127", _softmax(70000, 127))),
    large=Case("large", _softmax(2**31 // 4096 + 3, 4096), dtypes=(BF16,)),
)
