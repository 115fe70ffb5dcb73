"""The bars that the figures are held to, as data: what a run shows beside its figures, met or not. No test fails over device time.

A bar is of one function, shape and pass; it bounds a quantity of the row of one provider, or of that peer whose row has most of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from . import table
from .peers import DONATE, EXACT, FP32, LIGER, LIGER_FP32, MINE, NATIVE, OURS, WEIGHT, WEIGHT_64
from .results import Row
from .table import BOTH, EXPERTS_BOTH, EXPERTS_SKEWED, FORWARD, HEAD_BOTH, HEAD_FORWARD, HEAD_FROZEN, HEAD_HALF, HOST

OF_LIGER, OF_NATIVE = 0.6, 2.2  # of what the host pays liger-kernel for a call and its backward, and PyTorch's own function
BEST = "the best peer"  # as provider: of what ours has over a peer's, the largest
STATISTICS = 1.0  # MiB that numbers kept for each row may take, beside the arrays that a bar of memory counts


class Bar(NamedTuple):
    """At most `most`."""

    op: str
    shape: str
    mode: str
    provider: str  # whose row; of the host's cost, over whose ours is taken
    what: str  # a property of the row
    most: float


class Verdict(NamedTuple):
    """A bar and its figure, None where the run has none."""

    bar: Bar
    found: float | None

    @property
    def met(self) -> bool | None:
        return None if self.found is None else self.found <= self.bar.most


UNITS = {
    "over_floor": "÷ floor", "us": "µs", "mib": "MiB", "ours_over_this": "liger_fn ÷ this", "ours_mib_over_this": "liger_fn ÷ this, MiB",
    "over_balanced": "÷ balanced",
}  # fmt: skip
_NORMS = ("8192x4096", "16384x2048", "4096x8192", "2048x16384")
_GLUS = ("swiglu", "geglu")

_HEADS = {  # over the products: time and MiB of workspace of "weight", time of "fp32", time and MiB of "exact"
    "8192x4096x128256": (1.12, 256.0, 1.15, 1.42, 384.0),
    "16384x4096x128256": (1.10, 256.0, 1.15, 1.42, 512.0),
    "16384x2048x128256": (1.15, 256.0, 1.20, 1.45, 384.0),
    "32768x2304x256000": (1.12, 512.0, 1.18, 1.42, 512.0),
    "16384x2048x32000": (1.20, 128.0, 1.25, 1.50, 256.0),
}
OF_LIGER_FP32 = 0.75  # of the time of liger-kernel with sums as exact, for no more memory
UPSTREAM = 1.82  # liger-kernel's time over the products' at the first shape


def _head(shape: str) -> tuple[Bar, ...]:
    weight, weight_mib, fp32, exact, exact_mib = _HEADS[shape]
    whole = "linear_cross_entropy", shape, HEAD_BOTH
    return (
        Bar(*whole, WEIGHT, "over_floor", weight),
        Bar(*whole, WEIGHT, "mib", weight_mib),
        Bar(*whole, FP32, "over_floor", fp32),
        Bar(*whole, EXACT, "over_floor", exact),
        Bar(*whole, EXACT, "mib", exact_mib),
        Bar(*whole, LIGER_FP32, "ours_over_this", OF_LIGER_FP32),
        Bar(*whole, LIGER_FP32, "ours_mib_over_this", 1.0),
    )


def _skipping(shape: str) -> tuple[Bar, ...]:
    """What is not wanted costs nothing; and what 64 MiB of logits cost."""
    each = (HEAD_HALF, WEIGHT, 0.62, 256.0), (HEAD_FORWARD, OURS, 1.15, 256.0), (HEAD_FROZEN, OURS, 1.15, 256.0)
    op = "linear_cross_entropy"
    time = (Bar(op, shape, mode, who, "over_floor", most) for mode, who, most, _ in each)
    memory = (Bar(op, shape, mode, who, "mib", most) for mode, who, _, most in each)
    return *time, *memory, Bar(op, shape, HEAD_BOTH, WEIGHT_64, "over_floor", UPSTREAM)


EXPERTS = "moe_experts"
_QWEN3, _MIXTRAL = "T32768 E128 k8 H2048 I768", "T4096 E8 k2 H4096 I14336"
_EXPERTS = (
    Bar(EXPERTS, _QWEN3, EXPERTS_BOTH, BEST, "ours_over_this", 0.9),
    Bar(EXPERTS, _QWEN3, EXPERTS_BOTH, BEST, "ours_mib_over_this", 1.0),
    Bar(EXPERTS, _QWEN3, EXPERTS_BOTH, OURS, "over_floor", 1 / 0.7),  # 70 % of the dense products' rate
    Bar(EXPERTS, _MIXTRAL, EXPERTS_BOTH, OURS, "over_floor", 1.15),
    *(Bar(EXPERTS, shape, EXPERTS_SKEWED, OURS, "over_balanced", 1.3) for shape in (_QWEN3, _MIXTRAL)),
)

DEVICE = (
    *(Bar("rms_norm", shape, FORWARD, OURS, "over_floor", 1.08) for shape in _NORMS),
    *(Bar("rms_norm", shape, BOTH, OURS, "over_floor", 1.14) for shape in _NORMS),
    Bar("rms_norm", "65536x128", BOTH, OURS, "us", 40.0),
    *(Bar(op, "8192x4096", BOTH, OURS, "over_floor", 1.15) for op in ("add_rms_norm", "layer_norm", "softmax")),
    Bar("rope", "4x4096 q32 k8 d128", BOTH, OURS, "over_floor", 1.08),
    *(Bar(op, "8192x14336", BOTH, OURS, "over_floor", 1.03) for op in _GLUS),
    *(Bar(op, "8192x14336", BOTH, OURS, "mib", 672.0 + STATISTICS) for op in _GLUS),  # the output and both gradients
    *(Bar(op, "8192x14336", BOTH, DONATE, "mib", 224.0 + STATISTICS) for op in _GLUS),  # the output
    Bar("cross_entropy", "8192x128256", BOTH, OURS, "over_floor", 1.03),
    Bar("cross_entropy", "8192x128256", BOTH, OURS, "us", 2160.0),
    Bar("cross_entropy", "8192x128256", BOTH, OURS, "mib", 2004.0 + STATISTICS),  # one gradient
    Bar("cross_entropy", "8192x128256", BOTH, DONATE, "us", 1700.0),
    Bar("cross_entropy", "8192x128256", BOTH, DONATE, "mib", STATISTICS),
    Bar("cross_entropy", "8192x32000", BOTH, OURS, "us", 550.0),
    *(bar for shape in _HEADS for bar in _head(shape)),
    *_skipping(next(iter(_HEADS))),
    *_EXPERTS,
)


def host(op: str) -> list[Bar]:
    """The bars of the host's cost of one function."""
    shape = next(b.shape(b.tiny) for b in table.ALL if b.op == op)
    most = {LIGER: OF_LIGER} | ({NATIVE: OF_NATIVE} if op == "rms_norm" else {})
    return [Bar(op, shape, HOST, provider, "ours_over_this", at_most) for provider, at_most in most.items()]


def every() -> list[Bar]:
    """All bars, of the functions in their order."""
    of_host = [bar for bench in table.present() for bar in host(bench.op)]
    order = [*(b.op for b in table.ALL), EXPERTS]
    return sorted((*DEVICE, *of_host), key=lambda bar: order.index(bar.op))


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Every bar of the functions that the run has rows of, with its figure; one that it did not measure stays, without."""
    rows = list({r.key: r for r in rows}.values())
    ops = {r.op for r in rows}
    return [Verdict(bar, _figure(bar, rows)) for bar in every() if bar.op in ops]


def _figure(bar: Bar, rows: Sequence[Row]) -> float | None:
    """Of ours over a peer's figure, the largest is that over the best peer's."""
    found = [r for r in rows if r.key[:3] == bar[:3] and (r.provider not in MINE if bar.provider == BEST else r.provider == bar.provider)]
    return max((v for r in found if (v := getattr(r, bar.what)) is not None), default=None)


def cells(verdict: Verdict) -> tuple[str, ...]:
    """(function, shape, pass, provider, bar, measured, met?) in words."""
    bar, found = verdict
    digits, unit = 0 if bar.what in ("us", "mib") else 2, UNITS[bar.what] + (", host" if bar.mode == HOST else "")
    most, met = f"{bar.most:,.{digits}f}", {True: "yes", False: "**no**", None: "–"}[verdict.met]
    if found is None:
        return *bar[:4], f"≤ {most} {unit}", "not measured", met
    while digits < 6 and (round(found, digits) <= bar.most) != verdict.met:
        digits += 1  # as many as it takes to show on which side of the bar it is
    return *bar[:4], f"≤ {most} {unit}", f"{found:,.{digits}f}", met


def lines(rows: Sequence[Row]) -> list[str]:
    """The table for a terminal."""
    head = ("op", "shape", "pass", "provider", "bar", "measured", "met?")
    table_of = [head, *(tuple(c.strip("*") for c in cells(v)) for v in verdicts(rows))]
    widths = [max(len(row[i]) for row in table_of) for i in range(len(head))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table_of]
