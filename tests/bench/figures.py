"""The pictures of a run: what fraction of the machine each provider reaches, and time and memory by size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to a file on machines without a display

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from .peers import COMPILE, DONATE, EAGER, EXACT, LIGER, NATIVE, OURS, PROVIDERS, WEIGHT
from .report import along
from .results import Row
from .table import MODES

Value = Callable[[Row], float | None]

COLOURS = {OURS: "#e4572e", DONATE: "#f2a541", EAGER: "#c9ccd1", COMPILE: "#8a8f98", NATIVE: "#3a7ca5", LIGER: "#6aa84f"}
COLOURS |= {WEIGHT: "#f2a541", EXACT: "#8e5ea2"}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.color": "#222222", "axes.titlelocation": "left"}


def _bars(axes: Any, rows: Sequence[Row], labels: Sequence[str], label: Callable[[Row], str], value: Value) -> None:
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
        _finish(figure, title, path)


def time(rows: Sequence[Row], title: str, path: Path) -> None:
    """Time of forward + backward against size, a column for each function: in ms, and in multiples of the floor."""
    _by_size(rows, {"ms": lambda r: None if r.us is None else r.us / 1e3, "time ÷ floor": lambda r: r.over_floor}, title, path)


def memory(rows: Sequence[Row], title: str, path: Path) -> None:
    """Peak memory of forward + backward against size, likewise."""
    _by_size(rows, {"peak MiB over the inputs": lambda r: r.mib}, title, path)


def heads(rows: Sequence[Row], title: str, path: Path) -> None:
    """Time of a token, and the workspace of all, against tokens; dashed, the time of the matrix products alone."""
    panels: dict[str, Value] = {"µs a token (dashed: three matrix products)": lambda r: r.us / r.size if r.us else None}
    if any(r.mib is not None for r in rows):
        panels["workspace, MiB, over inputs and gradients"] = lambda r: r.mib
    ours = sorted((r for r in rows if r.provider == OURS and r.floor_us), key=lambda r: r.size)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(panels), figsize=(11, 4.6), squeeze=False, layout="constrained", dpi=110)
        for axes, (unit, value) in zip(grid[0], panels.items(), strict=True):
            _lines(axes, sorted(rows, key=lambda r: r.size), value, log=True)
            axes.set_title(unit)
            axes.set_xlabel("tokens")
        grid[0][0].plot([r.size for r in ours], [r.floor_us / r.size for r in ours], color="#222222", linewidth=0.8, linestyle="--")
        _finish(figure, title, path)


def _by_size(rows: Sequence[Row], values: dict[str, Value], title: str, path: Path) -> None:
    ops = list(dict.fromkeys(r.op for r in rows))
    with plt.rc_context(STYLE):
        size = (1 + 4 * len(ops), 1 + 3.2 * len(values))
        figure, grid = plt.subplots(len(values), len(ops), figsize=size, squeeze=False, layout="constrained", dpi=110)
        for line, (unit, value) in zip(grid, values.items(), strict=True):
            for axes, op in zip(line, ops, strict=True):
                _lines(axes, sorted((r for r in rows if r.op == op), key=lambda r: r.size), value)
                axes.set_title(f"{op}: {unit}")
        for axes, op in zip(grid[-1], ops, strict=True):
            axes.set_xlabel(along(op))
        _finish(figure, title, path)


def _lines(axes: Any, rows: Sequence[Row], value: Value, *, log: bool = False) -> None:
    """A line for each provider, ours on top; sizes by powers of 2, and values from 0 where that shows how they differ, if not `log`."""
    lengths = sorted({r.size for r in rows})
    values = [v for r in rows if (v := value(r)) is not None]
    for i, provider in enumerate(p for p in PROVIDERS if any(r.provider == p for r in rows)):
        found = [(r.size, v) for r in rows if r.provider == provider and (v := value(r)) is not None]
        width, order = (2.4, 9) if provider == OURS else (1.4, 3)
        x, y = [f[0] for f in found], [f[1] for f in found]
        # Providers that agree lie on one another: markers of several sizes show them all.
        look = {"marker": "o", "markersize": 9 - 1.3 * i, "markerfacecolor": "none", "color": COLOURS[provider]}
        axes.plot(x, y, linewidth=width, label=provider, zorder=order, **look)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [_length(n) for n in lengths])
    axes.minorticks_off()
    span = max(values) / min(values) if min(values, default=0) > 0 else 1
    if log or span > 4:
        axes.set_yscale("log", base=2 if span < 40 else 10)
        if span <= 4:
            axes.yaxis.set_major_locator(LogLocator(2, (1.0, 1.25, 1.5, 1.75)))
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:,.10g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.1 * max(values, default=1) or 1)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)


def _length(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def _finish(figure: Any, title: str, path: Path) -> None:
    """One legend of all that any of the axes shows."""
    shown = {name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = [p for p in PROVIDERS if p in shown]
    columns = len(names) if len(names) <= 5 else 3  # so that there is room for the title
    figure.legend([shown[n] for n in names], names, loc="outside upper right", ncols=columns, frameon=False)
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path)
    plt.close(figure)
