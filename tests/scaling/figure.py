"""Memory of a rank by part, a pair of bars for each number of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .choose import USABLE
from .plan import GIB, PARTS, Memory
from .shapes import OURS, STOCK

Group = tuple[str, int, str, dict[str, Memory]]  # model, GPUs, plan, memory by provider
COLOURS = ("#4c78a8", "#9ecae9", "#54a24b", "#b79a20", "#e4572e", "#8a8f98")
TOP = 160.0  # GiB: a bar that needs more is cut, and says how much


def draw(groups: Sequence[Group], path: Path) -> None:
    """One panel a model; the upper bar of a pair is stock, the lower patched."""
    import matplotlib

    matplotlib.use("Agg")  # draws to a file on machines without a display
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for name, *_ in groups))
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    sizes = [sum(g[0] == name for g in groups) for name in names]
    right = min(TOP, max((m.gib for *_, by in groups for m in by.values()), default=TOP)) * 1.12
    shown = [size for size in (80, 141) if size * USABLE < right]
    with plt.rc_context(style):
        height = 1.4 + sum(0.5 + 0.62 * n for n in sizes)
        figure, grid = plt.subplots(
            len(names), 1, figsize=(10, height), sharex=True, layout="constrained", dpi=110, height_ratios=sizes, squeeze=False
        )
        for axes, name in zip(grid[:, 0], names, strict=True):
            rows = [g for g in groups if g[0] == name]
            for i, (_, _, _, by) in enumerate(rows):
                for place, who in ((-0.2, STOCK), (0.2, OURS)):
                    left = 0.0
                    for part, colour in zip(PARTS, COLOURS, strict=True):
                        width = by[who].parts[part] / GIB
                        axes.barh(i + place, max(0.0, min(width, TOP - left)), 0.36, left=min(left, TOP), color=colour)
                        left += width
                    axes.text(min(left, TOP) + 0.8, i + place, f"{who} {left:.0f}", va="center", fontsize=8)
            axes.set_yticks(range(len(rows)), [f"{world:,} GPUs\n{plan}" for _, world, plan, _ in rows])
            axes.set_ylim(len(rows) - 0.45, -0.55)
            axes.set_title(name)
            for size in shown:
                axes.axvline(size * USABLE, color="#444444", linewidth=0.8, linestyle=":")
        grid[-1, 0].set_xlim(0, right)
        grid[-1, 0].set_xlabel(f"GiB of a rank at its peak; dotted: {USABLE:.0%} of {' and '.join(map(str, shown))} GiB")
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS]
        figure.legend(handles, PARTS, loc="outside lower center", ncols=len(PARTS), frameon=False)
        figure.savefig(path)
        plt.close(figure)
