"""The picture of a comparison: loss curves and their difference, speed, memory."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to a file on machines without a display

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import _report
from _report import Comparison, differences
from _runs import Result

INK, STOCK, PATCHED, OTHER = "#222222", "#8a8f98", "#e4572e", "#3a7ca5"


def draw(result: Comparison, path: Path) -> None:
    """Write the PNG: the losses over the steps, the relative difference below them, throughput and peak memory beside them."""
    runs = [(result.stock, STOCK), (result.patched, PATCHED)] + ([(result.other, OTHER)] if result.other else [])
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK, "axes.titlelocation": "left"}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(11, 5.6), dpi=130, layout="constrained")
        axes = figure.subplot_mosaic("LLLSS;LLLSS;LLLSS;LLLMM;DDDMM;DDDMM")
        figure.suptitle(_title(result), x=0.01, ha="left", fontsize=11)
        _losses(axes["L"], runs)
        _differences(axes["D"], result, runs)
        _bars(axes["S"], runs, "tokens_per_s", "throughput, tokens/s")
        _bars(axes["M"], runs, "peak_mib", "peak memory, MiB")
        axes["L"].sharex(axes["D"])
        axes["L"].tick_params(labelbottom=False)
        figure.savefig(path)
        plt.close(figure)


def _title(result: Comparison) -> str:
    options = result.options
    preset = options.preset
    dtype = str(preset.dtype).removeprefix("torch.")
    return f"{options.model_type}, {preset.name}: {preset.batch} × {preset.seq} tokens a step, {dtype}, {_report.machine(options.device)}"


def _losses(axes: Axes, runs: list[tuple[Result, str]]) -> None:
    # Equal curves hide each other: the first is wide and pale, the next thin, a third dotted.
    for (run, colour), (width, dash) in zip(runs, ((5.0, "-"), (1.6, "-"), (1.6, ":")), strict=False):
        steps = range(1, len(run.losses) + 1)
        axes.plot(steps, run.losses, dash, color=colour, linewidth=width, label=run.name, alpha=0.55 if width > 3 else 1.0)
    axes.set_title("training loss")
    axes.legend(frameon=False)
    axes.grid(axis="y", alpha=0.25)


def _differences(axes: Axes, result: Comparison, runs: list[tuple[Result, str]]) -> None:
    for run, colour in runs[1:]:
        found = differences(result.stock, run)
        axes.plot(range(1, len(found) + 1), found, "o", color=colour, markersize=3)
    if result.options.device == "cpu":
        axes.axhline(_report.EXACT, color=INK, linewidth=0.8, linestyle="--")
        axes.annotate("allowed", (1.0, _report.EXACT), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axes.set_yscale("symlog", linthresh=1e-8)  # equal bits are 0, which a logarithm has no place for
    axes.set_ylim(bottom=-2e-9)
    axes.set_title("relative difference from stock")
    axes.set_xlabel("step")
    axes.grid(axis="y", alpha=0.25)


def _bars(axes: Axes, runs: list[tuple[Result, str]], key: str, title: str) -> None:
    values = [getattr(run, key) for run, _ in runs]
    names = [run.name for run, _ in runs]
    bars = axes.barh(names, values, color=[colour for _, colour in runs], height=0.5)
    labels = [f"{value:,.0f}  (× {value / (values[0] or 1):.2f})" for value in values]
    axes.bar_label(bars, [f"{values[0]:,.0f}", *labels[1:]], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(*values, 1e-9))
    axes.set_title(title)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
