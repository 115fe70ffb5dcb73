"""Processes that are the ranks of one engine: each goes through a table of checks, and says of each whether it holds.

A check fails by raising, on whichever rank. It has a process group of its own, so that one that fails leaves the next a sound one. The
table of a library that keeps its first group for good says `ONE_GROUP = True`.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import liger_fn

LIMIT = 240  # seconds after which ranks that have not come back are given up
PATIENCE = timedelta(seconds=20)  # that a rank waits in a collective for one that does not come


class Rank(NamedTuple):
    """Where a check runs."""

    rank: int
    size: int
    where: Path  # a folder that all ranks share


Check = Callable[[Rank], None]


def table(of: str) -> Any:
    """The module of this package that has these `CHECKS`, by their names."""
    return importlib.import_module(f"tests.engines.{of}")


def outcomes(of: str, size: int, where: Path, preload: Iterable[str] = ()) -> dict[str, str]:
    """Each check of a table, and what it raised on which rank; empty where it holds on all."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or PyTorch's profiler says on the terminal that it starts and stops
    start = "spawn" if torch.cuda.is_available() else "forkserver"
    if start == "forkserver":  # imported once, before ranks are forked; a server that runs already keeps what it has
        multiprocessing.get_context(start).set_forkserver_preload([f"tests.engines.{name}" for name in preload])
    ranks = mp.start_processes(_work, (size, str(where), of), size, join=False, start_method=start)
    end = time.monotonic() + LIMIT
    try:
        while not ranks.join(timeout=5):
            assert time.monotonic() < end, f"{size} ranks of {of} are not done after {LIMIT} s"
    finally:
        for process in ranks.processes:
            if process.is_alive():
                process.kill()
    found = [torch.load(where / f"rank{rank}") for rank in range(size)]
    return {name: "\n".join(f"rank {r}: {said[name]}" for r, said in enumerate(found) if said[name]) for name in found[0]}


def _work(rank: int, size: int, where: str, of: str) -> None:
    torch.set_num_threads(1)
    module, on = table(of), Rank(rank, size, Path(where))
    one = getattr(module, "ONE_GROUP", False)
    with liger_fn.use_backend("reference"), _group(on, "all") if one else nullcontext():
        said = {}
        for name, check in module.CHECKS.items():
            with nullcontext() if one else _group(on, name):
                said[name] = _outcome(on, check)
    torch.save(said, Path(where) / f"rank{rank}")


def _outcome(on: Rank, check: Check) -> str:
    try:
        check(on)
    except Exception:
        return traceback.format_exc()
    return ""


@contextmanager
def _group(on: Rank, name: str) -> Iterator[None]:
    store = dist.FileStore(str(on.where / f"store of {name}"), on.size)
    dist.init_process_group("gloo", store=store, rank=on.rank, world_size=on.size, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
