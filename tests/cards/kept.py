"""The JSON of a run: the machine, and every line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch

from tests.bench import results

from .measure import Line

FOLDER = Path(__file__).parent / "results"
SOURCES = ("liger_fn/*.py", "tests/cases/*.py", "tests/cards/*.py", "tests/numerics.py", "tests/sample.py")


@dataclass(frozen=True)
class Cards:
    """One file."""

    machine: dict[str, str]
    lines: list[Line]


def machine(device: torch.device) -> dict[str, str]:
    """What errors depend on."""
    return results.machine(device, SOURCES, ("triton",))


def save(machine: dict[str, str], lines: Iterable[Line], folder: Path) -> Path:
    """Write `<device>-<torch>-<date>.json`, whole or not at all. A file of the same machine, day and sources is added to; another stays."""
    path = results.place(folder, machine, lambda kept: load(kept).machine == machine)
    lines = list(lines)
    again = {line.key for line in lines}
    before = load(path).lines if path.exists() else []
    rows = [[round(v, 3) if isinstance(v, float) else v for v in astuple(x)] for x in (*(b for b in before if b.key not in again), *lines)]
    names = json.dumps([f.name for f in fields(Line)])
    body = ",\n  ".join(json.dumps(row) for row in rows)
    part = path.with_suffix(".part")
    part.write_text(f'{json.dumps({"machine": machine}, indent=1)[:-2]},\n "columns": {names},\n "lines": [\n  {body}\n ]\n}}\n')
    part.replace(path)
    return path


def load(path: Path) -> Cards:
    """What `save` wrote."""
    raw = json.loads(path.read_text())
    return Cards(raw["machine"], [Line(**dict(zip(raw["columns"], row, strict=True))) for row in raw["lines"]])
