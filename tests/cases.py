"""Named shapes, dtypes and options for every op, as data: tests, the offline compiler and benchmarks all draw from here.

A new op is a `Table` here: what it is called, which arguments have gradients, and its cases. A case makes the arguments by name, from a
`Maker` that knows the device, the dtype and the seed; on the "meta" device the same case is shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor | None]

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
HALVES = (FP32, BF16, FP16)
IGNORED = -100


@dataclass(frozen=True)
class Maker:
    """Draws tensors: the same numbers for the same seed, every time."""

    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    _generators: list[torch.Generator] = field(default_factory=list)

    def _draw(self, fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if self.device.type == "meta":
            return fn(*args, device="meta", **kwargs)
        if not self._generators:
            self._generators.append(torch.Generator(self.device).manual_seed(self.seed))
        return fn(*args, device=self.device, generator=self._generators[0], **kwargs)

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, rounded to the dtype."""
        dtype = dtype or self.dtype
        x = self._draw(torch.randn, shape, dtype=dtype)
        return x if scale == 1.0 and shift == 0.0 else x.mul_(scale).add_(shift)

    def targets(self, *shape: int, classes: int, every: int = 3) -> Tensor:
        """Class numbers; of any `every` in a row one is ignored (none where that is 0)."""
        target = self._draw(torch.randint, classes, shape)
        if every and self.device.type != "meta":
            target.view(-1)[every - 1 :: every] = IGNORED
        return target

    def full(self, *shape: int, value: float) -> Tensor:
        return torch.full(shape, value, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Case:
    """One input: what to call it, how to make it, what to call the op with besides, and in which dtypes."""

    name: str
    make: Callable[[Maker], Inputs]
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (FP32, BF16)
    draws: int = 1  # how many inputs the numerics are judged over: a norm of few numbers is luck
    scale: float = 1.0  # of the cotangent


@dataclass(frozen=True)
class Table:
    """All that the contract knows of one op."""

    op: str
    diff: tuple[str, ...]
    rows: tuple[str, ...]  # arguments whose first axis counts independent rows
    typical: Case  # the one that the transforms and compilers run: small, every argument present
    sized: Callable[[int], Case]  # the same function at another number of rows
    cases: tuple[Case, ...]
    hostile: tuple[Case, ...]  # magnitudes and special values: finite where the reference is, NaN where it is
    launches: tuple[Case, ...]  # realistic sizes: what ships, and what is worth timing
    on_gpu: tuple[Case, ...]  # numerics at sizes that the interpreter is too slow for
    large: Case  # more than 2^31 elements, outputs by row
    linear: bool = False  # in its differentiable arguments
    autocast: bool = False  # takes part in autocast as a matrix product does


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

# --- swiglu -----------------------------------------------------------------------------------------------------------------------------


def _swiglu(*shape: int, scale: float = 1.0) -> Callable[[Maker], Inputs]:
    return lambda m: {"gate": m.normal(*shape, scale=scale), "up": m.normal(*shape)}


def _swiglu_of(value: float, *shape: int) -> Callable[[Maker], Inputs]:
    return lambda m: {"gate": m.full(*shape, value=value), "up": m.normal(*shape)}


SWIGLU = Table(
    op="swiglu",
    diff=("gate", "up"),
    rows=(
        "gate",
        "up",
    ),
    typical=Case("typical", _swiglu(2, 5, 63)),
    sized=lambda n: Case(f"{n}-rows", _swiglu(n, 3, 40)),
    cases=(
        Case("1x1", _swiglu(1, 1), draws=32),
        Case("1x63", _swiglu(1, 63), draws=4, dtypes=HALVES),
        Case("7x1000", _swiglu(7, 1000), dtypes=HALVES),
        Case("3x5000", _swiglu(3, 5000)),
        Case("vector", _swiglu(63), draws=4),
        Case("no-rows", _swiglu(0, 63)),
        Case("no-columns", _swiglu(3, 0)),
        Case("64x128", _swiglu(64, 128)),
    ),
    hostile=(
        Case("1e4", _swiglu(3, 63, scale=1e4), dtypes=HALVES),
        Case("1e-4", _swiglu(3, 63, scale=1e-4), dtypes=HALVES),
        Case("zero", _swiglu_of(0.0, 3, 63)),
        Case("minus-200", _swiglu_of(-200.0, 3, 63), dtypes=HALVES),  # exp(200) is beyond fp32
        Case("nan", _swiglu_of(math.nan, 3, 63)),
        Case("large-cotangent", _swiglu(3, 63), scale=1e4),
    ),
    launches=(Case("8192x14336", _swiglu(8192, 14336)), Case("16384x8192", _swiglu(16384, 8192))),
    on_gpu=(Case("1000x14336", _swiglu(1000, 14336)), Case("3x1000x5000", _swiglu(3, 1000, 5000))),
    large=Case("large", _swiglu(2**31 // 8192 + 3, 8192), dtypes=(BF16,)),
)

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

# --- cross_entropy ----------------------------------------------------------------------------------------------------------------------


def _cross_entropy(*shape: int, every: int = 3, scale: float = 2.0, shift: float = 0.0) -> Callable[[Maker], Inputs]:
    return lambda m: {
        "logits": m.normal(*shape, scale=scale, shift=shift),
        "target": m.targets(*shape[:-1], classes=shape[-1], every=every),
    }


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

CROSS_ENTROPY = Table(
    op="cross_entropy",
    diff=("logits",),
    rows=(
        "logits",
        "target",
    ),
    typical=Case("typical", _cross_entropy(2, 5, 63)),
    sized=lambda n: Case(f"{n}-rows", _cross_entropy(n, 40)),
    cases=(
        *(Case(f"1x63-{r}", _cross_entropy(1, 63, every=0), {"reduction": r}, draws=32) for r in REDUCTIONS),
        *(Case(f"7x1000-{r}", _cross_entropy(7, 1000), {"reduction": r}, dtypes=HALVES, draws=8) for r in REDUCTIONS),
        *(Case(f"3d-{r}", _cross_entropy(2, 3, 63), {"reduction": r}, draws=8) for r in REDUCTIONS),
        *(Case(f"no-rows-{r}", _cross_entropy(0, 63), {"reduction": r}) for r in REDUCTIONS),
        *(Case(f"all-ignored-{r}", _cross_entropy(5, 63, every=1), {"reduction": r}) for r in REDUCTIONS),
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
        Case("large-cotangent", _cross_entropy(5, 63), {"reduction": "none"}, scale=1e4),
    ),
    launches=(
        Case("8192x128256", _cross_entropy(8192, 128256)),
        Case("8192x32000", _cross_entropy(8192, 32000)),
        Case("4096x1000", _cross_entropy(4096, 1000), {"reduction": "none"}),
    ),
    on_gpu=(
        *(Case(f"1000x128256-{r}", _cross_entropy(1000, 128256), {"reduction": r}, draws=4) for r in REDUCTIONS),
        Case("63x262145", _cross_entropy(63, 262145), {"reduction": "none"}),
    ),
    large=Case("large", _cross_entropy(2**31 // 128256 + 3, 128256, every=0), {"reduction": "none"}, dtypes=(BF16,)),
)

# --- linear_cross_entropy ---------------------------------------------------------------------------------------------------------------


def _linear_cross_entropy(
    *shape: int, v: int, bias: bool = False, every: int = 3, scale: float = 1.0
) -> Callable[[Maker], Inputs]:  # fmt: skip
    """Hidden states and a head whose logits have a spread of a few."""

    def make(m: Maker) -> Inputs:
        h = shape[-1]
        return {
            "x": m.normal(*shape, scale=scale),
            "weight": m.normal(v, h, scale=2 / math.sqrt(h)),
            "target": m.targets(*shape[:-1], classes=v, every=every),
            "bias": m.normal(v) if bias else None,
        }

    return make


SMALL_BUDGET = 4 * 100 * 3  # three fp32 rows of a hundred classes: several chunks

LINEAR_CROSS_ENTROPY = Table(
    op="linear_cross_entropy",
    diff=("x", "weight", "bias"),
    autocast=True,
    rows=(
        "x",
        "target",
    ),
    typical=Case("typical", _linear_cross_entropy(2, 5, 24, v=63, bias=True), {"reduction": "none", "memory_budget": SMALL_BUDGET}),
    sized=lambda n: Case(f"{n}-rows", _linear_cross_entropy(n, 24, v=40)),
    cases=(
        *(Case(f"1x63-{r}", _linear_cross_entropy(1, 63, v=100, every=0), {"reduction": r}, draws=32) for r in REDUCTIONS),
        *(Case(f"9x63-{r}", _linear_cross_entropy(9, 63, v=100, bias=True), {"reduction": r}, dtypes=HALVES, draws=8) for r in REDUCTIONS),
        *(
            Case(f"chunks-{r}", _linear_cross_entropy(17, 63, v=100, bias=True), {"reduction": r, "memory_budget": SMALL_BUDGET}, draws=8)
            for r in REDUCTIONS
        ),
        *(Case(f"no-rows-{r}", _linear_cross_entropy(0, 63, v=100, bias=True), {"reduction": r}) for r in REDUCTIONS),
        *(Case(f"all-ignored-{r}", _linear_cross_entropy(5, 24, v=63, every=1, bias=True), {"reduction": r}) for r in REDUCTIONS),
        Case("one-row-budget", _linear_cross_entropy(5, 24, v=63), {"memory_budget": 1}, draws=8),
        Case("3d", _linear_cross_entropy(2, 3, 24, v=63), draws=8),
        Case("vector", _linear_cross_entropy(24, v=63, every=0), draws=32),
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
    large=Case("large", _linear_cross_entropy(2**31 // 4096 + 3, 4096, v=1000, every=0), {"reduction": "none"}, dtypes=(BF16,)),
)

TABLES = {t.op: t for t in (RMS_NORM, SWIGLU, ROPE, CROSS_ENTROPY, LINEAR_CROSS_ENTROPY)}
