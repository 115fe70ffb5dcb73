"""The JSON of a run: machine, settings, and every result, rounded to what it can mean."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from _presets import Preset
from tests.bench import results

from .measure import Result, Run

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
    return results.machine(torch.device(device), SOURCES, ("triton", "transformers", "tokenizers"))


def settings(preset: Preset, seed: int, tokens: int) -> dict[str, Any]:
    """Sizes and training, the same for all models."""
    return {name: getattr(preset, name) for name in SETTINGS} | {"seed": seed, "tokens": tokens}


def save(sheet: Sheet, folder: Path) -> Path:
    """Write `<device>-<torch>-<date>.json`, whole or not at all. A file of the same machine and settings is added to; another stays."""
    m, s = sheet.machine, sheet.settings
    path = results.place(folder, m, lambda kept: (load(kept).machine, load(kept).settings) == (m, s))
    if path.exists():
        before = load(path)
        for result in sheet.results:
            before.add(result)
        sheet = Sheet(m, s, before.results, before.failed | sheet.failed)
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
    every = [Result(**r | {"runs": {name: Run(**run) for name, run in r["runs"].items()}}) for r in raw["results"]]
    return Sheet(raw["machine"], raw["settings"], every, raw["failed"])
