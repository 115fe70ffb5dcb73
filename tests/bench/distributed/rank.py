"""What each rank does: make the model, patch it, shard it layer by layer, and train steps of it, or try how long a sequence may be."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

import liger_fn

from ..training.step import GIB, LR, milliseconds, provide, trainer
from .group import Rank
from .plan import Task
from .search import Search

PRETENDED = 44  # tokens of one sequence for which a tiny model on a CPU is said to have room, that the search has an end to find


@dataclass(frozen=True)
class Figures:
    """What one rank measured of its steps."""

    step_ms: float
    peak_gib: float | None
    parameters_gib: float
    optimizer_gib: float
    losses: tuple[float, ...]
    first_s: float
    patched: int


class Trying(NamedTuple):
    """The length that a rank begins with now."""

    length: int


class Fits(NamedTuple):
    """A length of which a whole step was made; peaks and room in GiB, and the same on all ranks."""

    length: int
    peaks: tuple[float, ...]  # of each of its phases, of the rank that needs the most
    room: float  # of the rank that has the least
    figures: Figures


@dataclass(frozen=True)
class Trainee:
    """A sharded model and its optimizer."""

    network: Any
    forward: Any
    optimizer: torch.optim.Optimizer
    patched: int

    @property
    def parameters_gib(self) -> float:
        return sum(_local_bytes(p) for p in self.network.parameters()) / GIB

    @property
    def optimizer_gib(self) -> float:
        return sum(_local_bytes(t) for s in self.optimizer.state.values() for t in s.values() if torch.is_tensor(t)) / GIB


def _local_bytes(t: Tensor) -> int:
    local = t.to_local() if isinstance(t, DTensor) else t
    return local.numel() * local.element_size()


def trainee(task: Task, device: torch.device) -> Trainee:
    """Whole on every rank for a moment, from one seed; then this rank's share."""
    network = task.model.build(device)
    forward, patched = provide(task.provider, network)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in (*network.base_model.layers, network):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, fused=True)
    _tidy(device)
    return Trainee(network, forward, optimizer, patched)


def _backend(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU plain PyTorch: Triton's interpreter, where it is on, would take hours."""
    return nullcontext() if device.type == "cuda" else liger_fn.use_backend("reference")


def _tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- steps ------------------------------------------------------------------------------------------------------------------------------


def steps(on: Rank, task: Task) -> Iterator[Figures]:
    """Train on one batch, each rank its own."""
    gpu = on.device.type == "cuda"
    with _backend(on.device):
        trained = trainee(task, on.device)
        ids = task.model.tokens(on.device, seed=1 + on.rank)
        step = trainer(trained.forward, trained.optimizer, ids)
        start = time.perf_counter()
        losses = [step().item()]
        first = time.perf_counter() - start
        losses += [step().item() for _ in range(task.warm - 1)]
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        ms = median(milliseconds(step, on.device, task.timed))
    peak = torch.cuda.max_memory_allocated() / GIB if gpu else None
    yield Figures(ms, peak, trained.parameters_gib, trained.optimizer_gib, tuple(losses), first, trained.patched)


# --- contexts ---------------------------------------------------------------------------------------------------------------------------


def contexts(on: Rank, task: Task, search: Search) -> Iterator[Trying | Fits]:
    """A whole step at each length that the search asks for, until one finds no room: the search then goes on in other processes.

    The ranks know the same, so they try the same.
    """
    gpu = on.device.type == "cuda"
    if gpu:  # a length is to fail for want of memory, not because what is free lies in pieces
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    with _backend(on.device):
        trained = trainee(task, on.device)
        _one(task, trained, on, search.grain)  # from here on the optimizer's states are there, and the kernels compiled
        while (length := search.next()) is not None:
            yield Trying(length)
            peaks, ms, loss = _one(task, trained, on, length)
            figures = Figures(ms, max(peaks) if gpu else None, trained.parameters_gib, trained.optimizer_gib, (loss,), 0.0, trained.patched)
            seen = torch.tensor([*peaks, -_room(on.device)], device=on.device)
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
            *most, least = seen.tolist()
            search = search.with_fit(length, tuple(most), -least)
            yield Fits(length, tuple(most), -least, figures)


def _one(task: Task, trained: Trainee, on: Rank, length: int) -> tuple[tuple[float, ...], float, float]:
    """The peaks of the phases of one whole step in GiB, its milliseconds and its loss."""
    gpu, peaks = on.device.type == "cuda", list[float]()
    if not gpu and length > PRETENDED:
        raise torch.OutOfMemoryError("pretended")

    def mark(*_: object) -> None:
        peaks.append(torch.cuda.max_memory_allocated() / GIB if gpu else float(length))
        if gpu:
            torch.cuda.reset_peak_memory_stats()

    ids = replace(task.model, batch=1, seq=length).tokens(on.device, seed=1 + on.rank)
    _tidy(on.device)
    start = _now(gpu)
    with _after_the_last_layer(trained.network, mark):
        loss = trained.forward(input_ids=ids, labels=ids).loss
        mark()
        loss.backward()
    trained.optimizer.step()
    trained.optimizer.zero_grad()
    mark()
    return tuple(peaks), 1e3 * (_now(gpu) - start), loss.item()


def _after_the_last_layer(network: Any, mark: Callable[..., None]) -> RemovableHandle:
    """For a while, `mark` is called when backward has been through the last layer, which is where a long sequence needs the most."""

    def on_output(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(mark)

    handle: RemovableHandle = network.base_model.layers[-2].register_forward_hook(on_output)
    return handle


def _now(gpu: bool) -> float:
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def _room(device: torch.device) -> float:
    """GiB that this process could have allocated in all."""
    if device.type != "cuda":
        return float(PRETENDED)
    return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / GIB
