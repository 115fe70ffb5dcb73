"""From the kept results to docs/convergence.md and its figures: `python -m tests.convergence report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.bench.results import ROOT

from . import kept
from .kept import Sheet
from .measure import AGAIN, BIN, EARLY, FACTOR, LEARNED, MEASURES, PATCHED, Result, judge, spread
from .models import MODELS

DOCS = ROOT / "docs"

HEAD = f"""# Convergence

Made by `python -m tests.convergence report` from the files in `tests/convergence/results`, which `python -m tests.convergence` writes on a
GPU: edit neither by hand.

Each model is trained several times from the same weights on the same text (the sources of Python's standard library, as in the quickstart,
less their last tenth, which is held out), by AdamW with warmup and clipped gradients, its weights in the dtype that is named. Dropout is 0.
In fp32 no product is rounded to TF32. Training is chaotic: runs that differ in the last bit of one sum drift apart. So a patched run is
compared with stock, and beside it with what rounding alone does to stock. Each of these runs equals the first in exact arithmetic:

- *again*: nothing differs. Where it is not 0, the machine gives other bits from run to run.
- *rows reversed*, *rows rotated*: the sequences of each batch in another order, and with it every sum over tokens.
- *products of 1/4*, *of 1/2*, *of 3/4*: each linear layer sums that part of its inputs and the rest by two products, so that activations
  are rounded anew. (*products halved* is what earlier runs call that of 1/2, which was their only one.)

What is compared, each run against the first stock run, losses in nats:

- *early*: root mean square of the differences of the training losses in the first {EARLY} steps, before noise has grown.
- *late*: the same over the last third of the steps.
- *held-out*: the difference of the losses on the text that was held out, after training.
- *update*: ‖Δθ − Δθ_stock‖ ÷ ‖Δθ_stock‖, all parameters as one vector, where Δθ is what training changed: not the weights, in which the
  start would hide it. *early update*: the same after {EARLY} steps. *worst*: of the single parameter where *update* is largest. One whose
  gradient is 0 but for rounding (the bias of keys) has an update of noise alone, in every run.

A patched run passes where each of the five is at most {FACTOR:g} times the largest of these yardsticks (for *held-out*, which can be
near 0 by luck, their *late* counts too; a loss may always differ by its last bit in fp32), and stock's held-out loss fell by
{1 - LEARNED:.0%} or more: see `judge` in `tests/convergence/measure.py`. What that finds, `tests/test_convergence.py` shows on a small
model in fp32: a wrong eps, a loss that is off by 1 %, a lost gradient, and a base of the rotary angles that is off by 1 %. In bf16 its own
noise hides the last two.
"""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
    return "\n".join(lines) + "\n"


def _in_order(results: Iterable[Result]) -> list[Result]:
    """By dtype, then as in the table of models, its last first: the plainest model leads."""
    names = list(MODELS)[::-1]
    return sorted(results, key=lambda r: (r.dtype != "fp32", names.index(r.model) if r.model in names else len(names)))


def _verdicts(results: Sequence[Result]) -> str:
    """A row for each model and dtype: patched, and the largest of the yardsticks."""
    rows = []
    for r in results:
        pairs = [_pair(of(r.runs[PATCHED]), max(map(of, r.yardsticks.values()))) for of in MEASURES.values()]
        verdict = "passes" if not judge(r) else "**fails**: " + "; ".join(judge(r))
        rows.append((f"`{r.model}`", r.dtype, f"{r.before:.3f} → {r.after:.3f}", *pairs, verdict))
    return _table(("model", "dtype", "held-out loss of stock", *MEASURES, "verdict"), rows)


def _pair(patched: float, yardstick: float) -> str:
    return f"{patched:.1e} / {yardstick:.1e}"


def _runs(results: Sequence[Result]) -> str:
    """Every run of every model."""
    rows = []
    for r in results:
        for name, run in r.runs.items():
            numbers = (run.early, run.late, run.mean, run.largest)
            cells = [*(f"{v:.1e}" for v in numbers), f"{run.held_out:+.1e}", f"{run.early_update:.1e}", f"{run.update:.1e}"]
            rows.append((f"`{r.model}`", r.dtype, name, *cells, f"{run.worst:.1e} `{run.where}`" if run.worst else "0"))
    return _table(("model", "dtype", "run", "early", "late", "mean", "largest", "held-out", "early update", "update", "worst"), rows)


def _models(results: Sequence[Result]) -> str:
    rows = []
    for r in {r.model: r for r in results}.values():
        shows = MODELS[r.model].shows if r.model in MODELS else ""
        rows.append((f"`{r.model}`", shows, f"{r.parameters / 1e6:.1f} M", ", ".join(f"`{op}`" for op in r.ops)))
    return _table(("model", "has", "parameters", "patched"), rows)


def _section(stem: str, sheet: Sheet) -> str:
    m, s = sheet.machine, sheet.settings
    results = _in_order(sheet.results)
    versions = ", ".join(f"{key} {value}" for key, value in m.items() if key != "device")
    good = sum(1 for r in results if not judge(r))
    again = [r.name for r in results if r.runs[AGAIN].update]
    parts = [
        f"## {m['device']}, torch {m['torch']}, {m['date']}\n\n"
        f"{m['device']}, {versions} ([JSON](../tests/convergence/results/{stem}.json)).\n"
        f"`python -m tests.convergence`: {s['layers']} layers of {s['hidden']}, {s['heads']} heads, a vocabulary of {s['vocab']},"
        f" {s['steps']} steps of {s['batch']} × {s['seq']} tokens, learning rate {s['lr']:g}, seed {s['seed']}.\n"
    ]
    if m["device"] == "cpu":
        parts.append("**On a CPU, where the functions are plain PyTorch: this proves the harness and says nothing of the kernels.**\n")
    bits = "gives the same bits in every model" if not again else f"does not give the same bits for {', '.join(again)}"
    luck = max(map(spread, results), default=0.0)
    parts.append(
        f"{good} of {len(results)} pass. Stock, run again, {bits}. No yardstick is more than {luck:.1f} times the largest of the others,"
        f" in any measure. Each pair is patched / the largest yardstick.\n\n{_verdicts(results)}"
    )
    if sheet.failed:
        parts.append("No result:\n\n" + "".join(f"- {name}: {error}\n" for name, error in sheet.failed.items()))
    for dtype in dict.fromkeys(r.dtype for r in results):
        text = f"losses of stock and patched in {dtype}, and how far patched and the yardsticks are from stock, by {BIN} steps"
        parts.append(f"![{text}](figures/{figure_name(stem, dtype)})\n")
    parts += [f"### Every run\n\n{_runs(results)}", f"### The models\n\n{_models(results)}"]
    return "\n".join(parts)


def figure_name(stem: str, dtype: str) -> str:
    return f"convergence-{stem}-{dtype}.png"


def page(found: dict[str, Sheet]) -> str:
    """The text for sheets by the stems of their files, the newest first."""
    newest = sorted(found, key=lambda stem: (found[stem].machine["date"], stem), reverse=True)
    return "\n".join([HEAD, *(_section(stem, found[stem]) for stem in newest)])


def write(folder: Path = kept.FOLDER, docs: Path = DOCS) -> list[Path]:
    """Read every sheet in `folder`; write the page and its figures under `docs`. Nothing is written where there is none."""
    found = {path.stem: kept.load(path) for path in sorted(folder.glob("*.json"))}
    if not found:
        return []
    from . import figure  # only here: matplotlib is not needed to read a result

    (docs / "figures").mkdir(parents=True, exist_ok=True)
    written = [docs / "convergence.md"]
    written[0].write_text(page(found))
    for stem, sheet in found.items():
        results = _in_order(sheet.results)
        for dtype in dict.fromkeys(r.dtype for r in results):
            path = docs / "figures" / figure_name(stem, dtype)
            title = f"{dtype}, {sheet.settings['steps']} steps, {sheet.machine['device']}, torch {sheet.machine['torch']}"
            figure.draw([r for r in results if r.dtype == dtype], title, path)
            written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; 1 where there is nothing to write it from."""
    parser = argparse.ArgumentParser(prog="python -m tests.convergence report", description="Make docs/convergence.md from kept results.")
    parser.add_argument("--results", type=Path, default=kept.FOLDER, help="folder of JSON files (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page and figures/ go (default: %(default)s)")
    options = parser.parse_args(argv)
    written = write(options.results, options.docs)
    for path in written:
        print(f"written: {path}")
    if not written:
        print(f"No results in {options.results}: run `python -m tests.convergence` on a GPU first. Nothing was written.", file=sys.stderr)
    return int(not written)
