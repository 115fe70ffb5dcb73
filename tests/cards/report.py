"""From the kept errors to docs/numerics.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from tests.bench.results import ROOT

from .kept import Cards
from .measure import Line

DTYPES = ("float64", "float32", "bfloat16", "float16")
PAGE = ROOT / "docs" / "numerics.md"
HEAD = """# Numerics

The error of every output and gradient of every function against fp64, over the cases of the tests. Made by `make cards` on the machine
named below; edit `tests/cards`, not this page.

Inputs are rounded to their dtype first; truth is the plain PyTorch definition of the same numbers in fp64, *plain* is that definition in
the dtype itself, and *ours* is the function. An error is a number of roundings: ‖y − truth‖ ÷ (u ‖truth‖), where u is half the spacing of
the output's dtype at 1 (fp32 6.0e-8, bf16 3.9e-3, fp16 4.9e-4). What is right to the last bit has an error below 1. The rule that every
test holds a function to is

    ‖ours − truth‖  ≤  ‖plain − truth‖ + u ‖truth‖

*share* is the left side over the right, in the case where it is largest, which is named: 1.00 is all that is allowed. *median* and *worst*
are over the cases. Where an output is wider than the inputs, as fp32 gradients of a router's weights over rows of bf16, its roundings
are finer than the noise of what it is made of; and a bound that clamps (gpt-oss) tells apart numbers that rounding has moved across it,
in both. Functions over a process group run the same kernels, and are compared with these in tests of their own.
"""


def card(lines: Iterable[Line]) -> dict[tuple[str, str, str], list[Line]]:
    """The lines of each (function, dtype, output), in the order they came."""
    found: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        found.setdefault(line.key[:3], []).append(line)
    return found


def row(lines: list[Line]) -> tuple[str, ...]:
    """What is said of them."""
    ours, plain = ([getattr(line, who) for line in lines] for who in ("ours", "plain"))
    most = max(lines, key=lambda line: line.share)
    return (
        str(len(lines)),
        f"{statistics.median(ours):.2f}",
        f"{statistics.median(plain):.2f}",
        f"{max(ours):.2f}",
        f"{max(plain):.2f}",
        f"{most.share:.2f}",
        most.case,
    )


def page(cards: Cards) -> str:
    """The whole page."""
    columns = ("dtype", "output", "cases", "ours, median", "plain, median", "ours, worst", "plain, worst", "share", "in case")
    by_op: dict[str, list[tuple[str, ...]]] = {}
    for (op, dtype, output), lines in card(cards.lines).items():
        by_op.setdefault(op, []).append((dtype, output, *row(lines)))
    parts = [HEAD, ", ".join(v if k == "device" else f"{k} {v}" for k, v in cards.machine.items()) + ".\n"]
    for op, rows in by_op.items():
        table = (columns, ("---",) * len(columns), *sorted(rows, key=lambda r: DTYPES.index(r[0])))
        parts.append("\n".join([f"## `{op}`\n", *(f"| {' | '.join(cells)} |" for cells in table)]) + "\n")
    return "\n".join(parts)


def write(cards: Cards, path: Path = PAGE) -> Path:
    """Write the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(cards))
    return path
