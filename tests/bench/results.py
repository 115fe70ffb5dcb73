"""A run's figures: what a row holds, the machine and versions beside it, and the JSON that is committed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "results"
GREEN = "green"


@dataclass(frozen=True)
class Row:
    """One figure. Bytes and FLOPs are the least that the function needs, whoever computes it: its rates compare times, not traffic."""

    op: str
    shape: str
    mode: str  # one of tests.bench.table: device time, but for "host", which is the host's for forward and backward
    provider: str
    us: float | None  # None where it could not be measured: `note` says why
    bytes: int = 0
    flops: int = 0
    floor_us: float | None = None
    mib: float | None = None  # at the peak, over the inputs; of a head, and over the gradients
    ours_over_this: float | None = None  # host: the median ratio of paired turns; a head, experts: of the times over their floors
    ours_mib_over_this: float | None = None  # a head, experts
    by_events: bool = False  # timed between events around plain calls: it makes the host wait, so that no graph could be replayed
    size: int = 0  # in a sweep: the number along which it goes
    note: str = ""
    errors: dict[str, float] | None = None  # a head's, by what is compared: relative, against fp64
    over_balanced: float | None = None  # of experts whose routing is skewed: over the same provider's time where it is balanced

    @property
    def gbs(self) -> float | None:
        return self.bytes / self.us / 1e3 if self.us and self.bytes else None

    @property
    def tflops(self) -> float | None:
        return self.flops / self.us / 1e6 if self.us and self.flops else None

    @property
    def over_floor(self) -> float | None:
        return self.us / self.floor_us if self.us and self.floor_us else None

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.shape, self.mode, self.provider


@dataclass(frozen=True)
class Result:
    """One run, or several on the same machine, day and sources."""

    machine: dict[str, str]
    limits: dict[str, float]  # copy_gbs, small_copy_gbs and matmul_tflops, where device time was measured
    gates: dict[str, str]  # for each function "green", or what was wrong
    rows: list[Row] = field(default_factory=list)

    def allowed(self) -> list[Row]:
        """The rows of functions whose gate is green: a wrong function has no speed."""
        return [r for r in self.rows if self.gates.get(r.op) == GREEN]

    def with_later(self, later: Result) -> Result:
        """Both runs; what was measured again replaces what was there."""
        rows = {r.key: r for r in (*self.rows, *later.rows)}
        return Result(later.machine, self.limits | later.limits, self.gates | later.gates, list(rows.values()))


SOURCES = ("liger_fn/*.py", "tests/bench/*.py")
PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy")


def machine(device: torch.device, sources: Iterable[str] = SOURCES, packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """What figures depend on: the device, versions of packages, and the code whose paths in the repository match `sources`."""
    gpu = device.type == "cuda"
    found = {
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sources": _digest(sources),
    }
    if gpu:
        found["hip" if torch.version.hip else "cuda"] = str(torch.version.hip or torch.version.cuda)
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _digest(sources: Iterable[str]) -> str:
    code = hashlib.sha256()
    for path in sorted(path for pattern in sources for path in ROOT.glob(pattern)):
        code.update(path.read_bytes())
    return code.hexdigest()[:12]


def place(folder: Path, m: dict[str, str], same: Callable[[Path], bool]) -> Path:
    """Where a run on the machine `m` is kept in `folder`: the first name that is free, or whose file is of the `same` run."""
    stem = re.sub(r"[^a-z0-9.]+", "-", f"{m['device']}-{m['torch'].split('+')[0]}-{m['date']}".lower())
    folder.mkdir(parents=True, exist_ok=True)
    names = (folder / (f"{stem}.json" if n == 1 else f"{stem}-{n}.json") for n in count(1))
    return next(path for path in names if not path.exists() or same(path))


def save(result: Result, folder: Path) -> Path:
    """Write `<gpu>-<torch>-<date>.json`. A file of the same machine, day and sources is added to; of others, it is left as it is."""
    m = result.machine
    path = place(folder, m, lambda kept: load(kept).machine == m)
    if path.exists():
        result = load(path).with_later(result)
    rows = ",\n  ".join(json.dumps(_written(r)) for r in result.allowed())
    head = json.dumps({"machine": m, "limits": result.limits, "gates": result.gates}, indent=1)
    path.write_text(f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')
    return path


def _written(row: Row) -> dict[str, Any]:
    """What is not at its default; a thousandth of a microsecond is finer than any clock here."""
    default = {f.name: None if f.default is MISSING else f.default for f in fields(Row)}
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(row).items() if v != default[k]}


def load(path: Path) -> Result:
    """What `save` wrote."""
    raw = json.loads(path.read_text())
    return Result(raw["machine"], raw["limits"], raw["gates"], [Row(**{"us": None, **row}) for row in raw["rows"]])
