"""From the newest run to docs/scaling.md and its figure."""

from __future__ import annotations

from pathlib import Path

from tests.bench.results import ROOT

from . import advice, check
from .choose import GPUS, SEQ, SMALL, WORLDS, Choice, choices, longest, words
from .figure import Group, draw
from .kept import Pieces, load
from .measure import LONG
from .plan import GIB, memory
from .prose import FORMULAS, HEAD, MEASURED, table
from .shapes import BY_NAME, OURS, STOCK, Shape
from .terms import Key, Terms, derive
from .traffic import step

PAGE = ROOT / "docs" / "scaling.md"
FIGURE = ROOT / "docs" / "figures" / "scaling.png"


def page(pieces: Pieces) -> str:
    """The whole page."""
    terms = check.paired(derive(pieces))
    shapes = check.planned(terms)
    best = _best(terms)
    said = advice.lines(terms, shapes)
    parts = [
        HEAD,
        ", ".join(v if k == "device" else f"{k} {v}" for k, v in pieces.machine.items()) + ".\n",
        "## Which plan when\n",
        "\n".join(f"- {text}" for text in said) + "\n",
        f"![memory of a rank by part](figures/{FIGURE.name})\n",
        "The plans of the tables: what a rank needs at its peak, stock and patched. Where no part is the head's, the peak is in a layer's "
        "backward.\n",
        *(_model(shape, terms, best) for shape in shapes),
        _checks(terms, pieces),
        MEASURED,
        FORMULAS,
        _terms(terms),
        _absent(pieces),
    ]
    return "\n".join(part for part in parts if part)


def _model(shape: Shape, terms: dict[Key, Terms], best: dict[tuple[str, int], list[Choice]]) -> str:
    """The fastest plan for each number of GPUs, patched, and what stock needs for the same."""
    rows = []
    for world in WORLDS:
        found = best[shape.name, world]
        if not found:
            rows.append((f"{world:,}", "none fits", *("–",) * 9))
            continue
        one, plan = found[0], found[0].plan
        stock = terms[shape.name, plan.tp, STOCK]
        need, slow = memory(plan, stock), step(plan, stock)
        contexts = [f"{_context(longest(plan, terms[shape.name, plan.tp, who], room))}" for room in GPUS.values() for who in (STOCK, OURS)]
        exposed = f"{one.step.exposed_ms / one.step.ms:.0%}"
        fits = f"{need.gib:.1f}" + ("" if need.total <= GPUS[SMALL] else " (no room)")
        rows.append(
            (
                f"{world:,}", words(plan) + (", checkpointing" if plan.checkpointing else ""), f"{plan.batch} × {plan.seq}",
                f"{plan.tokens_a_step / 2**20:.2g} Mi", fits, f"{one.memory.gib:.1f}", f"{slow.tokens_per_s:,.0f}",
                f"{one.step.tokens_per_s:,.0f}", exposed, " / ".join(contexts[:2]), " / ".join(contexts[2:]),
            )
        )  # fmt: skip
    head = (
        "GPUs", "plan", "batch of a rank", "tokens a step", "GiB, stock", "GiB, liger_fn", "tokens/s a GPU, stock", "liger_fn",
        "not hidden", "longest context, 80 GiB", "141 GiB",
    )  # fmt: skip
    about = (
        f"## {shape.name}: {shape.parameters() / 1e9:.1f} billion parameters, sequences of {SEQ}\n\n"
        f"The fastest plan that has room in 80 GiB when patched. *longest context*: one sequence a rank under the same sharding, with "
        "checkpointing, stock / liger_fn. Steps are without gradient accumulation.\n"
    )
    return f"{about}\n{table(head, rows)}"


def _context(tokens: int) -> str:
    return "none" if not tokens else f"{tokens // 1024}K"


def _percent(value: float | None) -> str:
    return "–" if value is None or value == float("inf") else f"{value:+.1%}"


def _checks(terms: dict[Key, Terms], pieces: Pieces) -> str:
    """Predicted beside measured."""
    rows = []
    for c in (*check.whole_steps(terms), *check.ranks(terms, pieces)):
        memory_of = ("–",) * 3
        if c.gib is not None:
            ours, real = c.gib
            memory_of = (
                f"{ours:.2f}",
                "–" if real == float("inf") else f"{real:.2f}",
                "–" if real == float("inf") else _percent(check.off(c.gib)),
            )
        speed = ("–",) * 3 if c.tokens_per_s is None else (*(f"{v:,.0f}" for v in c.tokens_per_s), _percent(check.off(c.tokens_per_s)))
        rows.append((c.model, c.how, c.provider, *memory_of, *speed))
    if not rows:
        return ""
    head = ("model", "step", "provider", "GiB, predicted", "measured", "off", "tokens/s, predicted", "measured", "off")
    about = """## The model against whole measurements

Whole steps of one GPU, from [docs/benchmarks.md](benchmarks.md#training-steps), which are no part of the terms. And the peak of one rank of
FSDP2, all its layers, over a process group that moves nothing: it allocates what a rank of a cluster allocates, and its time means nothing.
"""
    return f"{about}\n{table(head, rows)}"


def _terms(terms: dict[Key, Terms]) -> str:
    """The terms in numbers."""
    rows = []
    for (name, tp, who), t in terms.items():
        at = 16384
        forward, backward = t.plain.ms(at, 4096)
        again = t.checkpointed.ms(at, 4096)[1] - backward
        long = LONG * (LONG - 4096) * (t.checkpointed.forward_longer + t.checkpointed.backward_longer) / LONG * 1e3
        rows.append(
            (
                name, str(tp), who, f"{BY_NAME[name].layer(tp) / 1e6:.0f}",
                *(f"{size / 1024:.1f}" for size in (t.plain.kept, t.checkpointed.kept, t.checkpointed.peak.at(at) / at)),
                *(f"{ms / at * 1e3:.2f}" for ms in (forward, backward, again)), f"{long:.2f}",
                f"{t.head_peak.at(at) / GIB:.2f}", f"{t.head_ms.at(at) / at * 1e3:.2f}",
            )
        )  # fmt: skip
    head = (
        "model", "TP", "provider", "layer, M parameters", "kept, KiB a token and layer", "checkpointed", "backward's peak, KiB a token",
        "forward, µs a token and layer", "backward", "recomputation", f"more at {LONG // 1024}K", "head, GiB", "head, µs a token",
    )  # fmt: skip
    adam = next(iter(terms.values())).optimizer_ms if terms else {}
    said = ", ".join(f"{ms * 1e9:.2f} ms a billion parameters in {dtype}" for dtype, ms in adam.items())
    return f"## The terms\n\nAt {16384:,} tokens of sequences of 4096. AdamW: {said}.\n\n{table(head, rows)}"


def _absent(pieces: Pieces) -> str:
    """What has no number, and why."""
    missing = [r for r in pieces.rows if not r.measured]
    said = [
        f"{r.what}, {r.shape}, TP {r.tp}, {r.provider}, {r.layers} layers, {r.batch} × {r.seq}"
        f"{', checkpointing' if r.checkpointing else ''}{f', {r.world} ranks' if r.world > 1 else ''}: {r.note}"
        for r in missing
    ]
    return "" if not said else "Not measured:\n\n" + "\n".join(f"- {text}" for text in said) + "\n"


def write(run: Path, target: Path = PAGE, figure: Path = FIGURE) -> tuple[Path, Path]:
    """Write the page and its figure."""
    pieces = load(run)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(pieces))
    draw(_bars(check.paired(derive(pieces))), figure)
    return target, figure


def _bars(terms: dict[Key, Terms]) -> list[Group]:
    """What the figure shows: the plans of the tables."""
    every = []
    for (name, world), found in _best(terms).items():
        if found:
            plan = found[0].plan
            every.append((name, world, words(plan), {who: memory(plan, terms[name, plan.tp, who]) for who in (STOCK, OURS)}))
    return every


def _best(terms: dict[Key, Terms]) -> dict[tuple[str, int], list[Choice]]:
    """The plans of each model and number of GPUs, patched, that have room in the smaller GPU."""
    shapes = check.planned(terms)
    return {(s.name, w): choices(terms, s.name, OURS, w, GPUS[SMALL]) for s in shapes for w in WORLDS}
