"""Likely wrong answers of lesson 12."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from statistics import mean, median

from course import mistake
from course.solutions.lesson12 import choose as right_choice
from course.solutions.lesson12 import once, step_speedup
from course.solutions.lesson12 import slower as right


@mistake("12.1", "ours ÷ theirs")
def other_way_round(times, ours, margin):
    return {case: (who, 1 / ratio) for case, (who, ratio) in right(times, ours, margin).items()}


@mistake("12.1", "over 1")
def what_is_over_one(times, ours, margin):
    return {"norm": ("eager", times["norm"][ours] / times["norm"]["eager"] - 1)}


@mistake("12.1", "the fastest other")
def the_first_that_is_faster(times, ours, margin):
    return {c: next((w, t[ours] / v) for w, v in t.items() if v < t[ours]) for c, t in times.items() if c in right(times, ours, margin)}


@mistake("12.1", "within the margin")
def without_a_margin(times, ours, margin):
    return right(times, ours, 0.0)


@mistake("12.2", "times add up")
def mean_of_speedups(fractions, speedups):
    return sum(f * speedups.get(part, 1.0) for part, f in fractions.items())


@mistake("12.2", "its inverse")
def new_time(fractions, speedups):
    return 1 / step_speedup(fractions, speedups)


@mistake("12.2", "stay?")
def forgets_what_stays(fractions, speedups):
    return 1 / max(sum(fractions[part] / s for part, s in speedups.items()), 1e-9)


def _ratio(device, ours, theirs, x, repeat, of=median, first=True, turns=True, convert=lambda x: x, **how):
    if first:
        for kernel, given in ((ours, x), (theirs, convert(x))):
            device.launch(kernel, given)
        device.synchronize()
    if turns:
        pairs = [(once(device, ours, x, **how), once(device, theirs, convert(x), **how)) for _ in range(repeat)]
        mine, other = zip(*pairs, strict=True)
    else:
        mine = [once(device, ours, x, **how) for _ in range(repeat)]
        other = [once(device, theirs, convert(x), **how) for _ in range(repeat)]
    return of(other) / of(mine)


@mistake("12.3", "twice the bytes")
def another_dtype(device, ours, theirs, x, repeat):
    return _ratio(device, ours, theirs, x, repeat, convert=lambda x: x.float())


@mistake("12.3", "synchronize, then read it")
def never_waits(device, ours, theirs, x, repeat):
    return _ratio(device, ours, theirs, x, repeat, wait=False)


@mistake("12.3", "the first call is in it")
def compiles_in_between(device, ours, theirs, x, repeat):
    return _ratio(device, ours, theirs, x, repeat, of=mean, first=False)


@mistake("12.3", "the input was warm")
def never_flushes(device, ours, theirs, x, repeat):
    return _ratio(device, ours, theirs, x, repeat, flush=False)


@mistake("12.3", "not the mean")
def the_mean(device, ours, theirs, x, repeat):
    return _ratio(device, ours, theirs, x, repeat, of=mean)


@mistake("12.3", "Take turns")
def one_after_the_other(device, ours, theirs, x, repeat):
    return _ratio(device, ours, theirs, x, repeat, turns=False)


@mistake("12.3", "the flush is in both times")
def times_the_flush(device, ours, theirs, x, repeat):
    def both(kernel):
        start = device.now()
        once(device, kernel, x, settle=False)
        return device.now() - start

    for kernel in (ours, theirs):
        device.launch(kernel, x)
    device.synchronize()
    pairs = [(both(ours), both(theirs)) for _ in range(repeat)]
    return median(b for _, b in pairs) / median(a for a, _ in pairs)


@mistake("12.3", "upside down")
def ours_over_theirs(device, ours, theirs, x, repeat):
    return 1 / _ratio(device, ours, theirs, x, repeat)


@mistake("12.4", "`host_us` or `mib`")
def every_tool_in_every_dict(case):
    fit = [tool for tool in case.device_us if case.mib[tool] <= case.room]
    return min(fit, key=lambda tool: max(case.device_us[tool], case.host_us[tool]))


@mistake("12.4", "the host sets the pace")
def device_alone(case):
    return right_choice(replace(case, host_us={}))


@mistake("12.4", "torch.compile needs 40 MiB")
def memory_forgotten(case):
    return right_choice(replace(case, room=inf))


@mistake("12.4", "a tie")
def the_fastest_alone(case):
    return "torch.compile" if right_choice(case) == "leave it" else "liger_fn"


@mistake("12.4", "not the share")
def share_below_two_percent(case):
    return "leave it" if case.share < 0.02 else right_choice(case)
