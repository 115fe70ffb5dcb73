"""Which plan of a model on so many GPUs is fastest, of those that a GPU has room for and that no batch forbids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .plan import FSDP, GIB, Memory, Plan, memory
from .terms import Key, Terms
from .traffic import LINKS, Cluster, Step, step

WORLDS = (8, 64, 512, 4096)
SEQ = 8192
BATCHES = (1, 2, 4, 8)
USABLE = 0.9  # of a GPU's memory: the rest is for communication's buffers, the context, and memory in pieces
GPUS = {"80 GiB": 80 * USABLE * GIB, "141 GiB": 141 * USABLE * GIB}
SMALL = next(iter(GPUS))
MOST_TOKENS = 16 * 2**20  # a step, of all ranks
LONGEST = 2**20


@dataclass(frozen=True)
class Choice:
    """A plan, and what it comes to."""

    plan: Plan
    memory: Memory
    step: Step


def plans(world: int, degrees: tuple[int, ...], seq: int = SEQ) -> Iterator[Plan]:
    """FSDP over all ranks or over parts of them, of which there are replicas, with and without tensor parallelism and checkpointing."""
    for tp in degrees:
        shard = world // tp
        while shard >= 1 and tp <= world:
            for batch in BATCHES:
                for checkpointing in (False, True):
                    yield Plan(shard, world // tp // shard, tp, batch, seq, checkpointing)
            shard //= 8 if shard % 8 == 0 else shard + 1


def choices(terms: dict[Key, Terms], name: str, provider: str, world: int, room: float, cluster: Cluster = LINKS) -> list[Choice]:
    """All plans that fit, the fastest first."""
    degrees = tuple(sorted(tp for shape, tp, who in terms if (shape, who) == (name, provider)))
    found = []
    for plan in plans(world, degrees):
        of = terms[name, plan.tp, provider]
        need = memory(plan, of)
        if need.total <= room and plan.tokens_a_step <= MOST_TOKENS:
            found.append(Choice(plan, need, step(plan, of, cluster)))
    return sorted(found, key=lambda c: -c.step.tokens_per_s)


def longest(plan: Plan, terms: Terms, room: float) -> int:
    """Tokens of the longest sequence, one a rank and a multiple of 4096, that fits; at most LONGEST."""
    low, high = 0, LONGEST // 4096
    while low < high:
        middle = (low + high + 1) // 2
        fits = memory(replace(plan, batch=1, seq=middle * 4096, checkpointing=True), terms).total <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * 4096


def words(plan: Plan) -> str:
    """As a table says it."""
    how = [f"FSDP {plan.shard}" if plan.stage == FSDP and plan.shard > 1 else ""]
    how += [f"{plan.replicas} replicas" if plan.replicas > 1 else "", f"TP {plan.tp}" if plan.tp > 1 else ""]
    return " × ".join(part for part in how if part)
