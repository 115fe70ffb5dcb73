"""Cases of distillation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .table import BF16, FP16, FP32, Case, Inputs, Maker, Table

REDUCTIONS = ("mean", "sum", "none")
DIVERGENCES = ("kl", "reverse_kl", "jsd", "tvd")
BUDGET = 2 * 4 * 100 * 3  # three fp32 rows of a hundred classes, of both heads: several chunks


def _distill(
    *shape: int, teacher: int = 40, v: int, bias: bool = False, every: int = 3, scale: float = 1.0, weights: bool = False, items: int = 0,
    exact: bool = True,
) -> Callable[[Maker], Inputs]:  # fmt: skip
    """Hidden states and a head for student and teacher, whose logits have a spread of a few; no targets where `every` is 0.

    Unless not `exact`, hidden states are ±scale, and weights are of so few bits that no dtype rounds a logit. What it does round off, in a
    product that is the library's, is the same in plain PyTorch, and hides all else: a verdict on a loss or two would then be luck.
    """

    def make(m: Maker) -> Inputs:
        *rows, h = shape

        def states(*shape: int) -> Tensor:
            return m.normal(*shape).sign_().mul_(scale) if exact else m.normal(*shape, scale=scale)

        def weight(*shape: int, scale: float = 1.0) -> Tensor:
            return m.normal(*shape, scale=16 * scale).round_().div_(16) if exact else m.normal(*shape, scale=scale)

        inputs: Inputs = {
            "x": states(*shape),
            "weight": weight(v, h, scale=2 / math.sqrt(h)),
            "x_teacher": states(*rows, teacher),
            "weight_teacher": weight(v, teacher, scale=2 / math.sqrt(teacher)),
            "target": m.targets(*rows, classes=v, every=every) if every else None,
            "bias": weight(v) if bias else None,
            "bias_teacher": weight(v) if bias else None,
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
        inputs = _distill(*shape, v=v, bias=True, scale=0.5)(m)
        column = torch.arange(v, device=m.device)
        for name, some, k in (("bias", student, 1), ("bias_teacher", teacher, 1 if student else 2)):
            bias = inputs[name]
            assert bias is not None
            inputs[name] = bias.masked_fill(column % 3 == k, -math.inf) if some else bias
        return inputs

    return make


def _alike(*shape: int, v: int, by: float) -> Callable[[Maker], Inputs]:
    """A teacher that differs from the student by little, in its bias, and nowhere by so little that a rounding hides in which direction."""

    def make(m: Maker) -> Inputs:
        inputs = _distill(*shape, teacher=shape[-1], v=v, bias=True, exact=False)(m)
        x, weight, bias = (inputs[k] for k in ("x", "weight", "bias"))
        assert x is not None
        assert weight is not None
        assert bias is not None
        apart = m.normal(v)
        apart = (apart + apart.sign()) * (bias.abs() * torch.finfo(m.dtype).eps).clamp(min=by)
        return {**inputs, "x": x * 0, "x_teacher": x * 0, "weight_teacher": weight, "bias_teacher": bias + apart}

    return make


def _few(*shape: int, v: int) -> Callable[[Maker], Inputs]:
    """Only every 61st class has weights, the others' logits are their biases: of a sum over more, its order is all that would show."""

    def make(m: Maker) -> Inputs:
        inputs = _distill(*shape, v=v, bias=True, scale=0.5)(m)
        for name in ("weight", "weight_teacher"):
            weight = inputs[name]
            assert weight is not None
            inputs[name] = weight * (torch.arange(v, device=m.device) % 61 == 0).unsqueeze(-1)
        return inputs

    return make


EVERYTHING = {"divergence": "jsd", "beta": 0.3, "temperature": 2.5}

LINEAR_DISTILL = Table(
    op="linear_distill",
    diff=("x", "weight", "bias"),
    autocast=True,
    rows=("x", "x_teacher", "target"),
    typical=Case(
        "typical", _distill(2, 5, 24, v=63, bias=True, weights=True), {**EVERYTHING, "reduction": "none", "memory_budget": BUDGET}, draws=2
    ),
    sized=lambda n: Case(f"{n}-rows", _distill(n, 24, v=40)),
    cases=(
        # Where several cases show the same, not all are in every dtype: a row is a program, and slow in the interpreter.
        *(
            Case(
                f"9x63-kl-{r}", _distill(9, 63, v=100, bias=True), {"reduction": r}, dtypes=(FP32,) if r == "sum" else (FP32, BF16), draws=8
            )
            for r in REDUCTIONS
        ),
        *(
            Case(f"9x63-{d}", _distill(9, 63, v=100, bias=True), {"divergence": d, "reduction": "none"}, dtypes=(BF16, FP16), draws=8)
            for d in DIVERGENCES[1:]
        ),
        *(
            Case(f"warm-{d}", _distill(12, 24, v=63), {"divergence": d, "temperature": 3.0, "reduction": "none"}, dtypes=(FP32,), draws=4)
            for d in DIVERGENCES
        ),
        Case("rounded-logits", _distill(150, 63, v=100, exact=False), {"divergence": "reverse_kl", "reduction": "none"}, dtypes=(FP32,)),
        *(
            Case(
                f"chunks-{d}",
                _distill(17, 63, v=100, bias=True, weights=True, items=7),
                {"divergence": d, "memory_budget": BUDGET},
                draws=8,
            )
            for d in DIVERGENCES
        ),
        *(
            Case(
                f"alike-{d}",
                _alike(1, 24, v=63, by=1e-4),
                {"divergence": d, "reduction": "none"},
                dtypes=(FP32, BF16) if d == "kl" else (FP32,),
                draws=48,
            )
            for d in DIVERGENCES
        ),
        Case("one-row", _distill(1, 63, v=100, every=0), draws=24),
        *(Case(f"no-rows-{r}", _distill(0, 63, v=100, bias=True), {"reduction": r}) for r in REDUCTIONS),
        *(
            Case(f"no-target-{r}", _distill(5, 24, v=63, every=0), {**EVERYTHING, "reduction": r}, dtypes=(FP32,), draws=8)
            for r in ("mean", "none")
        ),
        *(Case(f"all-ignored-{r}", _distill(5, 24, v=63, every=1, bias=True), {"reduction": r}) for r in REDUCTIONS),
        Case(
            "everything",
            _distill(2, 9, 24, v=63, bias=True, weights=True, items=7),
            {**EVERYTHING, "save": "recompute"},
            dtypes=(FP32,),
            draws=8,
        ),
        Case("weights-fp16", _distill(9, 24, v=63, weights=True), EVERYTHING, dtypes=(FP16,), draws=8),
        Case("beta-0.9", _distill(9, 24, v=63), {"divergence": "jsd", "beta": 0.9}, dtypes=(FP32,), draws=16),
        Case("one-row-budget", _distill(5, 24, v=63), {"memory_budget": 1}, dtypes=(FP32,), draws=8),
        Case("vector", _distill(24, v=63, every=0), {**EVERYTHING, "reduction": "none"}, dtypes=(FP32,), draws=24),
        Case("one-class", _distill(4, 24, v=1), draws=4),
        Case("many-chunks", _distill(70, 24, v=100), {"memory_budget": BUDGET}, dtypes=(BF16,), draws=2),
        Case(
            "many-chunks-fp32",
            _distill(70, 24, v=100),
            {"memory_budget": BUDGET, "accumulate": "fp32", "reduction": "none"},
            dtypes=(BF16,),
        ),
        Case("1000-classes", _few(6, 64, v=1000), {"divergence": "reverse_kl", "memory_budget": 10 * BUDGET}, dtypes=(FP32,), draws=12),
        *(
            Case(f"9000-classes-{d}", _few(2, 8, v=9000), {"divergence": d, "memory_budget": 1}, dtypes=(FP32,), draws=24)
            for d in DIVERGENCES
        ),
    ),
    hostile=(
        # Of reverse_kl, larger logits leave fp64 no digit of the gradient.
        *(
            Case(
                f"large-{d}",
                _distill(5, 24, v=63, scale=16.0 if d == "reverse_kl" else 1024.0),
                {"divergence": d, "reduction": "none"},
                draws=8,
            )
            for d in DIVERGENCES
        ),
        *(Case(f"zero-{d}", _distill(5, 24, v=63, scale=0.0), {"divergence": d, "reduction": "none"}) for d in DIVERGENCES),
        *(
            Case(f"nan-{d}", _distill(5, 24, v=63, scale=math.nan, every=0), {"divergence": d, "reduction": "none"}, dtypes=(FP32,))
            for d in DIVERGENCES
        ),
        *(
            Case(
                f"minus-infinity-of-{name}-{d}",
                _without(student, teacher, 9, 24, v=63),
                {"divergence": d, "reduction": "none", "temperature": 1.0 if student else 1.5},
                dtypes=(FP32, BF16) if name == "both" else (FP32,),
                draws=6,
            )
            for d in DIVERGENCES
            for name, student, teacher in (("student", True, False), ("teacher", False, True), ("both", True, True))
        ),
        Case("large-cotangent", _distill(5, 24, v=63), {"reduction": "none"}, dtypes=(BF16,), draws=16, scale=1e4),
        Case("large-cotangent-mean", _distill(30, 24, v=63), EVERYTHING, dtypes=(BF16,), draws=6, scale=1e4),
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
                _distill(2048, 1024, teacher=2048, v=50257, bias=True, exact=r != "none"),
                {**EVERYTHING, "reduction": r, "memory_budget": 2**26},
            )
            for r in REDUCTIONS
        ),
    ),
    large=Case("large", _distill(2**31 // 4096 + 3, 4096, teacher=64, v=1000, every=0), {"reduction": "none"}, dtypes=(BF16,)),
)
