"""The pictures of a run: what fraction of the machine each provider reaches, and time and memory by size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to a file on machines without a display

from matplotlib import pyplot as plt

from .peers import COMPILE, EAGER, LIGER, NATIVE, OURS, PROVIDERS
from .results import Row
from .table import BOTH, MODES

COLOURS = {OURS: "#e4572e", EAGER: "#c9ccd1", COMPILE: "#8a8f98", NATIVE: "#3a7ca5", LIGER: "#6aa84f"}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.color": "#222222", "axes.titlelocation": "left"}


def _bars(axes: Any, rows: Sequence[Row], labels: Sequence[str], label: Callable[[Row], str], value: Callable[[Row], float | None]) -> None:
    """A group of bars for each label, from the top; in it one for each provider, and a gap for one that has no value."""
    providers = [p for p in PROVIDERS if any(r.provider == p for r in rows)]
    height = 0.8 / len(providers)
    for i, provider in enumerate(providers):
        found = [(labels.index(label(r)), value(r)) for r in rows if r.provider == provider]
        drawn = [(place + (i + 0.5) * height - 0.4, length) for place, length in found if length is not None]
        axes.barh([d[0] for d in drawn], [d[1] for d in drawn], height * 0.9, color=COLOURS[provider], label=provider)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def floor(rows: Sequence[Row], title: str, path: Path) -> None:
    """Floor over time, in percent, ours against peers: 100 is all that the machine's memory or matrix units allow."""

    def label(r: Row) -> str:
        return f"{r.op}\n{r.shape}"

    labels = list(dict.fromkeys(map(label, rows)))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, 2, figsize=(11, 1.2 + 0.62 * len(labels)), sharey=True, layout="constrained", dpi=110)
        for axes, mode in zip(grid, MODES, strict=True):
            of_mode = [r for r in rows if r.mode == mode]
            _bars(axes, of_mode, labels, label, lambda r: 100 / r.over_floor if r.over_floor else None)
            axes.axvline(100, color="#222222", linewidth=0.8, linestyle="--")
            axes.set_title(f"{mode}: % of the floor's speed")
        _finish(figure, grid[-1], title, path)


def sizes(rows: Sequence[Row], title: str, path: Path) -> None:
    """Time and peak memory of forward + backward, from zero: a row of axes for each function, a group of bars for each size."""
    both = [r for r in rows if r.mode == BOTH]
    ops = list(dict.fromkeys(r.op for r in both))
    shapes = {op: list(dict.fromkeys(r.shape for r in both if r.op == op)) for op in ops}
    heights = [0.5 + len(shapes[op]) for op in ops]
    with plt.rc_context(STYLE):
        size = (11, 1 + 0.62 * sum(heights))
        figure, grid = plt.subplots(len(ops), 2, figsize=size, height_ratios=heights, squeeze=False, layout="constrained", dpi=110)
        for (time, memory), op in zip(grid, ops, strict=True):
            found = [r for r in both if r.op == op]
            _bars(time, found, shapes[op], lambda r: r.shape, lambda r: r.us)
            _bars(memory, found, shapes[op], lambda r: r.shape, lambda r: r.mib)
            time.set_title(f"{op}: µs")
            memory.set_title(f"{op}: peak MiB over the inputs")
            memory.set_yticklabels([])
        _finish(figure, grid[0, 0], title, path)


def _finish(figure: Any, legend: Any, title: str, path: Path) -> None:
    handles, names = legend.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False)
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path)
    plt.close(figure)
