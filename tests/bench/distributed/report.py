"""From the committed results to docs/benchmarks-distributed.md and its figures: `python -m tests.bench.distributed report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..results import ROOT
from ..training.bars import SAME_LOSS
from ..training.models import OURS, STOCK
from ..training.report import draw_groups, table
from ..training.store import Steps
from .bars import SCALING, Rows, efficiency, groups, verdicts
from .plan import LONGEST, PROVIDERS, TIMED, WARM
from .store import FOLDER, Row, load

PAGE = "benchmarks-distributed.md"

HEAD = f"""# Training on several GPUs

Made by `python -m tests.bench.distributed report` from the files in `tests/bench/results/distributed`, which
`python -m tests.bench.distributed` writes on GPUs: edit neither by hand.

Whole steps of models with random weights: forward, loss, backward, fused AdamW, everything in bf16, attention by PyTorch's
`scaled_dot_product_attention`. FSDP2 (`fully_shard`) of each layer and of what is left, and each layer's activations computed again in
backward. Every provider has processes of its own, one a GPU, over NCCL; on one GPU the same code runs over a group of one. The batch is
that of one GPU, and each has its own random tokens. By default {WARM} steps, then the median over {TIMED} between events on the device, of
the slowest rank.

- *peak* is all that PyTorch had allocated at once on the rank that had the most. *beyond* is what of it was neither a local parameter nor a
  local state of the optimizer: gradients, which are as large as the parameters, activations, and whatever a step needs for a moment.
- *longest sequence* is the longest of which a whole step was made, one sequence on each GPU, within one eighth of the next longer one that
  was tried and ran out of memory. Its tokens/s are those of one step. PyTorch's allocator has `expandable_segments` there, whoever is
  measured.
- *efficiency* is tokens/s over as many times those of one GPU with the same work.

Bars are ratios of liger_fn to stock, of Llama 8B; those of memory are for two GPUs or more, where gradients are shared. A first loss is to
be within {SAME_LOSS:g} of stock's on every rank, and n GPUs at least {SCALING:g} × n as fast as one.
"""


def read(folder: Path = FOLDER) -> dict[str, Steps[Row]]:
    """The committed runs by the stems of their files."""
    return {path.stem: load(path) for path in sorted(folder.glob("*.json"))}


def page(found: dict[str, Steps[Row]]) -> str:
    """The text for all runs, the newest first."""
    newest = sorted(found, key=lambda stem: (found[stem].machine["date"], stem), reverse=True)
    return "\n".join([HEAD, *(_section(stem, found[stem]) for stem in newest)])


def _section(stem: str, run: Steps[Row]) -> str:
    m, rows = run.machine, run.rows
    versions = ", ".join(f"{k} {v}" for k, v in m.items() if k not in ("device", "gpus"))
    parts = [
        f"## {m.get('gpus', '1')} × {m['device']}, torch {m['torch']}, {m['date']}\n",
        f"{versions} ([JSON](../tests/bench/results/distributed/{stem}.json)).\n",
        f"![tokens/s and memory by provider](figures/distributed-{stem}.png)\n" if _drawn(rows) else "",
        _titled("Steps", STEPS_HEAD, _steps(rows)),
        _titled("The longest sequence", LONGEST_HEAD, _longest(rows)),
        _titled("Scaling", SCALING_HEAD, _scaling(rows)),
        _bars(rows),
    ]
    return "\n".join(part for part in parts if part)


STEPS_HEAD = (
    "model",
    "batch",
    "GPUs",
    "provider",
    "tokens/s",
    "÷ stock",
    "step, ms",
    "peak, GiB",
    "beyond, GiB",
    "÷ stock",
    "first losses",
)
LONGEST_HEAD = ("model", "GPUs", "provider", "longest sequence", "÷ stock", "out of memory at", "tokens/s", "peak, GiB", "note")
SCALING_HEAD = ("model", "batch", "GPUs", "tokens/s", "tokens/s a GPU", "efficiency")


def _titled(title: str, head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    return f"### {title}\n\n{table(head, cells)}" if cells else ""


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _over(a: float | None, b: float | None) -> str:
    return f"× {a / b:.3f}" if a and b else "–"


def _sorted(of: Rows) -> list[Row]:
    return [of[p] for p in PROVIDERS if p in of]


def _steps(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    cells: list[tuple[str, ...]] = []
    for (model, shape, gpus), of in groups(rows).items():
        if shape == LONGEST:
            continue
        best = max((r.tokens_per_s for r in of.values() if r.tokens_per_s), default=None) if len(of) > 1 else None
        stock_tokens, stock_beyond = (of[STOCK].tokens_per_s, of[STOCK].beyond_gib) if STOCK in of else (None, None)
        for r in _sorted(of):
            start, tokens = (model, shape, str(gpus), r.provider), _number(r.tokens_per_s)
            if r.tokens_per_s is None:
                cells.append((*start, r.note, *("–",) * 6))
                continue
            speed = (f"**{tokens}**" if r.tokens_per_s == best else tokens, _over(r.tokens_per_s, stock_tokens), _number(r.step_ms, 1))
            memory = (_number(r.peak, 2), _number(r.beyond_gib, 2), _over(r.beyond_gib, stock_beyond))
            cells.append((*start, *speed, *memory, ", ".join(f"{loss:.4f}" for loss in r.losses)))
    return cells


def _longest(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    cells: list[tuple[str, ...]] = []
    for (model, shape, gpus), of in groups(rows).items():
        stock = of.get(STOCK)
        for r in _sorted(of) if shape == LONGEST else ():
            over = _over(r.longest, stock.longest if stock else None)
            figures = (_number(r.longest), over, _number(r.fails), _number(r.tokens_per_s), _number(r.peak, 2))
            cells.append((model, str(gpus), r.provider, *figures, r.note))
    return cells


def _scaling(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Ours, where more than one number of GPUs was measured."""
    ours = [r for r in rows if r.provider == OURS and r.tokens_per_s and r.shape != LONGEST]
    numbers = {(r.model, r.shape): {o.gpus for o in ours if (o.model, o.shape) == (r.model, r.shape)} for r in ours}
    cells: list[tuple[str, ...]] = []
    for r in sorted(ours, key=lambda r: (r.model, r.shape, r.gpus)):
        if len(numbers[r.model, r.shape]) > 1:
            each, share = (r.tokens_per_s or 0) / r.gpus, efficiency(rows, r)
            figures = (_number(r.tokens_per_s), _number(each), "–" if share is None else f"{share:.1%}")
            cells.append((r.model, r.shape, str(r.gpus), *figures))
    return cells


def _bars(rows: Sequence[Row]) -> str:
    found = verdicts(rows)
    judged, met = [v for v in found if v.met is not None], {True: "yes", False: "**no**", None: "–"}
    cells = [
        (v.model, v.shape, str(v.gpus), v.what, v.bar, "–" if v.found is None else f"{v.found:.4g}", met[v.met]) for v in found
    ]  # fmt: skip
    said = f"### The bars\n\n{sum(v.met is True for v in judged)} of {len(judged)} are met.\n"
    return f"{said}\n{table(('model', 'batch', 'GPUs', 'what', 'bar', 'measured', 'met?'), cells)}" if found else ""


def _drawn(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The groups that a figure shows: those of more than one provider, any of which was measured."""
    found = groups(r for r in rows if r.shape != LONGEST)
    several = {key: of for key, of in found.items() if len(of) > 1 and any(r.tokens_per_s for r in of.values())}
    return {f"{model}\n{shape}, {gpus} GPU{'s' if gpus > 1 else ''}": _sorted(of) for (model, shape, gpus), of in several.items()}


def draw(run: Steps[Row], path: Path) -> None:
    """Tokens/s and memory, a group of bars for each workload."""
    panels = {
        "thousand tokens/s": lambda r: r.tokens_per_s and r.tokens_per_s / 1e3,
        "GiB beyond parameters and optimizer, of a GPU": lambda r: r.beyond_gib,
    }
    draw_groups(
        _drawn(run.rows), panels, f"{run.machine['device']}: where a bar is missing, it was not measured or ran out of memory", path
    )


def write(folder: Path = FOLDER, docs: Path = ROOT / "docs") -> list[Path]:
    """Read every result in `folder`; write the page and its figures under `docs`. Nothing is written where there is no result."""
    found = read(folder)
    if not found:
        return []
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    written = [docs / PAGE]
    written[0].write_text(page(found))
    for stem, run in found.items():
        if _drawn(run.rows):
            written.append(docs / "figures" / f"distributed-{stem}.png")
            draw(run, written[-1])
    return written
