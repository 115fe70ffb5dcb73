"""Draws figures/architecture.png: what calls what in one training step. `python docs/figures/architecture.py`"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

INK, PAPER, MODEL, FUNCTION, HEAD = "#22252a", "#fafaf7", "#dfe5ec", "#f6d2c4", "#cfe3d4"


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, size: float = 11) -> None:
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.08", facecolor=colour, edgecolor=INK, linewidth=0.8)
    )
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "-") -> None:
    ax.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.1, "linestyle": style})


def main() -> None:
    figure, ax = plt.subplots(figsize=(10.5, 5.4), dpi=130, layout="constrained", facecolor=PAPER)
    ax.set(xlim=(0, 10.5), ylim=(0, 5.6))
    ax.axis("off")
    ax.text(0.1, 5.35, "the model, its own forward", fontsize=12, weight="bold", color=INK)
    ax.text(3.9, 5.35, "liger_fn, in patched places", fontsize=12, weight="bold", color=INK)
    ax.text(7.7, 5.35, "kept for backward", fontsize=12, weight="bold", color=INK)
    rows = (
        ("embedding", "", "", MODEL),
        ("norm", "rms_norm", "x, and 1 / rms of each row", FUNCTION),
        ("attention: q, k", "rope", "cos and sin alone", FUNCTION),
        ("attention itself", "", "PyTorch's own", MODEL),
        ("MLP, or experts", "swiglu, moe_experts", "gate and up", FUNCTION),
        ("head and loss", "linear_cross_entropy", "gradients of x and weight:\nno logits", HEAD),
    )
    for n, (module, function, kept, colour) in enumerate(rows):
        y = 4.55 - 0.78 * n
        box(ax, 0.1, y, 2.9, 0.52, module, MODEL)
        if n:
            arrow(ax, (1.55, y + 0.26 + 0.52), (1.55, y + 0.54))
        if function:
            box(ax, 3.9, y, 2.9, 0.52, function, colour)
            arrow(ax, (3.02, y + 0.26), (3.88, y + 0.26))
            arrow(ax, (6.82, y + 0.26), (7.62, y + 0.26), "--")
        if kept:
            ax.text(7.7, y + 0.26, kept, va="center", fontsize=10.5, color=INK)
    ax.text(
        0.1,
        0.18,
        "Each function: checks → autograd Function → custom operator → backend (Triton, interpreter, PyTorch) → plan → kernel",
        fontsize=10.5,
        color=INK,
    )
    figure.savefig(Path(__file__).with_suffix(".png"), facecolor=PAPER)


if __name__ == "__main__":
    main()
