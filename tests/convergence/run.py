"""The command: trains every job, several at a time on one GPU, and keeps each result as it comes."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import queue
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import _corpus
from _presets import PRESETS, Preset

from . import kept, train
from .measure import Result, judge
from .models import DTYPES, MODELS
from .train import Job

# Large enough for the device to have work, small enough for a hundred runs in some minutes.
PRESET = replace(
    PRESETS["small"], name="convergence", hidden=256, layers=4, heads=4, kv_heads=2, mlp=768, batch=8, seq=256, steps=300, lr=2e-3
)  # fmt: skip
PRESETS_HERE = {"convergence": PRESET, "tiny": replace(PRESETS["tiny"], batch=4)}
GPU_WORKERS = 6


@dataclass(frozen=True)
class Options:
    """A checked command line."""

    models: tuple[str, ...]
    dtypes: tuple[str, ...]
    preset: Preset
    device: str
    workers: int
    seed: int
    out: Path

    def jobs(self, corpus: Path) -> list[Job]:
        return [Job(m, d, self.preset, self.device, corpus, self.seed) for m, d in itertools.product(self.models, self.dtypes)]


def parse(argv: Sequence[str] | None) -> Options:
    """Options from `argv` (None: the command line); a value that cannot work ends the program with exit code 2."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m tests.convergence", description="Train models stock and patched, and compare where they end.", allow_abbrev=False
    )
    workers, out = (GPU_WORKERS, kept.FOLDER) if device == "cuda" else (1, Path("out/convergence"))
    parser.add_argument("--models", default=",".join(MODELS), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--dtypes", default=",".join(DTYPES), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--preset", default="convergence", choices=PRESETS_HERE, help="size (default: %(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of each run (default: the preset's)")
    parser.add_argument("--workers", type=int, default=workers, metavar="N", help="processes at a time (default here: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights and the batches (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="where the JSON goes (default here: %(default)s)")
    given = parser.parse_args(argv)
    chosen = []
    for option, known in (("models", MODELS), ("dtypes", DTYPES)):
        names = tuple(dict.fromkeys(getattr(given, option).split(",")))
        unknown = [name for name in names if name not in known]
        if unknown:
            parser.error(f"--{option} {', '.join(unknown)}: not known; choose from {', '.join(known)}")
        chosen.append(names)
    preset = PRESETS_HERE[given.preset]
    if given.steps is not None:
        if given.steps < 3:
            parser.error(f"--steps {given.steps}: must be 3 or more, since the last third is looked at")
        preset = replace(preset, steps=given.steps)
    if given.workers < 1:
        parser.error(f"--workers {given.workers}: must be 1 or more processes")
    return Options(chosen[0], chosen[1], preset, device, given.workers, given.seed, given.out)


# --- a worker ---------------------------------------------------------------------------------------------------------------------------

_messages: Any = None  # the queue to the parent, in a worker


def _enter(messages: Any, threads: int | None) -> None:
    global _messages
    _messages = messages
    if threads is not None:
        torch.set_num_threads(threads)


def _work(job: Job) -> Result:
    def say(run: str, seconds: float, before: float, after: float) -> None:
        _messages.put(f"{job.name:<17} {run:<16} {seconds:6.1f} s  held-out loss {before:.4f} → {after:.4f}")

    return train.compare(job, say=say)


# --- the parent -------------------------------------------------------------------------------------------------------------------------


class _Display:
    """A bar over all runs on a terminal; a line for each finished run anywhere."""

    def __init__(self, console: Console, runs: int) -> None:
        self._bar = Progress(
            TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("runs", total=runs)
        self._console = console

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def line(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def run(self, text: str) -> None:
        self._bar.advance(self._task)
        self.line(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Train all jobs; 0 if every patched run is as near to stock as stock is to itself, 1 if one is not or failed."""
    options = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)
    folder = Path("out/convergence") / f"corpus-{options.preset.name}"
    corpus = _corpus.prepare(options.preset, folder)
    train.split(folder)
    jobs = options.jobs(folder.resolve())
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sheet = kept.Sheet(kept.machine(options.device), kept.settings(options.preset, options.seed, corpus.tokens))
    with _Display(console, len(jobs) * len(train.VARIANTS)) as display:
        preset = options.preset
        display.line(
            f"{len(jobs)} jobs of {len(train.VARIANTS)} runs: {preset.layers} layers of {preset.hidden}, {preset.steps} steps of"
            f" {preset.batch} × {preset.seq} tokens, {sheet.machine['device']}, {options.workers} at a time"
        )
        bad = _all(jobs, options, sheet, display)
    good = len(jobs) - len(bad)
    console.print(
        f"{good} of {len(jobs)}: patched is as near to stock as stock is to itself", style="red" if bad else "green", highlight=False
    )
    return int(bool(bad))


def _all(jobs: list[Job], options: Options, sheet: kept.Sheet, display: _Display) -> list[str]:
    """Run the jobs in a pool; what is bad, by name."""
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    bad: list[str] = []
    threads = max(1, (os.cpu_count() or 1) // options.workers) if options.workers > 1 else None
    pool = ProcessPoolExecutor(options.workers, mp_context=context, initializer=_enter, initargs=(messages, threads))
    try:
        pending: dict[Future[Result], Job] = {pool.submit(_work, job): job for job in jobs}
        while pending:
            done = [f for f in pending if f.done()]
            _drain(messages, display)  # a job's lines before its verdict
            for future in done:
                bad += _finish(future, pending.pop(future), options, sheet, display)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return bad


def _drain(messages: Any, display: _Display) -> None:
    """Show what comes until nothing does for a moment."""
    try:
        while True:
            display.run(messages.get(timeout=0.2))
    except queue.Empty:
        pass


def _finish(future: Future[Result], job: Job, options: Options, sheet: kept.Sheet, display: _Display) -> list[str]:
    """Keep a job's result at once, or its error; its name if it is bad."""
    try:
        result = future.result()
    except Exception as error:
        sheet.failed[job.name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        display.line(f"{job.name:<17} failed\n{''.join(traceback.format_exception(error))}", "red")
        kept.save(sheet, options.out)
        return [job.name]
    sheet.add(result)
    path = kept.save(sheet, options.out)
    wrong = judge(result)
    display.line(f"{job.name:<17} {'; '.join(wrong) or 'as near to stock as stock is to itself'} ({path})", "red" if wrong else "green")
    return [job.name] if wrong else []
