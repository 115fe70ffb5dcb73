"""Cases of distillation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .table import BF16, FP16, FP32, HALVES, Case, Inputs, Maker, Table

REDUCTIONS = ("mean", "sum", "none")
DIVERGENCES = ("kl", "reverse_kl", "jsd", "tvd")
BUDGET = 2 * 4 * 100 * 3  # three fp32 rows of a hundred classes, of both heads: several chunks


def _distill(
    *shape: int, teacher: int = 40, v: int, bias: bool = False, every: int = 3, scale: float = 1.0, weights: bool = False, items: int = 0
) -> Callable[[Maker], Inputs]:  # fmt: skip
    """Hidden states and a head for student and teacher, whose logits have a spread of a few; no targets where `every` is 0."""

    def make(m: Maker) -> Inputs:
        *rows, h = shape
        inputs: Inputs = {
            "x": m.normal(*shape, scale=scale),
            "weight": m.normal(v, h, scale=2 / math.sqrt(h)),
            "x_teacher": m.normal(*rows, teacher, scale=scale),
            "weight_teacher": m.normal(v, teacher, scale=2 / math.sqrt(teacher)),
            "target": m.targets(*rows, classes=v, every=every) if every else None,
            "bias": m.normal(v) if bias else None,
            "bias_teacher": m.normal(v) if bias else None,
        }
        if weights:
            inputs["token_weight"] = torch.linspace(0.5, 1.5, math.prod(rows), device=m.device).view(rows)
        if items:
            inputs["num_items"] = torch.tensor(items, device=m.device)
        return inputs

    return make


def _without(student: bool, teacher: bool, *shape: int, v: int) -> Callable[[Maker], Inputs]:
    """Every third class has a logit of −inf: the student's, the teacher's, or both; among others, where it is both."""

    def make(m: Maker) -> Inputs:
        inputs = _distill(*shape, v=v, bias=True)(m)
        column = torch.arange(v, device=m.device)
        for name, some, k in (("bias", student, 1), ("bias_teacher", teacher, 1 if student else 2)):
            bias = inputs[name]
            assert bias is not None
            inputs[name] = bias.masked_fill(column % 3 == k, -math.inf) if some else bias
        return inputs

    return make


def _alike(*shape: int, v: int, by: float) -> Callable[[Maker], Inputs]:
    """A teacher that differs from the student by little, in its bias; in fp32 the differences are exact."""

    def make(m: Maker) -> Inputs:
        inputs = _distill(*shape, teacher=shape[-1], v=v, bias=True)(m)
        x, weight, bias = (inputs[k] for k in ("x", "weight", "bias"))
        assert x is not None
        assert weight is not None
        assert bias is not None
        return {**inputs, "x": x * 0, "x_teacher": x * 0, "weight_teacher": weight, "bias_teacher": bias + m.normal(v, scale=by)}

    return make


EVERYTHING = {"divergence": "jsd", "beta": 0.3, "temperature": 2.5}

LINEAR_DISTILL = Table(
    op="linear_distill",
    diff=("x", "weight", "bias"),
    autocast=True,
    rows=("x", "x_teacher", "target"),
    typical=Case(
        "typical", _distill(2, 5, 24, v=63, bias=True, weights=True), {**EVERYTHING, "reduction": "none", "memory_budget": BUDGET}
    ),
    sized=lambda n: Case(f"{n}-rows", _distill(n, 24, v=40)),
    cases=(
        *(Case(f"9x63-kl-{r}", _distill(9, 63, v=100, bias=True), {"reduction": r}, draws=12) for r in REDUCTIONS),
        *(
            Case(f"9x63-{d}", _distill(9, 63, v=100, bias=True), {"divergence": d, "reduction": "none"}, dtypes=HALVES, draws=12)
            for d in DIVERGENCES[1:]
        ),
        *(
            Case(f"warm-{d}", _distill(12, 24, v=63), {"divergence": d, "temperature": 3.0, "reduction": "none"}, dtypes=(FP32,), draws=4)
            for d in DIVERGENCES
        ),
        *(
            Case(
                f"chunks-{d}",
                _distill(17, 63, v=100, bias=True, weights=True, items=7),
                {"divergence": d, "memory_budget": BUDGET},
                draws=4,
            )
            for d in DIVERGENCES
        ),
        *(Case(f"alike-{d}", _alike(9, 24, v=63, by=1e-4), {"divergence": d, "reduction": "none"}, draws=4) for d in DIVERGENCES),
        Case("one-row", _distill(1, 63, v=100, every=0), draws=32),
        *(Case(f"no-rows-{r}", _distill(0, 63, v=100, bias=True), {"reduction": r}) for r in REDUCTIONS),
        *(Case(f"no-target-{r}", _distill(5, 24, v=63, every=0), {**EVERYTHING, "reduction": r}, draws=8) for r in REDUCTIONS),
        *(Case(f"all-ignored-{r}", _distill(5, 24, v=63, every=1, bias=True), {"reduction": r}) for r in REDUCTIONS),
        Case("everything", _distill(2, 9, 24, v=63, bias=True, weights=True, items=7), {**EVERYTHING, "save": "recompute"}, draws=8),
        Case("weights-fp16", _distill(9, 24, v=63, weights=True), EVERYTHING, dtypes=(FP16,), draws=8),
        Case("beta-0.9", _distill(9, 24, v=63), {"divergence": "jsd", "beta": 0.9}, draws=8),
        Case("one-row-budget", _distill(5, 24, v=63), {"memory_budget": 1}, draws=8),
        Case("vector", _distill(24, v=63, every=0), {**EVERYTHING, "reduction": "none"}, draws=32),
        Case("one-class", _distill(4, 24, v=1), draws=4),
        Case("many-chunks", _distill(70, 24, v=100), {"memory_budget": BUDGET}),
        Case("many-chunks-fp32", _distill(70, 24, v=100), {"memory_budget": BUDGET, "accumulate": "fp32", "reduction": "none"}),
        Case("1000-classes", _distill(16, 64, v=1000), {"divergence": "reverse_kl", "memory_budget": 10 * BUDGET}, draws=4),
        # A row at a time, which makes the sums over 9000 classes short: in a long one the order of a sum is all that would show.
        *(
            Case(
                f"9000-classes-{d}",
                _distill(2, 8, teacher=8, v=9000, every=0),
                {"divergence": d, "memory_budget": 1},
                dtypes=(FP32,),
                draws=2,
            )
            for d in DIVERGENCES
        ),
    ),
    hostile=(
        *(Case(f"1e3-{d}", _distill(5, 24, v=63, scale=1e3), {"divergence": d, "reduction": "none"}) for d in DIVERGENCES),
        *(Case(f"zero-{d}", _distill(5, 24, v=63, scale=0.0), {"divergence": d, "reduction": "none"}) for d in DIVERGENCES),
        *(Case(f"nan-{d}", _distill(5, 24, v=63, scale=math.nan, every=0), {"divergence": d, "reduction": "none"}) for d in DIVERGENCES),
        *(
            Case(f"minus-infinity-of-{name}-{d}", _without(student, teacher, 30, 24, v=63), {"divergence": d, "reduction": "none"})
            for d in DIVERGENCES
            for name, student, teacher in (("student", True, False), ("teacher", False, True), ("both", True, True))
        ),
        Case("large-cotangent", _distill(5, 24, v=63), {"reduction": "none"}, scale=1e4),
        Case("large-cotangent-mean", _distill(60, 24, v=63), EVERYTHING, scale=1e4),
    ),
    launches=(
        Case("8192x4096x128256", _distill(8192, 4096, teacher=8192, v=128256)),
        *(Case(f"8192x2048x32000-{d}", _distill(8192, 2048, teacher=4096, v=32000), {"divergence": d}) for d in DIVERGENCES[1:]),
        Case("8192x2048x32000-none", _distill(8192, 2048, teacher=4096, v=32000), {**EVERYTHING, "reduction": "none"}),
    ),
    on_gpu=(
        *(Case(f"1000x2048x32000-{d}", _distill(1000, 2048, teacher=1024, v=32000), {"divergence": d}, draws=2) for d in DIVERGENCES),
        *(
            Case(
                f"chunks-2048x1024x50257-{r}",
                _distill(2048, 1024, teacher=2048, v=50257, bias=True),
                {**EVERYTHING, "reduction": r, "memory_budget": 2**26},
            )
            for r in REDUCTIONS
        ),
    ),
    large=Case("large", _distill(2**31 // 4096 + 3, 4096, teacher=64, v=1000, every=0), {"reduction": "none"}, dtypes=(BF16,)),
)
