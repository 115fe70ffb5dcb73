"""Likely wrong answers of lesson 12."""

from __future__ import annotations

from statistics import mean, median

from course import mistake
from course.solutions.lesson12 import slower as right
from course.solutions.lesson12 import step_speedup, times


@mistake("12.1", "ours ÷ theirs")
def other_way_round(by_case, ours):
    return {case: (who, 1 / ratio) for case, (who, ratio) in right(by_case, ours).items()}


@mistake("12.1", "the fastest other")
def the_first_that_is_faster(by_case, ours):
    return {c: next((w, t[ours] / v) for w, v in t.items() if v < t[ours]) for c, t in by_case.items() if c in right(by_case, ours)}


@mistake("12.1", "equal is not faster")
def equal_too(by_case, ours):
    return right(by_case, ours) | {"glu": ("compile", 1.0)}


@mistake("12.2", "times add up")
def mean_of_speedups(fractions, speedups):
    return sum(f * speedups.get(part, 1.0) for part, f in fractions.items())


@mistake("12.2", "its inverse")
def new_time(fractions, speedups):
    return 1 / step_speedup(fractions, speedups)


@mistake("12.3", "that is the launch")
def never_waits(device, fn, repeat):
    return median(times(device, fn, repeat, wait=False))


@mistake("12.3", "the cache was warm")
def never_flushes(device, fn, repeat):
    return median(times(device, fn, repeat, flush=False))


@mistake("12.3", "compilation is in it")
def compiles_in_between(device, fn, repeat):
    return mean(times(device, fn, repeat, first=False))


@mistake("12.3", "not the mean")
def the_mean(device, fn, repeat):
    return mean(times(device, fn, repeat))


@mistake("12.3", "the flush is in it")
def times_the_flush(device, fn, repeat):
    device.launch(fn)
    device.synchronize()
    found = []
    for _ in range(repeat):
        start = device.now()
        device.flush()
        device.launch(fn)
        device.synchronize()
        found.append(device.now() - start)
    return median(found)
