"""How far a run is from the first stock run, and whether a patched one is as near as stock is to itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

EARLY = 20  # steps in which rounding has not yet grown into noise of the training
BIN = 5  # steps to a point of the curves that are kept
FACTOR = 5.0  # see `judge`
LAST_BIT = torch.finfo(torch.float32).eps
LEARNED = 0.9  # of the held-out loss before; where it did not fall below that, nothing was shown
AGAIN, PATCHED = "again", "patched"


@dataclass(frozen=True)
class Run:
    """One run against the first stock run. Losses are in nats; a difference is this run's minus stock's.

    Attributes:
        early: root mean square of the differences of the training losses over the first `EARLY` steps.
        late: likewise over the last third of the steps.
        mean: mean of their absolute values over all steps. largest: the largest of them.
        held_out: difference of the losses on text that was held out, after training.
        update: ‖Δθ − Δθ_stock‖ ÷ ‖Δθ_stock‖ of all parameters as one vector, where Δθ is the change from the start to the end.
        early_update: the same after `EARLY` steps.
        worst: the same of the single parameter where it is largest. where: that parameter.
        curve: root mean square of the differences in each `BIN` steps.
        shift: mean of the differences in each `BIN` steps.
    """

    early: float
    late: float
    mean: float
    largest: float
    held_out: float
    early_update: float
    update: float
    worst: float
    where: str
    curve: list[float] = field(default_factory=list)
    shift: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """All runs of one model in one dtype.

    Attributes:
        parameters: how many numbers are trained.
        ops: what was patched.
        before, after: held-out loss of the first stock run.
        losses: its training losses, means of `BIN` steps.
        runs: the others, by name.
    """

    model: str
    dtype: str
    parameters: int
    ops: list[str]
    before: float
    after: float
    losses: list[float]
    runs: dict[str, Run]

    @property
    def name(self) -> str:
        return f"{self.model} {self.dtype}"

    @property
    def yardsticks(self) -> dict[str, Run]:
        """The stock runs that differ from the first by rounding."""
        return {name: run for name, run in self.runs.items() if name not in (AGAIN, PATCHED)}


def rms(values: Sequence[float]) -> float:
    """Root mean square."""
    return math.sqrt(sum(v * v for v in values) / len(values)) if values else 0.0


def binned(values: Sequence[float]) -> list[float]:
    """Means of `BIN` values each."""
    return [sum(part) / len(part) for part in _bins(values)]


def _bins(values: Sequence[float]) -> list[Sequence[float]]:
    return [values[i : i + BIN] for i in range(0, len(values), BIN)]


def updates(run: dict[str, Tensor], stock: dict[str, Tensor], start: dict[str, Tensor]) -> tuple[float, float, str]:
    """`update`, `worst` and `where` of a `Run`. A parameter that stock left as it was (a tower that no image met) has no `worst`."""
    off = torch.stack([(run[name].double() - stock[name].double()).square().sum() for name in start])
    moved = torch.stack([(stock[name].double() - start[name].double()).square().sum() for name in start])
    each = torch.where(moved == 0, 0.0, (off / moved).sqrt())
    worst = int(each.argmax())  # NaN counts as the largest
    return float((off.sum() / moved.sum()).sqrt()), float(each[worst]), list(start)[worst]


def run_of(losses: list[float], stock: list[float], held_out: float, early_update: float, end: tuple[float, float, str]) -> Run:
    """A `Run` from every step's losses, and what `updates` found at the end."""
    update, worst, where = end
    off = [a - b for a, b in zip(losses, stock, strict=True)]
    sizes = [abs(d) for d in off]
    late = off[-max(1, len(off) // 3) :]
    return Run(
        early=rms(off[:EARLY]),
        late=rms(late),
        mean=sum(sizes) / len(sizes),
        largest=max(sizes),
        held_out=held_out,
        early_update=early_update,
        update=update,
        worst=worst,
        where=where,
        curve=[rms(part) for part in _bins(off)],
        shift=binned(off),
    )


MEASURES: dict[str, Callable[[Run], float]] = {
    "early": lambda run: run.early,
    "late": lambda run: run.late,
    "held-out": lambda run: abs(run.held_out),
    "early update": lambda run: run.early_update,
    "update": lambda run: run.update,
}


def allowed(result: Result, measure: str) -> float:
    """The largest that any yardstick shows of a measure, times `FACTOR`.

    The held-out loss is one number and a yardstick's can be near 0 by luck, so there its `late` counts too. A loss is a number of fp32, in
    any dtype of the model: all may differ by its last bit.
    """
    return FACTOR * _noise(result, measure, result.yardsticks.values())


def _noise(result: Result, measure: str, runs: Collection[Run]) -> float:
    found = [MEASURES[measure](run) for run in runs]
    if measure == "held-out":
        found += [run.late for run in runs]
    if not measure.endswith("update"):
        found.append(LAST_BIT * result.before)
    return max(found)


def spread(result: Result) -> float:
    """How many times the largest of the others a yardstick is, in the measure where it is most: what luck alone does to a verdict."""
    ratios = [0.0]
    for name, run in result.yardsticks.items():
        others = [other for key, other in result.yardsticks.items() if key != name]
        ratios += [of(run) / noise for measure, of in MEASURES.items() if (noise := _noise(result, measure, others))]
    return max(ratios)


def judge(result: Result) -> list[str]:
    """What is wrong with the patched run, in words; nothing where it is as near to stock as stock is to itself.

    Each run is one draw of the same noise. Distances grow by one law from wherever rounding put them, so that of two sound runs one can be
    some times the other: `FACTOR` is beyond what `spread` finds between yardsticks. A systematic fault is no draw. It acts at each step in
    the same direction, and shows best in the early losses and the early update, where noise is smallest: there a wrong constant is some
    hundred times what is allowed in fp32.
    """
    wrong = []
    patched = result.runs[PATCHED]
    if not result.after <= LEARNED * result.before:
        wrong.append(f"stock did not learn: held-out loss from {result.before:.4g} to {result.after:.4g}")
    for name, of in MEASURES.items():
        found, limit = of(patched), allowed(result, name)
        if not found <= limit:
            wrong.append(f"{name} {found:.2g}, allowed {limit:.2g}")
    return wrong
