"""The model against what was measured whole: steps of one GPU from the benchmarks, and ranks whose collectives move nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tests.bench.training import store
from tests.bench.training.models import MODELS
from tests.bench.training.step import Step as Row

from .kept import RANK, Pieces
from .plan import BF16, DDP, GIB, Plan, memory
from .shapes import PLANNED, PROVIDERS, Shape
from .terms import Key, Terms
from .traffic import step

WHOLE = {"Llama 1B": "Llama 1B", "Llama 8B 8 layers": "Llama 8B"}  # a benchmark's model, and whose layers it is made of


@dataclass(frozen=True)
class Compared:
    """Predicted and measured; None where it is not known."""

    model: str
    how: str
    provider: str
    gib: tuple[float, float] | None
    tokens_per_s: tuple[float, float] | None = None


def off(pair: tuple[float, float] | None) -> float | None:
    """How much the prediction is too high, relative."""
    return None if pair is None else pair[0] / pair[1] - 1


def as_model(terms: Terms, layers: int) -> Terms:
    return replace(terms, shape=replace(terms.shape, layers=layers))


def whole_steps(terms: dict[Key, Terms], folder: Path = store.FOLDER) -> list[Compared]:
    """Each step whose layers were measured, as it was last timed."""
    runs = {path.stem: store.load(path) for path in folder.glob("*.json")}
    oldest_first = sorted(runs, key=lambda stem: (runs[stem].machine["date"], len(stem), stem))
    rows = {row.key: row for stem in oldest_first for row in runs[stem].rows}
    return [_compared(row, terms[key]) for row in rows.values() if (key := _key(row)) in terms]


def _key(row: Row) -> Key:
    return WHOLE.get(row.model, ""), 1, row.provider


def _compared(row: Row, terms: Terms) -> Compared:
    model = next(m for m in MODELS if (m.name, m.shape) == (row.model, row.shape))
    of = as_model(terms, model.sizes["num_hidden_layers"])
    plan = Plan(batch=model.batch, seq=model.seq, checkpointing=model.checkpointing, stage=DDP, policy=BF16)
    gib, speed = memory(plan, of).gib, step(plan, of).tokens_per_s
    how = f"{row.shape.replace('x', ' × ')}{', checkpointing' if row.checkpointing else ''}"
    if row.peak_gib is None or row.tokens_per_s is None:
        return Compared(row.model, f"{how}: {row.note}", row.provider, (gib, float("inf")), None)
    return Compared(row.model, how, row.provider, (gib, row.peak_gib), (speed, row.tokens_per_s))


def ranks(terms: dict[Key, Terms], pieces: Pieces) -> list[Compared]:
    """One rank of FSDP2, everything that it allocates."""
    found = []
    for row in pieces.rows:
        key = row.shape, row.tp, row.provider
        if row.what == RANK and row.peak is not None and key in terms:
            plan = Plan(shard=row.world, batch=row.batch, seq=row.seq, checkpointing=row.checkpointing)
            gib = memory(plan, as_model(terms[key], row.layers)).gib
            found.append(Compared(row.shape, f"FSDP {row.world}, {row.tokens} tokens", row.provider, (gib, row.peak / GIB)))
    return found


def paired(terms: dict[Key, Terms]) -> dict[Key, Terms]:
    """Those that both providers have: what only one has compares with nothing."""
    return {(name, tp, who): t for (name, tp, who), t in terms.items() if all((name, tp, other) in terms for other in PROVIDERS)}


def planned(terms: dict[Key, Terms]) -> list[Shape]:
    """The shapes that clusters are planned for, of which there are terms."""
    return [s for s in PLANNED if any((s.name, tp, who) in terms for tp in s.tp for who in PROVIDERS)]
