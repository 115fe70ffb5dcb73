"""What whole steps are held to, as data: shown beside the figures, met or not. No test fails over a GPU's time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from .models import LIGER, MODELS, OURS, OURS_COMPILE, STOCK, STOCK_COMPILE
from .step import Step

OF_LIGER = {  # tokens/s over liger-kernel's
    "Llama 1B": 1.06, "Llama 8B 8 layers": 1.05, "Qwen3 0.6B": 1.25, "Gemma2 2B 10 layers": 1.12, "Qwen3 30B-A3B 4 layers": 1.1
}  # fmt: skip
MEMORY, OF_BEST, SAME_LOSS = 1.03, 1.05, 2e-4  # peak over liger-kernel's; compiled, tokens/s over the best peer's; first loss, relative
Rows = dict[str, Step]  # of one model, by provider


class Verdict(NamedTuple):
    """A bar and its figure, None where the run has none."""

    model: str
    shape: str
    what: str
    bar: str
    found: float | None
    met: bool | None


def ratio(a: float | None, b: float | None) -> float | None:
    """Of two figures, None where the run has not both."""
    return a / b if a and b else None


def _tokens(rows: Rows, provider: str) -> float | None:
    return rows[provider].tokens_per_s if provider in rows else None


def _speed(rows: Rows) -> float | None:
    return ratio(_tokens(rows, OURS), _tokens(rows, LIGER))


def _memory(rows: Rows) -> float | None:
    ours, liger = (rows[p].peak_gib if p in rows else None for p in (OURS, LIGER))
    return ratio(ours, liger)


def _compiled(rows: Rows) -> float | None:
    if not all(p in rows for p in (STOCK, STOCK_COMPILE, LIGER)):
        return None  # the best may be missing
    peers = [found for p, r in rows.items() if p not in (OURS, OURS_COMPILE) and (found := r.tokens_per_s)]
    return ratio(_tokens(rows, OURS_COMPILE), max(peers, default=None))


def _loss(rows: Rows) -> float | None:
    ours, stock = (rows[p].losses if p in rows else () for p in (OURS_COMPILE, STOCK))
    return abs(ours[0] / stock[0] - 1) if ours and stock else None


def verdicts(rows: Iterable[Step]) -> list[Verdict]:
    """Every bar of the models that were run, with its figure; one that was not measured stays, without."""
    rows, found = list(rows), []
    for model in MODELS:
        if model.name not in OF_LIGER or OURS_COMPILE not in model.providers:
            continue
        of_model = {r.provider: r for r in rows if (r.model, r.shape) == (model.name, model.shape)}
        if not of_model:
            continue
        bars: tuple[tuple[str, Callable[[Rows], float | None], bool, float], ...] = (
            ("tokens/s, liger_fn ÷ liger-kernel", _speed, True, OF_LIGER[model.name]),
            ("peak memory, liger_fn ÷ liger-kernel", _memory, False, MEMORY),
            ("tokens/s, liger_fn + compile ÷ the best peer", _compiled, True, OF_BEST),
            ("first loss, liger_fn + compile from stock, relative", _loss, False, SAME_LOSS),
        )
        for what, measure, least, bar in bars:
            value = measure(of_model)
            met = None if value is None else value >= bar if least else value <= bar
            found.append(Verdict(model.name, model.shape, what, f"{'≥' if least else '≤'} {bar:g}", value, met))
    return found
