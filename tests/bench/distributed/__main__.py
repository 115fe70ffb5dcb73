"""Whole training steps on one or several GPUs of a host, against stock and liger-kernel. Without a GPU, two processes try the harness.

python -m tests.bench.distributed --help
python -m tests.bench.distributed report     docs/benchmarks-distributed.md from what is kept
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ..training.__main__ import names
from ..training.models import OURS
from ..training.store import Steps
from .plan import LONGEST, MODELS, PARTS, PROVIDERS, TIMED, WARM, WORKLOADS, Workload, tasks
from .store import FOLDER, Row


def _workloads(given: str) -> tuple[Workload, ...]:
    try:
        return tuple(Workload.parse(each) for each in given.split(","))
    except ValueError as wrong:
        raise argparse.ArgumentTypeError(str(wrong)) from None


def _count(given: str) -> int:
    if not given.strip().isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given}: must be a whole number of 1 or more")
    return int(given)


def _counts(given: str) -> tuple[int, ...]:
    return tuple(sorted({_count(each) for each in given.split(",")}))


def options(argv: Sequence[str] | None, gpus: int) -> argparse.Namespace:
    """A checked command line on a host with so many GPUs; 0: two processes on its CPU."""
    here, usual = tuple(n for n in (1, 2, 4, 8) if n <= (gpus or 2)), ",".join(f"{w.batch}x{w.seq}" for w in WORKLOADS)
    parser = argparse.ArgumentParser(prog="python -m tests.bench.distributed", description=(__doc__ or "").split("\n\n")[0])

    def add(name: str, metavar: str | None, kind: Any, default: Any, said: str) -> None:
        parser.add_argument(name, metavar=metavar, type=kind, default=default, help=said)

    parser.add_argument("what", nargs="?", default="run", choices=("run", "report"), help="measure, or make the page (default: run)")
    add("--gpus", "N,…", _counts, here, "numbers of GPUs: all parts on the most, scaling on each (default: powers of two that are here)")
    add("--parts", "PART,…", partial(names, PARTS), PARTS, f"of {', '.join(PARTS)} (default: all)")
    add("--workloads", "BxS,…", _workloads, WORKLOADS, f"sequences of a GPU by their tokens; scaling takes the first (default: {usual})")
    add("--providers", "NAME,…", partial(names, PROVIDERS), PROVIDERS, f"of {', '.join(PROVIDERS)} (default: all)")
    add("--models", "NAME,…", partial(names, tuple(MODELS)), ("llama-8b",), f"of {', '.join(MODELS)} (default: llama-8b)")
    add("--warm", "N", _count, WARM, "steps before those that are timed (default: %(default)s)")
    add("--steps", "N", _count, TIMED, "steps that are timed (default: %(default)s)")
    add("--timeout", "S", float, 300.0, "seconds of a row, start to end (default: %(default)g)")
    add("--out", "DIR", Path, None, "where the JSON is (default: tests/bench/results/distributed; without a GPU a new folder)")
    given = parser.parse_args(argv)
    if gpus and max(given.gpus) > gpus:
        parser.error(f"--gpus {max(given.gpus)}: this host has {gpus}")
    return given


def line(row: Row) -> str:
    """A row for a terminal."""
    name = f"{row.model:20} {row.shape:8} {row.gpus} GPU{'s' if row.gpus > 1 else ' '} {row.provider:14}"
    if row.tokens_per_s is None:
        return f"{name} {row.note}"
    memory = "" if row.peak is None else f" peak {row.peak:.2f} GiB, beyond {row.beyond_gib:.2f}"
    if row.shape == LONGEST:
        fails = "" if row.fails is None else f", not {row.fails:,}"
        return f"{name} {row.longest:,} tokens{fails}, {row.tokens_per_s:,.0f} tokens/s{memory} {row.note}".rstrip()
    losses = " ".join(f"{loss:.4f}" for loss in row.losses)
    return f"{name} {row.tokens_per_s:,.0f} tokens/s {row.step_ms:,.1f} ms{memory}  first step {row.first_s:.0f} s  losses {losses}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every row that was asked for; what was measured is on disk after each."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # counting GPUs is to start none in this process
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    given = options(argv, gpus)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if given.what == "report":
        return _report(given.out, console)

    from . import bars, store
    from .measure import measured

    todo = tasks(
        given.parts, given.models, given.workloads, given.gpus, given.providers, warm=given.warm, timed=given.steps, tiny=not gpus
    )  # fmt: skip
    folder = given.out or (FOLDER if gpus else Path(tempfile.mkdtemp(prefix="liger-fn-bench-")))
    kept, path = Steps[Row](store.machine(torch.device("cuda" if gpus else "cpu"))), None
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("rows", total=len(todo))
        for task in todo:
            progress.update(bar, description=f"{task.model.name}, {task.shape}, {task.gpus} of {gpus or 'no'} GPUs, {task.provider}")
            for row in measured(task, given.timeout):
                kept = kept.with_row(row)
                path = store.save(Steps(kept.machine, [row]), folder)
                console.print(line(row), markup=False, highlight=False, soft_wrap=True)
            progress.advance(bar)
    if not gpus:
        console.print("No GPU: wall clock of tiny models, which proves the harness and says nothing of speed.")
    for v in bars.verdicts(kept.rows) if gpus else ():
        met = {True: "yes", False: "no", None: "–"}[v.met]
        found = "–" if v.found is None else f"{v.found:.4g}"
        said = f"{v.model:20} {v.shape:8} {v.gpus} GPUs {v.what:58} {v.bar:24} {found:>9}  {met}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    console.print(f"written to {path}", soft_wrap=True)
    return int(any(row.note.startswith("failed") and row.provider == OURS for row in kept.rows))


def _report(folder: Path | None, console: Console) -> int:
    from .report import write

    written = write(folder or FOLDER)
    for path in written:
        console.print(f"written: {path}", soft_wrap=True)
    if not written:
        console.print(f"No results in {folder or FOLDER}: run this on a GPU first. Nothing was written.", soft_wrap=True)
    return int(not written)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that whoever ends this process ends the ranks too
    sys.exit(main())
