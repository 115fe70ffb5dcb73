"""What was measured of a piece of a training step, and the JSON that is committed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from tests.bench import results

FOLDER = Path(__file__).parent / "results"
SOURCES = ("liger_fn/*.py", "liger_patch/**/*.py", "tests/scaling/measure.py", "tests/scaling/rank.py", "tests/scaling/shapes.py")
LAYERS, HEAD, EMBEDDING, OPTIMIZER, RANK = "layers", "head", "embedding", "optimizer", "rank"


@dataclass(frozen=True)
class Piece:
    """One measurement. Times in milliseconds, memory in bytes; None where it could not be measured: `note` says why."""

    what: str
    shape: str = ""
    tp: int = 1  # the share of a layer and of the vocabulary that one of so many ranks has
    provider: str = ""
    layers: int = 0
    batch: int = 1
    seq: int = 0
    checkpointing: bool = False
    world: int = 1  # a rank's: how many share the weights
    dtype: str = "bfloat16"  # the optimizer's
    parameters: int = 0  # that the optimizer stepped over
    forward_ms: float | None = None
    backward_ms: float | None = None  # with checkpointing, recomputation is in it; of an optimizer, its step
    kept: int | None = None  # allocated when forward ends, over what was there before it
    forward_peak: int | None = None  # at the most during forward, over the same
    backward_peak: int | None = None  # at the most during backward, over what forward left
    peak: int | None = None  # a rank's, everything
    note: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return self.what, self.shape, self.tp, self.provider, self.layers, self.batch, self.seq, self.checkpointing, self.world, self.dtype

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def measured(self) -> bool:
        return not self.note


@dataclass(frozen=True)
class Pieces:
    """One run, or several on the same machine, day and sources."""

    machine: dict[str, str]
    rows: tuple[Piece, ...] = ()

    def has(self, piece: Piece) -> bool:
        """Whether it was tried: one that found no room is not tried again."""
        return any(r.key == piece.key for r in self.rows)


def machine(device: torch.device) -> dict[str, str]:
    """What the figures depend on."""
    return results.machine(device, SOURCES, ("triton", "transformers"))


def find(m: dict[str, str], folder: Path) -> Pieces:
    """What is kept of the same machine, day and sources."""
    path = _place(m, folder)
    return load(path) if path.exists() else Pieces(m)


def _place(m: dict[str, str], folder: Path) -> Path:
    return results.place(folder, m, lambda kept: load(kept).machine == m)


def save(m: dict[str, str], rows: Iterable[Piece], folder: Path) -> Path:
    """Add to `<gpu>-<torch>-<date>.json`, whole or not at all. A file of another machine, day or sources is left as it is."""
    path = _place(m, folder)
    every = {row.key: row for row in (*find(m, folder).rows, *rows)}
    body = ",\n  ".join(json.dumps(_written(row)) for row in every.values())
    part = path.with_suffix(".part")
    part.write_text(f'{json.dumps({"machine": m}, indent=1)[:-2]},\n "rows": [\n  {body}\n ]\n}}\n')
    part.replace(path)
    return path


def _written(row: Piece) -> dict[str, Any]:
    """What is not at its default; a ten-thousandth of a millisecond is finer than any clock here."""
    default = {f.name: None if f.default is MISSING else f.default for f in fields(Piece)}
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(row).items() if v != default[k]}


def load(path: Path) -> Pieces:
    """What `save` wrote."""
    raw = json.loads(path.read_text())
    return Pieces(raw["machine"], tuple(Piece(**row) for row in raw["rows"]))


def newest(folder: Path = FOLDER) -> Path | None:
    """The file of the last run; None without any."""
    return max(folder.glob("*.json"), key=lambda path: (load(path).machine["date"], path.stem), default=None)
