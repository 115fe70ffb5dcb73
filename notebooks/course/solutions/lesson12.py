"""Answers of lesson 12."""

from __future__ import annotations

from statistics import median

from course import solution


@solution("12.1")
def slower(times, ours, margin):
    found = {}
    for case, by_tool in times.items():
        others = {tool: t for tool, t in by_tool.items() if tool != ours}
        if ours in by_tool and others:
            who = min(others, key=others.get)
            if by_tool[ours] / others[who] > 1 + margin:
                found[case] = (who, by_tool[ours] / others[who])
    return found


@solution("12.2")
def step_speedup(fractions, speedups):
    return 1 / sum(f / speedups.get(part, 1.0) for part, f in fractions.items())


def once(device, kernel, x, flush=True, settle=True, wait=True):
    if flush:
        device.flush()
    if settle:
        device.synchronize()
    start = device.now()
    device.launch(kernel, x)
    if wait:
        device.synchronize()
    return device.now() - start


@solution("12.3")
def ratio(device, ours, theirs, x, repeat):
    for kernel in (ours, theirs):
        device.launch(kernel, x)
    device.synchronize()
    turns = [(once(device, ours, x), once(device, theirs, x)) for _ in range(repeat)]
    mine, other = (median(times) for times in zip(*turns, strict=True))
    return other / mine


@solution("12.4")
def choose(case):
    if 1 / (1 - case.share) < 1.02:
        return "leave it"
    order = ("native", "eager", "torch.compile", "liger_fn")
    fit = [t for t in order if t in case.device_us and case.mib.get(t, 0) <= case.room and (case.compiles or t != "torch.compile")]
    cost = {tool: max(case.device_us[tool], case.host_us.get(tool, 0)) for tool in fit}
    return next((tool for tool in fit if cost[tool] <= 1.02 * min(cost.values())), "own kernel")
