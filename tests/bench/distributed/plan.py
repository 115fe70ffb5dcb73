"""What is measured, as data: models, workloads of one GPU, and the order in which the rows of a run are made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..training.models import BY_KEY, EAGER, OURS, Model
from .search import Search

STEPS, CONTEXT, SCALING = "steps", "context", "scaling"
PARTS = (STEPS, CONTEXT, SCALING)
PROVIDERS = EAGER
LONGEST = "longest"  # the shape of a row that says how long a sequence may be
WARM, TIMED = 2, 4  # steps that are not timed, and steps that are: each takes seconds
_LAYERS_8 = BY_KEY["llama-8b-8-layers-4x4096"]


def _llama_8b(layers: int, name: str) -> Model:
    return replace(_LAYERS_8, name=name, sizes=_LAYERS_8.sizes | {"num_hidden_layers": layers}, providers=PROVIDERS)


LLAMA_8B = _llama_8b(32, "Llama 8B")
MODELS = {
    "llama-8b": LLAMA_8B,  # 60 GiB of weights, gradients and AdamW's states: one GPU of 141 GB, or two of 80
    "llama-8b-16-layers": _llama_8b(16, "Llama 8B 16 layers"),  # 34 GiB: one of 80
}


@dataclass(frozen=True)
class Workload:
    """What a step of one GPU sees."""

    batch: int
    seq: int

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Of `4x4096`; raises ValueError for what is none."""
        found = re.fullmatch(r"\s*([1-9]\d*)x([1-9]\d*)\s*", text)
        if found is None:
            raise ValueError(f"{text}: not a batch and a length, as in 4x4096")
        return cls(int(found[1]), int(found[2]))


WORKLOADS = (Workload(4, 4096), Workload(1, 32768))


@dataclass(frozen=True)
class Task:
    """One row: whole steps of a workload, or (`part` CONTEXT) the longest sequence that a step has room for."""

    part: str
    model: Model  # with the batch of one GPU
    gpus: int
    provider: str
    warm: int = WARM
    timed: int = TIMED
    tiny: bool = False  # on a CPU

    @property
    def shape(self) -> str:
        return LONGEST if self.part == CONTEXT else self.model.shape

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.model.name, self.shape, self.gpus, self.provider

    @property
    def search(self) -> Search:
        """How lengths are tried."""
        return Search(first=16, grain=8) if self.tiny else Search(first=16384, grain=4096)


def _sized(model: Model, batch: int, seq: int, tiny: bool) -> Model:
    return replace(model.tiny(), batch=batch, seq=max(8, seq // 2048)) if tiny else replace(model, batch=batch, seq=seq)


def tasks(
    parts: Iterable[str],
    models: Iterable[str],
    workloads: Sequence[Workload],
    gpus: Sequence[int],
    providers: Sequence[str],
    *,
    warm: int = WARM,
    timed: int = TIMED,
    tiny: bool = False,
) -> list[Task]:
    """Every row that was asked for, once: steps and contexts on the most GPUs, and ours with the first workload on each number of them."""
    parts, most, found = tuple(parts), max(gpus), dict[tuple[str, str, int, str], Task]()

    def add(part: str, model: Model, number: int, provider: str) -> None:
        task = Task(part, model, number, provider, warm, timed, tiny)
        found.setdefault(task.key, task)

    for model in (MODELS[name] for name in models):
        sized = [_sized(model, w.batch, w.seq, tiny) for w in workloads]
        if STEPS in parts:
            for each in sized:
                for provider in providers:
                    add(STEPS, each, most, provider)
        if SCALING in parts:
            for number in sorted(gpus):
                add(STEPS, sized[0], number, OURS)
        if CONTEXT in parts:
            for provider in providers:
                add(CONTEXT, _sized(model, 1, 0, tiny), most, provider)
    return list(found.values())
