"""Checks of lesson 12: reading figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from course import Wrong, exercise, same
from course.exercises import Answer


@exercise(
    "12.1",
    "where others are faster",
    hint="for each case with ours and another tool: who = min of the others; keep it if its time is below ours",
)
def slower(answer: Answer) -> str | None:
    times = {
        "norm": {"ours": 10.0, "compile": 8.0, "eager": 5.0},
        "glu": {"ours": 10.0, "compile": 10.0},
        "rope": {"ours": 10.0, "compile": 12.0},
        "head": {"compile": 3.0},
        "alone": {"ours": 1.0},
    }
    got = answer(times, "ours")
    if "rope" in got:
        raise Wrong("rope is there, where ours is the faster")
    if "glu" in got:
        raise Wrong("glu is there: equal is not faster")
    if "norm" in got and got["norm"][0] == "compile":
        raise Wrong("norm: eager is faster than compile; the fastest other is asked for")
    if "norm" in got and abs(got["norm"][1] - 0.5) < 1e-9:
        raise Wrong("the ratio is ours ÷ theirs, 2 here: how many times slower ours is")
    same("the answer", got, {"norm": ("eager", 2.0)})
    return None


@exercise("12.2", "what it is worth to a step", hint="1 / sum(fraction / speedup), with a speedup of 1 for parts that stay")
def step_speedup(answer: Answer) -> str | None:
    for fractions, speedups, right in (
        ({"head": 0.5, "rest": 0.5}, {"head": 2.0}, 1 / 0.75),
        ({"norm": 0.2, "head": 0.3, "rest": 0.5}, {"norm": 4.0, "head": 3.0}, 1 / (0.05 + 0.1 + 0.5)),
        ({"all": 1.0}, {}, 1.0),
    ):
        got = answer(fractions, speedups)
        if abs(got - sum(f * speedups.get(p, 1.0) for p, f in fractions.items())) < 1e-9 and abs(got - right) > 1e-9:
            raise Wrong("that is the mean of the speedups: times add up, not speedups")
        if abs(got * right - 1) < 1e-9 and abs(got - 1) > 1e-9:
            raise Wrong("that is the new time as a fraction of the old; the speedup is its inverse")
        if abs(got - right) > 1e-9:
            raise Wrong(f"for {fractions} and {speedups}: {got:.4g}, expected {right:.4g}")
    return None


class Device:
    """A device with a clock: calls are queued, and take their time; what was not flushed is quick; the first call of a function is slow."""

    def __init__(self) -> None:
        self.host, self.free, self.warm, self.compiled, self.calls = 0.0, 0.0, False, set(), 0

    def launch(self, fn: Callable[[], float]) -> None:
        """Queue `fn`, whose value is its device time in µs with a cold cache."""
        self.host += 5.0
        if fn not in self.compiled:
            self.compiled.add(fn)
            self.host += 10_000.0
        self.calls += 1
        hiccup = 300.0 if self.calls % 7 == 0 else 0.0  # now and then somebody else has the device
        self.free = max(self.free, self.host) + fn() * (0.3 if self.warm else 1.0) + hiccup
        self.warm = True

    def flush(self) -> None:
        """Empty the cache; on the device, after what is queued."""
        self.host += 1.0
        self.free = max(self.free, self.host) + 50.0
        self.warm = False

    def synchronize(self) -> None:
        """Wait for all that is queued."""
        self.host = max(self.host, self.free)

    def now(self) -> float:
        """The host's clock in µs."""
        return self.host


@exercise(
    "12.3",
    "a timing function",
    hint="one call and synchronize() first; then, repeat times: flush, synchronize, now, launch, synchronize, now; the median of the differences",
)
def measure(answer: Answer) -> str | None:
    for true in (100.0, 40.0):
        made: list[Device] = []

        def fn(true: float = true) -> float:
            return true

        device = Device()
        made.append(device)
        got: Any = answer(device, fn, 31)
        if got > 300 and got * 31 > 9_000:
            raise Wrong(
                f"{got:,.0f} µs for a call of {true:.0f}: compilation is in it, or times were added and not divided. Call it once before you begin"
            )
        if got < 10:
            raise Wrong(f"{got:.1f} µs for a call of {true:.0f}: that is the launch. Wait for the device before you read the clock again")
        if abs(got - 0.3 * true - 5) < 6 or abs(got - 0.3 * true) < 3:
            raise Wrong(f"{got:.1f} µs for a call of {true:.0f}: the cache was warm. Flush it before each call")
        if true + 44 < got < true + 66:
            raise Wrong(f"{got:.1f} µs for a call of {true:.0f}: the flush is in it. Synchronize after it, before you read the clock")
        if got > true + 20:
            raise Wrong(f"{got:.1f} µs for a call of {true:.0f}: now and then somebody else has the device. Take the median, not the mean")
        if abs(got - true) > 6:
            raise Wrong(f"{got:.1f} µs for a call of {true:.0f}")
    return "Within a launch of the truth."
