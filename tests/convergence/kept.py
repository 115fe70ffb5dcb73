"""The JSON of a run: machine, settings, and every result, rounded to what it can mean."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import Any

import torch

from _presets import Preset

from .measure import Result, Run

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "results"
SOURCES = ("liger_fn/*.py", "liger_patch/**/*.py", "tests/convergence/*.py")
SETTINGS = ("hidden", "layers", "heads", "kv_heads", "mlp", "vocab", "batch", "seq", "steps", "lr")


@dataclass
class Sheet:
    """One file. `failed` has the error of each job that gave no result."""

    machine: dict[str, str]
    settings: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, result: Result) -> None:
        """Put it in place of an earlier one of the same model and dtype."""
        self.results = [*(r for r in self.results if r.name != result.name), result]
        self.failed.pop(result.name, None)


def machine(device: str) -> dict[str, str]:
    """What the figures depend on."""
    found = {
        "device": torch.cuda.get_device_name(0) if device == "cuda" else "cpu",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        found["hip" if torch.version.hip else "cuda"] = str(torch.version.hip or torch.version.cuda)
    for name in ("triton", "transformers", "tokenizers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    code = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        code.update(path.read_bytes())
    return found | {"sources": code.hexdigest()[:12]}


def settings(preset: Preset, seed: int, tokens: int) -> dict[str, Any]:
    """Sizes and training, the same for all models."""
    return {name: getattr(preset, name) for name in SETTINGS} | {"seed": seed, "tokens": tokens}


def save(sheet: Sheet, folder: Path) -> Path:
    """Write `<device>-<torch>-<date>.json`, whole or not at all. A file of the same machine and settings is added to; another stays."""
    m = sheet.machine
    stem = re.sub(r"[^a-z0-9.]+", "-", f"{m['device']}-{m['torch'].split('+')[0]}-{m['date']}".lower())
    for n in count(1):
        path = folder / (f"{stem}.json" if n == 1 else f"{stem}-{n}.json")
        if not path.exists():
            break
        before = load(path)
        if (before.machine, before.settings) == (m, sheet.settings):
            for result in sheet.results:
                before.add(result)
            sheet = Sheet(m, sheet.settings, before.results, before.failed | sheet.failed)
            break
    folder.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"machine": m, "settings": sheet.settings, "failed": sheet.failed}, indent=1)
    rows = ",\n  ".join(json.dumps(_written(result)) for result in sheet.results)
    part = path.with_suffix(".part")
    part.write_text(f'{head[:-2]},\n "results": [\n  {rows}\n ]\n}}\n')
    part.replace(path)
    return path


def _written(result: Result) -> dict[str, Any]:
    """Losses to 6 digits, differences to 3: they are noise."""
    found = asdict(result)
    found |= {name: _rounded(found[name], 6) for name in ("before", "after", "losses")}
    found["runs"] = {name: {key: _rounded(value, 3) for key, value in run.items()} for name, run in found["runs"].items()}
    return found


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, list):
        return [_rounded(v, digits) for v in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def load(path: Path) -> Sheet:
    """What `save` wrote."""
    raw = json.loads(path.read_text())
    results = [Result(**r | {"runs": {name: Run(**run) for name, run in r["runs"].items()}}) for r in raw["results"]]
    return Sheet(raw["machine"], raw["settings"], results, raw["failed"])
