"""The bars that the figures are held to, as data: what a run shows beside its figures, met or not. No test fails over device time.

A bar is of one function, shape and pass; it bounds a quantity of the row of one provider.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from . import table
from .peers import DONATE, LIGER, NATIVE, OURS
from .results import Row
from .table import BOTH, FORWARD, HOST

OF_LIGER, OF_NATIVE = 0.6, 2.2  # of what the host pays liger-kernel for a call and its backward, and PyTorch's own function
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


UNITS = {"over_floor": "÷ floor", "us": "µs", "mib": "MiB", "ours_over_this": "liger_fn ÷ this, host"}
_NORMS = ("8192x4096", "16384x2048", "4096x8192", "2048x16384")
_GLUS = ("swiglu", "geglu")

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
)


def host(op: str) -> list[Bar]:
    """The bars of the host's cost of one function."""
    shape = next(b.shape(b.tiny) for b in table.ALL if b.op == op)
    most = {LIGER: OF_LIGER} | ({NATIVE: OF_NATIVE} if op == "rms_norm" else {})
    return [Bar(op, shape, HOST, provider, "ours_over_this", at_most) for provider, at_most in most.items()]


def every() -> list[Bar]:
    """All bars, of the functions in their order."""
    of_host = [bar for bench in table.present() for bar in host(bench.op)]
    order = [b.op for b in table.ALL]
    return sorted((*DEVICE, *of_host), key=lambda bar: order.index(bar.op))


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Every bar with its figure; one that the run did not measure stays, without."""
    by_key = {r.key: r for r in rows}
    return [Verdict(bar, getattr(by_key.get(bar[:4]), bar.what, None)) for bar in every()]


def cells(verdict: Verdict) -> tuple[str, ...]:
    """(function, shape, pass, provider, bar, measured, met?) in words."""
    bar, found = verdict
    digits = 0 if bar.what in ("us", "mib") else 2
    most, met = f"{bar.most:,.{digits}f}", {True: "yes", False: "**no**", None: "–"}[verdict.met]
    if found is None:
        return *bar[:4], f"≤ {most} {UNITS[bar.what]}", "not measured", met
    while digits < 6 and (round(found, digits) <= bar.most) != verdict.met:
        digits += 1  # as many as it takes to show on which side of the bar it is
    return *bar[:4], f"≤ {most} {UNITS[bar.what]}", f"{found:,.{digits}f}", met


def lines(rows: Sequence[Row]) -> list[str]:
    """The table for a terminal."""
    head = ("op", "shape", "pass", "provider", "bar", "measured", "met?")
    table_of = [head, *(tuple(c.strip("*") for c in cells(v)) for v in verdicts(rows))]
    widths = [max(len(row[i]) for row in table_of) for i in range(len(head))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table_of]
