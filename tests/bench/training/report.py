"""The section on training steps of docs/benchmarks.md, and its figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .bars import MEMORY, OF_BEST, SAME_LOSS, verdicts
from .models import LIGER, OURS, OURS_COMPILE, PROVIDERS, STOCK
from .profile import NAMES, shares
from .step import TIMED, WARM, Step
from .store import FOLDER, Steps, load

Load = dict[str, Steps[Step]]

HEAD = f"""# Training steps

Whole steps of models with random weights on one batch of random tokens: forward, loss, backward, fused AdamW, in bf16, attention by
PyTorch's `scaled_dot_product_attention`, no padding and no mask given. Measured by `make bench-train`, every row in a process of its own:
{WARM} steps, then the median over {TIMED} between events on the device. *peak* is all that PyTorch had allocated at once in those, the
model, its gradients and the optimizer's states included. *stock + compile* is `torch.compile(model)`, *liger_fn + compile* the same after
`liger_patch.auto(model)`.

Bars: tokens/s over liger-kernel's by what was asked for each model, peak memory at most {MEMORY} × liger-kernel's; compiled, at least
{OF_BEST} × the best peer's tokens/s, and a first loss within {SAME_LOSS:g} of stock's.
"""


def read(folder: Path = FOLDER) -> Load:
    """The committed runs by the stems of their files."""
    return {path.stem: load(path) for path in sorted(folder.glob("*.json"))}


def page(found: Load) -> str:
    """The text for all runs, the newest first; empty without any."""
    if not found:
        return ""
    newest = sorted(found, key=lambda stem: (found[stem].machine["date"], stem), reverse=True)
    return "\n".join([HEAD, *(_section(stem, found[stem]) for stem in newest)])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)) + "\n"


def _section(stem: str, steps: Steps[Step]) -> str:
    m = steps.machine
    versions = ", ".join(f"{k} {v}" for k, v in m.items() if k != "device")
    found = [v for v in verdicts(steps.rows) if v.met is not None]
    cells = [
        (v.model, v.shape, v.what, v.bar, "–" if v.found is None else f"{v.found:.4g}", {True: "yes", False: "**no**", None: "–"}[v.met])
        for v in verdicts(steps.rows)
    ]
    return "\n".join(
        [
            f"## {m['device']}, torch {m['torch']}, transformers {m['transformers']}, {m['date']}\n",
            f"{m['device']}, {versions} ([JSON](../tests/bench/results/training/{stem}.json)).\n",
            f"![tokens/s and peak memory of each model](figures/training-{stem}.png)\n",
            table(("model", "batch", "provider", "tokens/s", "÷ liger-kernel", "peak, GiB", "first losses"), _speed(steps.rows)),
            f"{sum(v.met is True for v in found)} of {len(found)} bars are met.\n",
            table(("model", "batch", "what", "bar", "measured", "met?"), cells),
            _profile(steps.rows),
        ]
    )


def groups(rows: Sequence[Step]) -> list[list[Step]]:
    """The rows of each model and batch, providers in their own order."""
    found: dict[tuple[str, str], list[Step]] = {}
    for r in rows:
        found.setdefault((r.model, r.shape), []).append(r)
    return [sorted(g, key=lambda r: PROVIDERS.index(r.provider)) for g in found.values()]


def _speed(rows: Sequence[Step]) -> list[tuple[str, ...]]:
    cells = []
    for group in groups(rows):
        liger = next((r.tokens_per_s for r in group if r.provider == LIGER), None)
        best = max((r.tokens_per_s for r in group if r.tokens_per_s), default=None)
        for r in group:
            name = r.model + (", checkpointing" if r.checkpointing else "")
            if r.tokens_per_s is None:
                cells.append((name, r.shape, r.provider, r.note, "–", "–", "–"))
                continue
            tokens = f"{r.tokens_per_s:,.0f}"
            peak = "–" if r.peak_gib is None else f"{r.peak_gib:.2f}"
            over = f"× {r.tokens_per_s / liger:.3f}" if liger else "–"
            losses = ", ".join(f"{loss:.4f}" for loss in r.losses)
            cells.append((name, r.shape, r.provider, f"**{tokens}**" if r.tokens_per_s == best else tokens, over, peak, losses))
    return cells


def _profile(rows: Sequence[Step]) -> str:
    """Where one step's time goes, by the kernels' names."""
    shown = [r for r in rows if r.kernels_ms and r.provider in (STOCK, LIGER, OURS, OURS_COMPILE)]
    if not shown:
        return ""
    cells, every = [], {r.key: shares(r.kernels_ms) for r in shown}
    kinds = [name for name in NAMES if any(found[name] for found in every.values())]
    for r in (r for g in groups(shown) for r in g):
        found = {name: every[r.key][name] for name in kinds}
        total = sum(found.values())
        cells.append((r.model, r.shape, r.provider, f"{total:.1f}", *(f"{ms:.1f} ({ms / total:.0%})" for ms in found.values())))
    said = """### Where a step goes

Milliseconds of device time in one step by kind of kernel, and their share. Stock norms, rotary embeddings and gated units are elementwise
kernels, and count as such. What no patch of such operations can win is matrix products, attention and the optimizer; the rest is left.
"""
    return f"{said}\n{table(('model', 'batch', 'provider', 'all', *kinds), cells)}"


def draw(stem: str, steps: Steps[Step], path: Path) -> None:
    """Tokens/s and peak memory, a group of bars for each model."""
    every = {f"{g[0].model}\n{g[0].shape}": g for g in groups(steps.rows)}
    panels = {"thousand tokens/s": lambda r: r.tokens_per_s and r.tokens_per_s / 1e3, "peak GiB": lambda r: r.peak_gib}
    title = f"{steps.machine['device']}: where a bar is missing, it ran out of memory or was not measured"
    draw_groups(every, panels, title, path)


def draw_groups(every: Mapping[str, Sequence[Any]], panels: Mapping[str, Callable[[Any], float | None]], title: str, path: Path) -> None:
    """A panel for each figure of a row; in it a group of bars for each label, one for each provider that has any."""
    import matplotlib

    matplotlib.use("Agg")  # draws to a file on machines without a display
    from matplotlib import pyplot as plt

    labels = list(every)
    names = [p for p in PROVIDERS if any(r.provider == p and r.tokens_per_s for g in every.values() for r in g)]
    height = 0.8 / max(1, len(names))
    colours = dict(zip(PROVIDERS, ("#c9ccd1", "#8a8f98", "#9fce8a", "#6aa84f", "#f2a541", "#e4572e"), strict=True))
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    with plt.rc_context(style):
        size = (11, 1.2 + 0.75 * len(labels))
        figure, grid = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained", dpi=110)
        for axes, (unit, value) in zip(grid[0], panels.items(), strict=True):
            for i, name in enumerate(names):
                found = [(j, v) for j, g in enumerate(every.values()) for r in g if r.provider == name and (v := value(r))]
                places = [j + (i + 0.5) * height - 0.4 for j, _ in found]
                axes.barh(places, [v for _, v in found], height * 0.9, color=colours[name], label=name)
            axes.set_title(unit)
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.5, -0.5)
        handles, shown = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, shown, loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(title, x=0.01, ha="left")
        figure.savefig(path)
        plt.close(figure)
