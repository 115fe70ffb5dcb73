"""What training on several GPUs is held to, as data: shown beside the figures, met or not. No test fails over a GPU's time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..training.bars import SAME_LOSS, ratio
from ..training.models import OURS, STOCK
from .plan import LLAMA_8B, LONGEST
from .store import Row

Rows = Mapping[str, Row]  # of one model, shape and number of GPUs, by provider


@dataclass(frozen=True)
class Bar:
    """A figure of ours over stock's, and what it is to be."""

    what: str
    shape: str  # "": every workload
    measure: Callable[[Row, Row], float | None]  # of ours and stock's
    bar: float
    least: bool = True  # else at most
    model: str = LLAMA_8B.name  # "": every model
    gpus: int = 1  # or more

    def takes(self, row: Row) -> bool:
        """Whether it is a bar of such rows."""
        return self.model in ("", row.model) and (self.shape == row.shape or (not self.shape and row.shape != LONGEST))

    def said(self) -> str:
        return f"{'≥' if self.least else '≤'} {self.bar:g}" + (f", {self.gpus} GPUs or more" if self.gpus > 1 else "")

    def met(self, found: float | None, gpus: int) -> bool | None:
        """None where it is not to be judged."""
        if found is None or gpus < self.gpus:
            return None
        return found >= self.bar if self.least else found <= self.bar


class Verdict(NamedTuple):
    """A bar and its figure, None where the run has none."""

    model: str
    shape: str
    gpus: int
    what: str
    bar: str
    found: float | None
    met: bool | None


def _speed(ours: Row, stock: Row) -> float | None:
    return ratio(ours.tokens_per_s, stock.tokens_per_s)


def _memory(ours: Row, stock: Row) -> float | None:
    return ratio(ours.beyond_gib, stock.beyond_gib)


def _context(ours: Row, stock: Row) -> float | None:
    return ratio(ours.longest, stock.longest)


def _loss(ours: Row, stock: Row) -> float | None:
    """The most that a rank's first loss is off, relative."""
    if not ours.first_losses or not stock.first_losses:
        return None
    return max(abs(a / b - 1) for a, b in zip(ours.first_losses, stock.first_losses, strict=True))


MEMORY = "memory beyond parameters and optimizer, liger_fn ÷ stock"
# Of a memory's: gradients, which nobody saves, take 15 GiB of one GPU, and half of that of each of two, as the bars suppose.
BARS = (
    Bar("tokens/s, liger_fn ÷ stock", "4x4096", _speed, 1.24),
    Bar(MEMORY, "4x4096", _memory, 0.38, least=False, gpus=2),
    Bar("tokens/s, liger_fn ÷ stock", "1x32768", _speed, 1.17),
    Bar(MEMORY, "1x32768", _memory, 0.25, least=False, gpus=2),
    Bar("longest sequence, liger_fn ÷ stock", LONGEST, _context, 4.0),
    Bar("first loss of any rank, liger_fn from stock, relative", "", _loss, SAME_LOSS, least=False, model=""),
)
SCALING = 0.95  # tokens/s of n GPUs over n times those of one, by the same work on each


def groups(rows: Iterable[Row]) -> dict[tuple[str, str, int], dict[str, Row]]:
    """Rows that answer the same question, by provider."""
    found: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.model, row.shape, row.gpus), {})[row.provider] = row
    return found


def efficiency(rows: Iterable[Row], row: Row) -> float | None:
    """Tokens/s of a row's GPU over those of one GPU that trains alone."""
    alone = (r.tokens_per_s for r in rows if (r.model, r.shape, r.provider, r.gpus) == (row.model, row.shape, row.provider, 1))
    return ratio(row.tokens_per_s, row.gpus * (next(alone, None) or 0.0))


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Every bar of what was run, with its figure; one that could not be measured stays, without."""
    rows, found = list(rows), list[Verdict]()
    every = groups(rows)
    for (model, shape, gpus), of in every.items():
        if OURS in of and STOCK in of:
            for bar in (b for b in BARS if b.takes(of[OURS])):
                value = bar.measure(of[OURS], of[STOCK])
                found.append(Verdict(model, shape, gpus, bar.what, bar.said(), value, bar.met(value, gpus)))
        if OURS in of and gpus > 1 and shape != LONGEST and OURS in every.get((model, shape, 1), {}):
            value = efficiency(rows, of[OURS])
            met = None if value is None else value >= SCALING
            found.append(Verdict(model, shape, gpus, "scaling: tokens/s a GPU, liger_fn ÷ one GPU's", f"≥ {SCALING:g}", value, met))
    return found
