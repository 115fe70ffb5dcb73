"""A row of a run, and the JSON that is committed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import results
from ..training import store
from ..training.store import Steps

FOLDER = results.FOLDER / "distributed"
SOURCES = (
    "liger_fn/*.py", "liger_patch/**/*.py",
    *(f"tests/bench/training/{name}.py" for name in ("models", "step")),
    *(f"tests/bench/distributed/{name}.py" for name in ("group", "measure", "plan", "rank", "search")),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What was measured of a model, a workload of one GPU, a number of GPUs and a provider. Of each rank in tuples, by its number."""

    model: str
    shape: str  # batch x sequence of one GPU; of a context, "longest"
    gpus: int
    provider: str
    tokens_per_s: float | None = None  # of all GPUs; None where it could not be measured: `note` says why
    step_ms: float | None = None  # the slowest rank's median
    peak_gib: tuple[float, ...] = ()  # of all that is allocated
    parameters_gib: tuple[float, ...] = ()  # local; gradients take as much
    optimizer_gib: tuple[float, ...] = ()  # local
    first_losses: tuple[float, ...] = ()  # of the first step, each rank's of its own tokens
    losses: tuple[float, ...] = ()  # of the first steps, the mean over the ranks
    longest: int | None = None  # a context's: the most tokens of one sequence of which a whole step was made
    fails: int | None = None  # a context's: the fewest that found no room
    first_s: float | None = None  # seconds of the first step, compilation with it
    patched: int = 0  # places that hold a function of this library
    note: str = ""

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.model, self.shape, self.gpus, self.provider

    @property
    def peak(self) -> float | None:
        """GiB of the rank that had the most allocated."""
        return max(self.peak_gib, default=None)

    @property
    def beyond_gib(self) -> float | None:
        """GiB allocated at the peak beyond the local parameters and the local states of the optimizer, of the rank that has the most."""
        if not self.peak_gib:
            return None
        each = zip(self.peak_gib, self.parameters_gib, self.optimizer_gib, strict=True)
        return max(peak - parameters - states for peak, parameters, states in each)


def machine(device: torch.device) -> dict[str, str]:
    """What the figures depend on."""
    found = results.machine(device, SOURCES, ("triton", "liger-kernel", "transformers"))
    return found | ({"gpus": str(torch.cuda.device_count())} if device.type == "cuda" else {})


def save(rows: Steps[Row], folder: Path) -> Path:
    """Write `<gpu>-<torch>-<date>.json`, or add to the one of the same machine, day and sources."""
    return store.save(rows, folder, Row)


def load(path: Path) -> Steps[Any]:
    """What `save` wrote."""
    return store.load(path, Row)
