"""Whole training steps against their peers on a GPU: `make bench-train`. Without a GPU tiny models prove that the harness works.

python -m tests.bench.training --help
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from .models import BY_KEY, PROVIDERS, Model
from .step import Step, answer


def names(known: Sequence[str], given: str) -> tuple[str, ...]:
    """An option of several names; argparse says which is none."""
    chosen = tuple(name.strip() for name in given.split(","))
    wrong = [name for name in chosen if name not in known]
    if wrong:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: not one of {', '.join(known)}")
    return chosen


def _in_a_process(context: multiprocessing.context.BaseContext, model: Model, provider: str) -> Step:
    """So that nothing of one row reaches the next: patched classes, compiled code, memory in pieces."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(model, provider, sender))  # type: ignore[attr-defined]
    process.start()
    sender.close()
    try:
        row: Step = receiver.recv()
    except EOFError:
        row = Step(model.name, model.shape, provider, note="its process was ended from outside: out of memory?")
    process.join()
    return row


def line(row: Step) -> str:
    """A row for a terminal."""
    name = f"{row.model:20} {row.shape:8} {row.provider:24}"
    if row.tokens_per_s is None:
        return f"{name} {row.note}"
    peak = "–" if row.peak_gib is None else f"{row.peak_gib:.2f}"
    losses = " ".join(f"{loss:.4f}" for loss in row.losses)
    return (
        f"{name} {row.tokens_per_s:>9,.0f} tokens/s {row.step_ms:>9,.1f} ms {peak:>7} GiB  first step {row.first_s:.0f} s  losses {losses}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every row that was asked for; what was measured is on disk after each."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.training", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", type=lambda s: names(tuple(BY_KEY), s), default=tuple(BY_KEY), help=", ".join(BY_KEY))
    parser.add_argument("--providers", type=lambda s: names(PROVIDERS, s), default=PROVIDERS, help=", ".join(PROVIDERS))
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: tests/bench/results/training; without a GPU a new folder)")
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    # Processes start from one that has imported everything and must not have looked at the GPU yet.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    context.set_forkserver_preload(["tests.bench.training.step"])
    todo = [(BY_KEY[key], p) for key in options.models for p in options.providers if p in BY_KEY[key].providers]

    import torch

    from . import bars, store

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = options.out or (store.FOLDER if device.type == "cuda" else Path(tempfile.mkdtemp(prefix="liger-fn-bench-")))
    steps, path = store.Steps(store.machine(device)), None
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training steps", total=len(todo))
        for model, provider in todo:
            row = _in_a_process(context, model, provider)
            steps = steps.with_row(row)
            path = store.save(steps, folder)
            console.print(line(row), markup=False, highlight=False, soft_wrap=True)
            progress.advance(task)
    if device.type == "cpu":
        console.print("No GPU: wall clock of tiny models, which proves the harness and says nothing of speed.")
    else:
        for v in bars.verdicts(steps.rows):
            met = {True: "yes", False: "no", None: "not measured"}[v.met]
            found = "–" if v.found is None else f"{v.found:.4g}"
            console.print(
                f"{v.model:20} {v.shape:8} {v.what:52} {v.bar:9} {found:>9}  {met}", markup=False, highlight=False, soft_wrap=True
            )
    console.print(f"written to {path}", soft_wrap=True)
    return int(any(row.note.startswith("failed") and "liger_fn" in row.provider for row in steps.rows))


if __name__ == "__main__":
    sys.exit(main())
