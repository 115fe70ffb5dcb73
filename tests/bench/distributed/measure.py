"""From what ranks say to a row: of whole steps once they are done, of contexts after each length that fitted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from ..training.step import OUT_OF_MEMORY
from . import rank
from .group import OUT_OF_TIME, Failed, run
from .plan import CONTEXT, Task
from .rank import Figures, Fits, Trying
from .store import Row

UNFINISHED = "longer sequences were still to be tried"


def measured(task: Task, timeout: float) -> Iterator[Row]:
    """The row of a task, in `timeout` seconds; of a context first what is known so far, so that a run that is cut off has kept it.

    Nothing that happens to the ranks is raised here: it is the row's note.
    """
    yield from (_longest if task.part == CONTEXT else _steps)(task, timeout)


def of_ranks(task: Task, figures: Sequence[Figures], tokens: int) -> Row:
    """What all ranks measured of steps that see so many tokens each."""
    ms = max(f.step_ms for f in figures)
    return replace(
        _empty(task),
        tokens_per_s=tokens * len(figures) / ms * 1e3,
        step_ms=ms,
        peak_gib=tuple(f.peak_gib for f in figures if f.peak_gib is not None),
        parameters_gib=tuple(f.parameters_gib for f in figures),
        optimizer_gib=tuple(f.optimizer_gib for f in figures),
        first_losses=tuple(f.losses[0] for f in figures),
        losses=tuple(sum(each) / len(each) for each in zip(*(f.losses for f in figures), strict=True)),
        first_s=max(f.first_s for f in figures),
        patched=figures[0].patched,
    )


def _empty(task: Task, note: str = "") -> Row:
    return Row(*task.key, note=note)


def _note(failed: Failed, timeout: float) -> str:
    return f"not done after {timeout:g} s" if failed.note == OUT_OF_TIME else failed.note


def _steps(task: Task, timeout: float) -> Iterator[Row]:
    figures: dict[int, Figures] = {}
    with closing(run(rank.steps, task.gpus, (task,), timeout)) as heard:
        for who, said in heard:
            if isinstance(said, Failed):
                yield _empty(task, _note(said, timeout))
                return
            figures[who] = said
            if len(figures) == task.gpus:  # what they still have to do is to end
                break
    yield of_ranks(task, [figures[who] for who in sorted(figures)], task.model.batch * task.model.seq)


def _longest(task: Task, timeout: float) -> Iterator[Row]:
    search, row, end = task.search, _empty(task), time.monotonic() + timeout
    note = ""
    while search.next() is not None and not note:
        tried: dict[int, int] = {}
        heard: dict[int, dict[int, Figures]] = {}  # of each length, of each rank
        for who, said in run(rank.contexts, task.gpus, (task, search), max(1.0, end - time.monotonic())):
            if isinstance(said, Trying):
                tried[who] = said.length
            elif isinstance(said, Fits):
                search = search.with_fit(said.length, said.peaks, said.room)
                of_length = heard.setdefault(said.length, {})
                of_length[who] = said.figures
                if len(of_length) == task.gpus:
                    row = replace(of_ranks(task, [of_length[r] for r in sorted(of_length)], said.length), longest=said.length)
                    yield replace(row, fails=search.fails, note=UNFINISHED)
            elif said.note == OUT_OF_MEMORY and tried:
                search = search.without(max(tried.values()))
            else:
                note = _note(said, timeout) + (f" (at {max(tried.values())} tokens)" if tried else "")
    note = note or ("" if row.longest else OUT_OF_MEMORY)
    yield replace(row, fails=search.fails, note=note)
