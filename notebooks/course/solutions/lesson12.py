"""Answers of lesson 12."""

from __future__ import annotations

from statistics import median

from course import solution


@solution("12.1")
def slower(times, ours):
    found = {}
    for case, by_tool in times.items():
        others = {tool: t for tool, t in by_tool.items() if tool != ours}
        if ours in by_tool and others:
            who = min(others, key=others.get)
            if others[who] < by_tool[ours]:
                found[case] = (who, by_tool[ours] / others[who])
    return found


@solution("12.2")
def step_speedup(fractions, speedups):
    return 1 / sum(f / speedups.get(part, 1.0) for part, f in fractions.items())


def times(device, fn, repeat, flush=True, wait=True, first=True):
    if first:
        device.launch(fn)
        device.synchronize()
    found = []
    for _ in range(repeat):
        if flush:
            device.flush()
            device.synchronize()
        start = device.now()
        device.launch(fn)
        if wait:
            device.synchronize()
        found.append(device.now() - start)
    return found


@solution("12.3")
def measure(device, fn, repeat):
    return median(times(device, fn, repeat))
