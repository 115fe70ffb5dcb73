"""Pictures in one style. Figures have a ground of their own, light and opaque, so that they read well on light and on dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

INK, PAPER = "#22252a", "#fafaf7"
PALETTE = ("#e4572e", "#3a7ca5", "#76b041", "#f2a541", "#8e6c8a", "#4c9f9b", "#b56576", "#8a8f98")
STYLE = {
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "figure.dpi": 110,
    "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 11,
    "axes.grid": False, "grid.alpha": 0.25, "legend.frameon": False, "axes.prop_cycle": mpl.cycler(color=PALETTE),
}  # fmt: skip
mpl.rcParams.update(STYLE)


def figure(width: float = 8.0, height: float = 3.2, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes in the course's style, in inches; `options` are those of `plt.subplots`. A cell shows it by ending with it."""
    fig, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)
    plt.close(fig)  # else Jupyter would show it once more
    return fig, axes


def access(ax: Axes, programs: Sequence[Sequence[int]], columns: int, title: str = "", masked: Sequence[int] = ()) -> None:
    """Which program touches which element: a grid of elements, `columns` a row, each in the colour and with the number of its program.

    Args:
        programs: for each program, the flat indices of the elements that it touches. Those beyond the array are drawn hatched, if `masked`.
        columns: elements in a row of the picture.
        masked: indices that a program counts but its mask keeps it from.
    """
    hidden, last = set(masked), 0
    for program, elements in enumerate(programs):
        colour = PALETTE[program % len(PALETTE)]
        for i in elements:
            row, col = divmod(int(i), columns)
            last = max(last, row)
            off = int(i) in hidden
            ax.add_patch(
                Rectangle(
                    (col, row),
                    0.92,
                    0.92,
                    facecolor="none" if off else colour,
                    edgecolor=colour,
                    hatch="////" if off else None,
                    linewidth=0.8,
                )
            )
            ax.text(col + 0.46, row + 0.5, str(program), ha="center", va="center", fontsize=7, color=colour if off else "white")
    ax.set(xlim=(-0.1, columns), ylim=(last + 1, -0.1), title=title)
    ax.set_aspect("equal")
    ax.axis("off")


def roofline(ax: Axes, points: Mapping[str, tuple[float, float]], *, bandwidth: float, compute: float) -> None:
    """A roofline: FLOPs a byte across, TFLOP/s up, and what each point reaches.

    Args:
        points: for each name, (FLOPs a byte, TFLOP/s).
        bandwidth: of memory, in GB/s. compute: the most the arithmetic does, in TFLOP/s.
    """
    ridge = compute * 1e3 / bandwidth
    low = min([0.05, *(x / 2 for x, _ in points.values())])
    high = max([ridge * 10, *(x * 2 for x, _ in points.values())])
    ax.plot([low, ridge, high], [low * bandwidth / 1e3, compute, compute], color=INK, linewidth=1.4)
    ax.axvline(ridge, color=INK, linewidth=0.7, linestyle=":")
    ax.annotate(
        f"{ridge:,.0f} FLOPs a byte",
        (ridge, low * bandwidth / 1e3),
        fontsize=8,
        ha="left",
        va="bottom",
        xytext=(3, 0),
        textcoords="offset points",
    )
    for n, (name, (x, y)) in enumerate(points.items()):
        ax.plot([x], [y], "o", color=PALETTE[n % len(PALETTE)], markersize=6)
        ax.annotate(name, (x, y), fontsize=8, xytext=(-8, 4 + 12 * (n % 3)), textcoords="offset points", color=INK, ha="right")
    ax.set(xscale="log", yscale="log", xlabel="FLOPs for each byte moved", ylabel="TFLOP/s")
    ax.grid(alpha=0.25)
