"""One training run in one process of its own, and what is measured in it.

A process a run, because peak resident memory on a CPU is a figure of the whole process (a second run would start from the first one's
peak), and because nothing of one run (random state, caches, a patched class) can then reach the next.
"""

import itertools
import multiprocessing
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from _presets import Preset


@dataclass(frozen=True)
class Run:
    """What to train. Two runs of one comparison differ in `patched` or in `compiled` alone."""

    name: str
    patched: bool
    compiled: bool
    model_type: str
    preset: Preset
    device: str
    seed: int
    folder: Path


@dataclass
class Result:
    """What a run measured. `peak_mib` on a CPU is over what was resident before the model was built."""

    name: str
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    tokens_per_s: float = 0.0
    peak_mib: float = 0.0
    report: str = ""
    sample: str = ""


class Meter:
    """Times the steps, keeps the losses, and tells the parent process."""

    def __init__(self, run: Run, pipe: Connection) -> None:
        self._run, self._pipe = run, pipe
        self._cuda = run.device == "cuda"
        self._pending: list[torch.Tensor] = []
        self._before = 0.0 if self._cuda else _resident_mib("VmRSS")
        self.result = Result(run.name)

    def steps(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Hand out the batches; the time between two of them is a step."""
        preset = self._run.preset
        marks = [self._mark()]
        for step, batch in enumerate(batches):
            yield batch
            marks.append(self._mark())
            if step % preset.every == 0 or step == preset.steps - 1:
                self._read_losses()
            self._pipe.send(("step", step + 1, self.result.losses[-1]))
        self._finish(marks)

    def log(self, loss: torch.Tensor) -> None:
        """Keep a loss without waiting for it: reading one makes the host wait for the device."""
        self._pending.append(loss.detach())

    def _read_losses(self) -> None:
        self.result.losses += torch.stack(self._pending).float().tolist()
        self._pending.clear()

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _finish(self, marks: list[Any]) -> None:
        preset, result = self._run.preset, self.result
        if self._cuda:
            torch.cuda.synchronize()
            result.step_ms = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
            result.peak_mib = torch.cuda.max_memory_allocated() / 2**20
        else:
            result.step_ms = [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
            result.peak_mib = max(0.0, _resident_mib("VmHWM") - self._before)
        # The median: a step that waits for another program's burst is no property of this one.
        timed = result.step_ms[min(preset.warmup, preset.steps // 2) :]
        result.tokens_per_s = preset.batch * preset.seq / statistics.median(timed) * 1e3


def _resident_mib(key: str) -> float:
    """This process's resident memory, now (VmRSS) or at its peak (VmHWM). Elsewhere than on Linux there is the peak only."""
    system = platform.system()
    if system == "Linux":
        # Not getrusage: its peak survives exec, so a child would begin with its parent's.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**10
    if system == "Windows":
        return float("nan")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if system == "Darwin" else 2**10)


class RunFailed(Exception):
    """A run's process ended without a result."""


def execute(train: Callable[[Run, Meter], None], run: Run, log: Path, on_step: Callable[[int, float], None]) -> Result:
    """Train in a new process, calling `on_step(step, loss)` as it goes. What it writes to its terminal goes to `log`."""
    # CPU threads that spin while they wait for each other make a step ten times as long where other programs use the cores too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(train, run, sender, log), name=run.name)
    process.start()
    sender.close()
    try:
        while True:
            kind, *rest = receiver.recv()
            if kind == "step":
                on_step(*rest)
            elif kind == "result":
                process.join()
                return rest[0]
            else:
                raise RunFailed(f"the {run.name} run failed; all it printed is in {log}\n\n{rest[0]}")
    except EOFError:
        process.join()
        raise RunFailed(f"the {run.name} run was ended from outside (exit code {process.exitcode}): out of memory? See {log}") from None
    finally:
        if process.is_alive():
            process.terminate()
        process.join()


def _child(train: Callable[[Run, Meter], None], run: Run, pipe: Connection, log: Path) -> None:
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            meter = Meter(run, pipe)
            train(run, meter)
            pipe.send(("result", meter.result))
        except KeyboardInterrupt:
            pass
        except Exception:
            pipe.send(("failed", traceback.format_exc()))
            raise SystemExit(1) from None
