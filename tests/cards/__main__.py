"""The error of every function against fp64: `make cards`.

python -m tests.cards                 measure here, print, and keep; on a GPU write docs/numerics.md too
python -m tests.cards --ops moe_experts rope
python -m tests.cards report          make the page again from what is kept
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts

import torch
from rich.console import Console
from rich.progress import Progress

from . import kept, report
from .measure import Line, measure, measured, of, small

Job = tuple[str, int]
LARGE_AT_ONCE = 3


def run(ops: Sequence[str], device: torch.device, processes: int, console: Console) -> Iterator[list[Line]]:
    """The lines of all `ops` in three parts: small cases by all processes, large ones by a few, and alone those that had no room."""
    jobs = [(op, nth) for op in ops for nth in range(len(of(op, device)))]
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("cases", total=len(jobs))
        for large, n in ((False, processes), (True, min(processes, LARGE_AT_ONCE))):
            found, crowded = _part([job for job in jobs if (job[1] >= small(job[0])) == large], device, n, partial(progress.advance, task))
            yield found
            yield _part(crowded, device, 1, partial(progress.advance, task), alone=True)[0]


def _part(
    jobs: Sequence[Job], device: torch.device, processes: int, done: Callable[[], None], alone: bool = False
) -> tuple[list[Line], list[Job]]:
    """Lines in the order of `jobs`, and the jobs that found no room on the GPU beside others."""
    found: dict[Job, list[Line]] = {}
    context, crowded = multiprocessing.get_context("spawn"), []
    if jobs:
        with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            waiting = {pool.submit(measure, *job, device): job for job in jobs}
            for future in as_completed(waiting):
                try:
                    found[waiting[future]] = future.result()
                except torch.OutOfMemoryError:
                    if alone:
                        raise
                    crowded.append(waiting[future])
                    continue
                done()
    return [line for job in jobs for line in found.get(job, ())], crowded


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cards", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", nargs="?", choices=["report"], help="make the page from the newest run that is kept")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu, known = device.type == "cuda", measured(device)
    parser.add_argument("--ops", nargs="+", choices=known, default=known, metavar="OP", help=", ".join(known))
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: tests/cards/results; without a GPU a new folder)")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1) if on_gpu else 1)
    options, console = parser.parse_args(argv), Console(width=None if sys.stdout.isatty() else 160)
    if options.what == "report":
        runs = sorted(kept.FOLDER.glob("*.json"), key=lambda path: (kept.load(path).machine["date"], path.stem))
        if not runs:
            print(f"No run in {kept.FOLDER}: run `make cards` on a GPU first. Nothing was written.", file=sys.stderr)
            return 1
        console.print(f"written: {report.write(kept.load(runs[-1]))}", soft_wrap=True)
        return 0
    folder = options.out or (kept.FOLDER if on_gpu else Path(tempfile.mkdtemp(prefix="liger-fn-cards-")))
    lines: list[Line] = []
    for part in run(options.ops, device, options.processes, console):
        lines += part
        path = kept.save(kept.machine(device), part, folder)
    lines.sort(key=lambda line: options.ops.index(line.op))
    for (op, dtype, output), found in report.card(lines).items():
        console.print(f"{op:24} {dtype:9} {output:24} {' '.join(f'{c:>7}' for c in report.row(found))}", highlight=False, soft_wrap=True)
    console.print("cases; roundings: median of ours and of plain, worst of each; largest share of what the rule allows, and its case")
    console.print(f"written to {path}", soft_wrap=True)
    if on_gpu and not options.out:
        report.write(kept.load(path))
    return int(any(line.share > 1 for line in lines))


if __name__ == "__main__":
    sys.exit(main())
