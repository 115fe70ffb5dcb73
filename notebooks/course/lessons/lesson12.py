"""Checks of lesson 12: reading figures, and choosing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from course import Wrong, exercise, same
from course.exercises import Answer
from tests.bench import report, results, table
from tests.bench.results import Row

Case = tuple[str, str, str]  # function, shape, pass


def measured() -> dict[Case, dict[str, Row]]:
    """The committed rows by case and tool, each case whole from the last run that compares it."""
    cases: dict[Case, dict[str, Row]] = {}
    found = {path.stem: results.load(path) for path in results.FOLDER.glob("*.json")}
    for runs in report.together(found).values():
        for run in runs.values():  # the oldest first
            of_run: dict[Case, dict[str, Row]] = {}
            for row in run.allowed():
                of_run.setdefault((row.op, row.shape, row.mode), {})[row.provider] = row
            cases |= {case: rows for case, rows in of_run.items() if len(rows) > 1}
    return cases


@exercise(
    "12.1",
    "where others are faster",
    hint="for each case with ours and another tool: who = min of the others by time; keep it if ours ÷ theirs > 1 + margin",
)
def slower(answer: Answer) -> str | None:
    times = {
        "norm": {"ours": 10.0, "compile": 8.0, "eager": 5.0},
        "glu": {"ours": 10.0, "compile": 9.9},
        "rope": {"ours": 10.0, "compile": 12.0},
        "head": {"compile": 3.0},
        "alone": {"ours": 1.0},
    }
    got = answer(times, "ours", 0.02)
    if not isinstance(got, dict):
        raise Wrong(f"return a dict by case, got {type(got).__name__}")
    if "rope" in got:
        raise Wrong("rope is there, where ours is the faster")
    if "glu" in got:
        raise Wrong("glu is there: 1 % is within the margin, a tie")
    if "norm" in got and got["norm"][0] == "compile":
        raise Wrong("norm: eager is faster than compile; the fastest other is asked for")
    if "norm" in got and abs(got["norm"][1] - 0.5) < 1e-9:
        raise Wrong("the ratio is ours ÷ theirs, 2 here: how many times slower ours is")
    if "norm" in got and abs(got["norm"][1] - 1.0) < 1e-9:
        raise Wrong("the ratio is ours ÷ theirs, 2 here, not by how much that is over 1")
    same("the answer", got, {"norm": ("eager", 2.0)})
    modes = (*table.MODES, *table.HEAD_MODES)
    peers = ("liger_fn", "eager", "torch.compile", "native", "liger-kernel")
    real = {
        case: {who: row.us for who, row in rows.items() if row.us and who in peers} for case, rows in measured().items() if case[2] in modes
    }
    lines = [f"{' '.join(case):<48} {who:<14} × {by:.2f}" for case, (who, by) in answer(real, "liger_fn", 0.02).items()]
    return f"Of {len(real)} committed comparisons, others are over 2 % faster in {len(lines)}:\n" + "\n".join(lines)


@exercise("12.2", "what it is worth to a step", hint="1 / sum(fraction / speedup), with a speedup of 1 for parts that stay")
def step_speedup(answer: Answer) -> str | None:
    for fractions, speedups, right in (
        ({"head": 0.5, "rest": 0.5}, {"head": 2.0}, 1 / 0.75),
        ({"norm": 0.2, "head": 0.3, "rest": 0.5}, {"norm": 4.0, "head": 3.0}, 1 / (0.05 + 0.1 + 0.5)),
        ({"all": 1.0}, {}, 1.0),
        ({"norm": 0.4, "rest": 0.6}, {"norm": math.inf}, 1 / 0.6),
    ):
        got = answer(fractions, speedups)
        mean = sum(f * speedups.get(p, 1.0) for p, f in fractions.items())
        if got == mean and abs(got - right) > 1e-9:
            raise Wrong("that is the mean of the speedups: times add up, not speedups")
        if abs(got * right - 1) < 1e-9 and abs(got - 1) > 1e-9:
            raise Wrong("that is the new time as a fraction of the old; the speedup is its inverse")
        if not abs(got - right) < 1e-9:
            raise Wrong(f"for {fractions} and {speedups}: {got:.4g}, expected {right:.4g}. Do parts that are not in speedups stay?")
    return "Times add up; speedups do not."


@dataclass(frozen=True)
class Kernel:
    """Something to launch: it reads memory, which a warm cache shortens, and does work of its own, which that does not."""

    name: str
    us_per_mib: float
    own_us: float = 0.0


@dataclass
class Device:
    """A device with a clock, whose every nuisance can be switched off."""

    compiles: bool = True
    caches: bool = True
    shared: bool = True
    heats: bool = True
    host: float = 0.0  # the host's clock
    free: float = 0.0  # when the device will have done what is queued
    calls: int = 0
    cached: bool = False
    known: set[tuple[str, torch.dtype]] = field(default_factory=set)
    dtypes: set[torch.dtype] = field(default_factory=set)

    def launch(self, kernel: Kernel, x: Tensor) -> None:
        """Queue a call. The host goes on at once."""
        self.host += 1.0
        if self.compiles and (kernel.name, x.dtype) not in self.known:
            self.host += 20_000.0
        self.known.add((kernel.name, x.dtype))
        self.dtypes.add(x.dtype)
        self.calls += 1
        us = kernel.own_us + kernel.us_per_mib * x.nbytes / 2**20 * (0.4 if self.caches and self.cached else 1.0)
        us *= 1 + 0.004 * min(self.calls, 400) * self.heats
        us += 400.0 if self.shared and self.calls % 7 == 0 else 0.0
        self.free, self.cached = max(self.free, self.host) + us, True

    def flush(self) -> None:
        """Empty the cache: queued, and not free."""
        self.host += 1.0
        self.free, self.cached = max(self.free, self.host) + 50.0, False

    def synchronize(self) -> None:
        """Wait until all that was queued is done."""
        self.host = max(self.host, self.free)

    def now(self) -> float:
        """The host's clock, in µs."""
        return self.host


QUIET = {"compiles": False, "caches": False, "shared": False, "heats": False}
# What is switched on, whose fault it shows, and how many times slower theirs is. A wrong answer is off on one of them alone.
DEVICES: tuple[tuple[dict[str, bool], float, str], ...] = (
    ({}, 3.0, "even on a quiet device: is the clock read before the device is done? A launch returns at once: synchronize, then read it"),
    ({"compiles": True}, 3.0, "on a device that compiles: the first call is in it. Launch both once, and wait, before you begin"),
    ({"caches": True}, 3.0, "on a device with a cache: the input was warm. Flush before each call"),
    ({"shared": True}, 3.0, "on a device that others use too: now and then a call takes much longer. Take the median, not the mean"),
    ({"heats": True}, 1.0, "on a device that heats: one kernel was timed after the other, and met a slower device. Take turns"),
    ({"compiles": True, "caches": True, "shared": True, "heats": True}, 1.5, "where all comes together"),
)


@exercise(
    "12.3",
    "a fair ratio",
    hint="launch both once and synchronize; then, repeat times and for both: flush, synchronize, now, launch, synchronize, now. Medians, theirs over ours",
)
def ratio(answer: Answer) -> str | None:
    x = torch.empty(64, 2**20, dtype=torch.bfloat16, device="meta")  # 128 MiB
    for on, true, why in DEVICES:
        device = Device(**(QUIET | on))
        cold = 0.8 * x.nbytes / 2**20
        got: Any = answer(device, Kernel("ours", 0.8), Kernel("theirs", 0.8, own_us=(true - 1) * cold), x, 31)
        if device.dtypes != {x.dtype}:
            raise Wrong(
                f"a kernel was given {device.dtypes - {x.dtype}}, where x is {x.dtype}: twice the bytes, twice the time. Give both the same"
            )
        if device.calls < 62:
            raise Wrong(f"{device.calls} launches: both kernels, repeat times each")
        if true != 1 and abs(got * true - 1) < 0.05:
            raise Wrong(f"{got:.3f} for a true {true:.3f}: it is upside down, theirs ÷ ours is asked for")
        if not on and abs(got - (true * cold + 50) / (cold + 50)) < 0.05:  # what a flush takes
            raise Wrong(f"{got:.3f} for a true {true:.3f}: the flush is in both times. Synchronize after it, before you read the clock")
        # The host's launch of 1 µs is in both times, and heat rises between the two calls of a turn: less than 2 % together.
        if not abs(got / true - 1) < 0.03:
            raise Wrong(f"{got:.3f} for a true {true:.3f}, {why}")
    return "Within 3 % of the truth on every device."


@dataclass(frozen=True)
class Choice:
    """What `choose` is given: a part of a step, and what each tool takes for it."""

    share: float
    device_us: Mapping[str, float]
    host_us: Mapping[str, float] = field(default_factory=dict)
    mib: Mapping[str, float] = field(default_factory=dict)
    room: float = math.inf
    compiles: bool = True


TIMES = {"native": 30.0, "eager": 90.0, "torch.compile": 20.0, "liger_fn": 20.1}
MIB = {"native": 10.0, "eager": 80.0, "torch.compile": 40.0, "liger_fn": 5.0}
CHOICES: tuple[tuple[Choice, str, str], ...] = (
    (Choice(0.2, TIMES), "torch.compile", "liger_fn is a tie with it, and it is installed already (step 4)"),
    (Choice(0.2, TIMES | {"liger_fn": 15.0}), "liger_fn", "it is a quarter faster (step 4)"),
    (Choice(0.015, TIMES), "leave it", "1 / (1 - 0.015) is 1.015: less than 2 % of the step (step 1)"),
    (
        Choice(0.0198, TIMES),
        "torch.compile",
        "1 / (1 - 0.0198) is 1.0202: just over 2 % (step 1 is about the step's speedup, not the share)",
    ),
    (Choice(0.2, TIMES, compiles=False), "liger_fn", "the model does not compile (step 2)"),
    (Choice(0.2, TIMES, mib=MIB, room=20.0), "liger_fn", "torch.compile needs 40 MiB where 20 are free (step 2)"),
    (
        Choice(0.2, TIMES, {"native": 8.0, "eager": 50.0, "torch.compile": 60.0, "liger_fn": 70.0}),
        "native",
        "the host sets the pace (step 3)",
    ),
    (Choice(0.2, TIMES, mib=MIB, room=1.0), "own kernel", "no tool fits into 1 MiB"),
)


@exercise(
    "12.4",
    "a rule to choose by",
    hint="cost = {tool: max(device, host.get(tool, 0)) for tools that are allowed}; the first in the order with cost <= 1.02 * min(cost.values())",
)
def choose(answer: Answer) -> str | None:
    for case, right, why in CHOICES:
        try:
            got = answer(case)
        except KeyError as error:
            raise Wrong(
                f"{error} is not in one of the dicts of {case}: a tool that is not in `host_us` or `mib` takes nothing there"
            ) from error
        if got != right:
            raise Wrong(f"for {case}: {got!r}, expected {right!r}: {why}")
    return _decided(answer)


def _decided(answer: Answer) -> str:
    """The table of a rule over the committed figures: a part of 10 % of a step, where it compiles, and where it does not and memory is short."""
    tools = ("native", "eager", "torch.compile", "liger_fn")
    lines = [f"{'forward and backward':<40} {'it compiles':<16} {'no compiler':<16} in the least memory"]
    for (op, shape, mode), rows in measured().items():
        rows = {who: row for who, row in rows.items() if who in tools and row.us and row.mib is not None}
        if mode in (table.BOTH, table.HEAD_BOTH) and "liger_fn" in rows:
            us, mib = {w: r.us for w, r in rows.items()}, {w: r.mib for w, r in rows.items()}
            least = 1.05 * min(mib.values())
            cells = (Choice(0.1, us), Choice(0.1, us, compiles=False), Choice(0.1, us, mib=mib, room=least))
            lines.append(f"{op + ' ' + shape:<40} " + " ".join(f"{answer(c):<16}" for c in cells).rstrip())
    return "\n".join(lines)
