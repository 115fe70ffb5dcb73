"""The picture: for each model the losses of stock and patched on top of one another, and below them how far each run is from stock."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to a file on machines without a display

from matplotlib import pyplot as plt

from .measure import BIN, PATCHED, Result

INK, STOCK, OURS = "#222222", "#8a8f98", "#e4572e"
YARDSTICKS = ("#3a7ca5", "#6aa84f", "#8e5ea2", "#f2a541", "#5bb5b0")
STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK, "axes.titlelocation": "left"}
COLUMNS = 3


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """Write the PNG for the results of one dtype."""
    columns = min(COLUMNS, len(results))
    rows = -(-len(results) // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            2 * rows, columns, figsize=(4 * columns, 3.9 * rows + 0.6), dpi=110, layout="constrained", squeeze=False,
            height_ratios=[3, 2] * rows,
        )  # fmt: skip
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        for place in range(rows * columns):
            above, below = grid[place // columns * 2][place % columns], grid[place // columns * 2 + 1][place % columns]
            if place >= len(results):
                above.set_visible(False)
                below.set_visible(False)
                continue
            _losses(above, results[place])
            _differences(below, results[place])
        labels = {text: line for axes in grid.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(labels.values(), labels, loc="outside lower center", ncols=len(labels), frameon=False)
        figure.savefig(path)
        plt.close(figure)


def _losses(axes: Any, result: Result) -> None:
    steps = _steps(result)
    patched = [a + b for a, b in zip(result.losses, result.runs[PATCHED].shift, strict=True)]
    # Equal curves hide each other: the first is wide and pale.
    axes.plot(steps, result.losses, color=STOCK, linewidth=4.5, alpha=0.55, label="stock")
    axes.plot(steps, patched, color=OURS, linewidth=1.2, label=PATCHED)
    axes.set_title(f"{result.model}: training loss")
    axes.tick_params(labelbottom=False)
    axes.grid(axis="y", alpha=0.25)


def _differences(axes: Any, result: Result) -> None:
    colours = dict(zip(result.yardsticks, YARDSTICKS, strict=False)) | {PATCHED: OURS}
    for name, colour in colours.items():
        # Equal bits have no place on a logarithm's axis.
        curve = [value or float("nan") for value in result.runs[name].curve]
        wide = 1.5 if name == PATCHED else 0.9
        axes.plot(_steps(result), curve, ".-", color=colour, linewidth=wide, markersize=2, label=f"{name}, from stock")
    axes.set_yscale("log")
    axes.set_title("|difference from stock|")
    axes.set_xlabel("step")
    axes.grid(axis="y", alpha=0.25)


def _steps(result: Result) -> list[int]:
    return [BIN * i + 1 for i in range(len(result.losses))]
