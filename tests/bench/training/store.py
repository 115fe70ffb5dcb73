"""The steps of a run, with the machine and versions beside them, and the JSON that is committed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from .. import results
from .step import Step

FOLDER = results.FOLDER / "training"
SOURCES = ("liger_fn/*.py", "liger_patch/**/*.py", "tests/bench/training/*.py")
LEAST_MS = 0.005  # a kernel below is no share of a step


class Keyed(Protocol):
    """A row: a dataclass that knows what it is the figures of."""

    @property
    def key(self) -> tuple[Any, ...]: ...


Row = TypeVar("Row", bound=Keyed)


@dataclass(frozen=True)
class Steps(Generic[Row]):
    """One run, or several on the same machine, day and sources."""

    machine: dict[str, str]
    rows: list[Row] = field(default_factory=list)

    def with_row(self, row: Row) -> Steps[Row]:
        """With one more; what was measured again replaces what was there."""
        return Steps(self.machine, [r for r in self.rows if r.key != row.key] + [row])


def machine(device: torch.device) -> dict[str, str]:
    """What the figures depend on, the patches' code included."""
    return results.machine(device, SOURCES, ("triton", "liger-kernel", "transformers"))


def save(steps: Steps[Any], folder: Path, kind: type[Any] = Step) -> Path:
    """Write `<gpu>-<torch>-<date>.json`. A file of the same machine, day and sources is added to; of others, it is left as it is."""
    m = steps.machine
    path = results.place(folder, m, lambda kept: load(kept, kind).machine == m)
    if path.exists():
        later, steps = steps.rows, load(path, kind)
        for row in later:
            steps = steps.with_row(row)
    rows = ",\n  ".join(json.dumps(_written(r)) for r in steps.rows)
    path.write_text(f'{json.dumps({"machine": m}, indent=1)[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')
    return path


def _written(row: Any) -> dict[str, Any]:
    """A thousandth of a millisecond is finer than any clock here; a kernel's whole name says nothing more than its beginning."""
    raw = asdict(row)
    if "kernels_ms" in raw:
        kernels: dict[str, float] = {}
        for name, ms in raw["kernels_ms"].items():
            kernels[name[:90]] = kernels.get(name[:90], 0.0) + ms
        raw["kernels_ms"] = {k: round(v, 3) for k, v in kernels.items() if v >= LEAST_MS}
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in raw.items()}


def load(path: Path, kind: type[Any] = Step) -> Steps[Any]:
    """What `save` wrote of rows of that kind."""
    raw = json.loads(path.read_text())
    return Steps(raw["machine"], [kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}) for row in raw["rows"]])
