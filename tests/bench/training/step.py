"""One model trained by one provider in a process of its own: time, memory, first losses, and where a step's time goes."""

from __future__ import annotations

import itertools
import re
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

import liger_patch

from .models import COMPILED, LIGER, LIGER_COMPILE, OURS, OURS_COMPILE, Model

GIB = 2**30
WARM, TIMED = 3, 10  # steps that are not timed, and steps that are
LR = 1e-4
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Step:
    """What was measured of a model and a provider. Times in milliseconds."""

    model: str
    shape: str
    provider: str
    tokens_per_s: float | None = None  # None where it could not be measured: `note` says why
    step_ms: float | None = None
    peak_gib: float | None = None  # of all that is allocated, the model and the optimizer's states with it
    first_s: float | None = None  # seconds of the first step, compilation with it
    losses: tuple[float, ...] = ()  # of the first steps
    kernels_ms: dict[str, float] = field(default_factory=dict)  # of one step, by the kernel's name
    patched: int = 0  # places that hold a function of this library
    checkpointing: bool = False
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.model, self.shape, self.provider


def provide(provider: str, model: PreTrainedModel) -> tuple[Any, int]:
    """(what is called, how many places were patched): the model changed by `provider`'s one line."""
    patched = 0
    if provider in (OURS, OURS_COMPILE):
        patched = len(liger_patch.auto(model).where("patched"))
    elif provider in (LIGER, LIGER_COMPILE):
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    return (torch.compile(model) if provider in COMPILED else model), patched


def trainer(forward: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What one step is: it returns its loss, and makes the host wait for nothing."""

    def step() -> torch.Tensor:
        loss: torch.Tensor = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure(model: Model, provider: str, device: torch.device) -> Step:
    """Train some steps on one batch."""
    network = model.build(device)
    forward, patched = provide(provider, network)
    ids = model.tokens(device)
    step = trainer(forward, torch.optim.AdamW(network.parameters(), lr=LR, fused=True), ids)
    start = time.perf_counter()
    losses = [step().item()]
    first = time.perf_counter() - start
    losses += [step().item() for _ in range(WARM - 1)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ms = median(milliseconds(step, device))
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
    return Step(
        model.name, model.shape, provider, tokens_per_s=ids.numel() / ms * 1e3, step_ms=ms, peak_gib=peak, first_s=first,
        losses=tuple(losses), kernels_ms=kernels(step) if device.type == "cuda" else {}, patched=patched,
        checkpointing=model.checkpointing,
    )  # fmt: skip


def milliseconds(step: Callable[[], Any], device: torch.device, timed: int = TIMED) -> list[float]:
    """Of each step: between events on the device, the host ahead of it where it can be."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(2):
            step()
            marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(timed + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def kernels(step: Callable[[], Any]) -> dict[str, float]:
    """Device time of each kernel in one step, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    found: dict[str, float] = defaultdict(float)
    for event in profiler.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name] += event.device_time_total / 1e3
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def noted(error: Exception) -> str:
    """A row's note on what ended it; the whole of a fault goes to stderr."""
    said = str(error)
    if isinstance(error, torch.OutOfMemoryError) or re.search("(?i)out of memory|ALLOC_FAILED", said):  # cuBLAS, NCCL and Triton say it so
        return OUT_OF_MEMORY
    traceback.print_exception(error)
    return f"failed: {type(error).__name__}: {(said.strip().splitlines() or [''])[0]}"[:200]


def answer(model: Model, provider: str, pipe: Connection) -> None:
    """`measure` in a process of its own: what was measured, or why it could not be, goes into `pipe`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failed = Step(model.name, model.shape, provider, checkpointing=model.checkpointing)
    try:
        row = measure(model if device.type == "cuda" else model.tiny(), provider, device)
    except Exception as error:
        row = replace(failed, note=noted(error))
    pipe.send(row)
