"""The processes that are the ranks of one group: started, listened to, and all ended as soon as one of them has failed."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..training.step import OUT_OF_MEMORY, noted

OUT_OF_TIME = "not done in time"
GRACE = 1.0  # seconds in which the others may say what they saw, once one has failed
PATIENCE = 60.0  # seconds for a driver to take back the memory of a process that was killed


class Rank(NamedTuple):
    """Which process of a group this is."""

    rank: int
    size: int
    device: torch.device


@dataclass(frozen=True)
class Failed:
    """Why a group has come to nothing: the last that is heard of it."""

    note: str
    weight: int = 1  # of several, which is the cause: memory, then death, then what the others saw of it


Work = Callable[..., Iterator[Any]]  # of a rank and arguments that can be pickled: what it says, one after the other


def context() -> Any:
    """Where ranks come from: a process that has imported everything and must not have looked at a GPU."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    found = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    found.set_forkserver_preload(["tests.bench.distributed.rank"])
    return found


def run(work: Work, size: int, arguments: tuple[Any, ...], timeout: float) -> Generator[tuple[int, Any], None, None]:
    """What the ranks say, each with the number of who said it; at the end a `Failed`, if one did not come to its end in `timeout` seconds.

    No process is left when this is, whichever way.
    """
    starts, pipes, processes = context(), [], []
    with tempfile.TemporaryDirectory(prefix="liger-fn-ranks-") as where:
        try:
            for rank in range(size):
                receiver, sender = starts.Pipe(duplex=False)
                pipes.append(receiver)
                process = starts.Process(target=_rank, args=(work, rank, size, str(Path(where) / "store"), sender, arguments), daemon=True)
                process.start()
                processes.append(process)
                sender.close()
            yield from _messages(pipes, processes, timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join(PATIENCE)


def _messages(pipes: Sequence[Connection], processes: Sequence[BaseProcess], timeout: float) -> Iterator[tuple[int, Any]]:
    end, failures = time.monotonic() + timeout, list[tuple[int, Failed]]()
    listening: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    while listening:
        ready: list[Any] = wait(list(listening), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            if not failures:
                failures.append((min(listening.values()), Failed(OUT_OF_TIME)))
            break
        for pipe in ready:
            rank = listening[pipe]
            try:
                said = pipe.recv()
            except (EOFError, OSError):
                said = _how_it_ended(rank, processes[rank])
            if said is not None and not isinstance(said, Failed):
                yield rank, said
                continue
            del listening[pipe]  # None: it is done
            if said is not None:
                end = min(end, time.monotonic() + GRACE)
                failures.append((rank, said))
    if failures:
        yield max(failures, key=lambda f: f[1].weight)


def _how_it_ended(rank: int, process: BaseProcess) -> Failed:
    """A process that says no more, and did not say why."""
    process.join(GRACE)
    return Failed(f"rank {rank} was ended from outside (exit code {process.exitcode}): out of the host's memory?", weight=2)


def _rank(work: Work, rank: int, size: int, store: str, pipe: Connection, arguments: tuple[Any, ...]) -> None:
    """In the process."""
    threading.Thread(target=_follow_the_parent, daemon=True).start()
    try:
        gpu = torch.cuda.is_available()
        device = torch.device("cuda", rank) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(1)
        options: dict[str, Any] = {"device_id": device} if gpu else {}
        meeting = dist.FileStore(store, size)  # type: ignore[attr-defined]
        dist.init_process_group("nccl" if gpu else "gloo", store=meeting, rank=rank, world_size=size, **options)
        for said in work(Rank(rank, size, device), *arguments):
            pipe.send(said)
        dist.destroy_process_group()  # not after a failure: it would wait for ranks that wait for this one
        pipe.send(None)
    except Exception as error:
        note = noted(error)
        pipe.send(Failed(note, weight=3 if note == OUT_OF_MEMORY else 1))


def _follow_the_parent() -> None:
    """Whoever started this process was killed: nobody would end it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
