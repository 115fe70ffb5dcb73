"""The experts of a mixture: `moe_experts` against the dense matrix products of equal work, at the sizes of real models.

With P = T k rows, a row's floor is six products by cuBLAS, one after the other, into buffers that are there:

    a W₁ᵀ      h W₂ᵀ      dy W₂      d W₁      dᵀ a      dyᵀ h         a, dy: [P, H]    h: [P, I]    d: [P, 2I]    W₁: [2I, H]    W₂: [H, I]

They are timed just before each provider, since a long run heats a GPU and slows both. Where each expert has so few tokens that its weights
are what takes time, the floor is that of memory: each weight is read twice, and its gradient written once, at the rate of a copy.

Each provider's value and gradients are compared with fp64 before it is timed, at the same hidden sizes and tokens for each expert, of fewer
experts. Figures are of the forward and all gradients; memory is the peak over the inputs, with the gradients.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests import cases
from tests.cases import BF16, FP32, Case, Inputs, Maker
from tests.sample import Sample, gradients

from . import measure, peers
from .ahead import compile_ahead
from .heads import error
from .peers import EAGER, GROUPED, HAND, LIGER, MINE, OURS, RECOMPUTE
from .results import Row
from .run import Figures, Red, Run, compared
from .table import EXPERTS_BOTH, EXPERTS_SKEWED, Bench, Sizes

OP = "moe_experts"
BY_ALL = OURS, RECOMPUTE, EAGER, GROUPED, HAND, LIGER
BY_GROUPS = OURS, RECOMPUTE, GROUPED, HAND
SLOW = (EAGER,)  # not measured with skewed routing
TUNING = (LIGER,)  # compile and time many kernels before their first call returns: measured by themselves, last
REPLAYS = 10, 50
WRONG = 0.03  # of ‖truth‖: sums in bf16 stay below; a term that is missing, or a row in a wrong place, is more


@dataclass(frozen=True)
class Mixture:
    """One shape, and what is measured of it."""

    model: str
    sizes: Sizes  # T tokens, E experts, k < E choices of each token, H hidden, I inner
    by: tuple[str, ...] = BY_GROUPS
    skewed: bool = False  # too
    by_weights: bool = False  # its floor is that of memory

    @property
    def label(self) -> str:
        return "T{} E{} k{} H{} I{}".format(*self.sizes)

    @property
    def small(self) -> Sizes:
        """Experts enough for a choice, with as many tokens each."""
        t, e, k, *widths = self.sizes
        few = min(e, 2 * k)
        return max(1, t * few // e), few, k, *widths

    @property
    def routings(self) -> tuple[bool, ...]:
        return (False, True) if self.skewed else (False,)

    def names(self, skewed: bool) -> tuple[str, ...]:
        return tuple(p for p in self.by if not (skewed and p in SLOW))


MIXTURES = (
    Mixture("Qwen3-30B-A3B", (32768, 128, 8, 2048, 768), BY_ALL, skewed=True),
    Mixture("Mixtral 8x7B", (4096, 8, 2, 4096, 14336), BY_ALL, skewed=True),
    Mixture("DeepSeek-V3", (8192, 256, 8, 7168, 2048)),
    Mixture("Qwen3-30B-A3B, few tokens", (256, 128, 8, 2048, 768), by_weights=True),
)
TINY = (Mixture("tiny", (64, 4, 2, 32, 16), BY_ALL, skewed=True), Mixture("tiny, few tokens", (48, 8, 2, 32, 16), by_weights=True))


def mixtures(device: torch.device) -> tuple[Mixture, ...]:
    """What is measured on `device`: without a GPU only that the harness works."""
    return MIXTURES if device.type == "cuda" else TINY


def mode(skewed: bool) -> str:
    return EXPERTS_SKEWED if skewed else EXPERTS_BOTH


def measured() -> set[tuple[str, str, str, str]]:
    """Of all rows that a run on a GPU with every library has."""
    return {(OP, m.label, mode(skewed), name) for m in MIXTURES for skewed in m.routings for name in m.names(skewed)}


# --- inputs and floor -------------------------------------------------------------------------------------------------------------------


def make(t: int, e: int, k: int, h: int, i: int, skewed: bool) -> Callable[[Maker], Inputs]:
    """Each set of experts is as likely; if skewed, every other token chooses expert 0, and no other token does."""

    def inputs(m: Maker) -> Inputs:
        least = int(skewed)
        index = m.normal(t, e - least, dtype=FP32).topk(k, -1).indices + least
        if skewed:
            index[::2, 0] = 0
        return {
            "x": m.normal(t, h),
            "gate_up": m.normal(e, 2 * i, h, scale=h**-0.5),
            "down": m.normal(e, h, i, scale=i**-0.5),
            "topk_index": index,
            "topk_weight": m.normal(t, k, dtype=FP32).softmax(-1),
        }

    return inputs


def bench(mixture: Mixture) -> Bench:
    """As `Run` takes it, with the routing last; its gate is of the small sizes."""
    small = tuple((*mixture.small, skewed) for skewed in mixture.routings)
    return Bench(op=OP, make=make, sizes=small, tiny=small[-1], gate_rows=mixture.small[0], label="T{} E{} k{} H{} I{} skewed {}")


def products(mixture: Mixture, device: torch.device) -> measure.Run:
    """The dense products of as many rows. Each result that a later product reads has its place, and the scale that it has there."""
    t, _, k, h, i = mixture.sizes
    rows, m = t * k, Maker(device, BF16)
    a, dy, inner = m.normal(rows, h), m.normal(rows, h), m.normal(rows, i)
    both, out = a.new_empty(rows, 2 * i), torch.empty_like(a)
    gate_up, down = m.normal(2 * i, h, scale=h**-0.5), m.normal(h, i, scale=i**-0.5)
    dgate_up, ddown = torch.empty_like(gate_up), torch.empty_like(down)

    def run() -> None:
        torch.mm(a, gate_up.T, out=both)
        torch.mm(inner, down.T, out=out)
        torch.mm(dy, down, out=inner)
        torch.mm(both, gate_up, out=out)
        torch.mm(both.T, a, out=dgate_up)
        torch.mm(dy.T, inner, out=ddown)

    return run


def least(mixture: Mixture) -> dict[str, int]:
    """The work of a row, of the kind that its floor is made of."""
    t, e, k, h, i = mixture.sizes
    return {"bytes": 3 * e * 3 * i * h * 2} if mixture.by_weights else {"flops": 2 * 3 * t * k * 3 * i * h}


# --- gate -------------------------------------------------------------------------------------------------------------------------------


class Truth:
    """Value and gradients in fp64 of one mixture with its small sizes, to compare providers with."""

    def __init__(self, mixture: Mixture, skewed: bool, device: torch.device) -> None:
        self.sample = Sample(cases.TABLES[OP], Case(mixture.label, make(*mixture.small, skewed)), BF16, device)
        (y,), grads = self.sample.truth()
        self.found = {"y": y.float(), **{f"d{k}": g.float() for k, g in zip(self.sample.wrt, grads, strict=True)}}

    def wrong(self, fn: measure.Fn) -> str:
        """What `fn` has wrong, by how much; empty if nothing."""
        (y,), grads = gradients(self.sample.f(fn), self.sample.tensors, self.sample.cots)
        off = {k: error(t, true) for (k, true), t in zip(self.found.items(), (y, *grads), strict=True)}
        return ", ".join(f"{k} is off by {e:.2g}" for k, e in off.items() if not e <= WRONG)


# --- figures ----------------------------------------------------------------------------------------------------------------------------


def speed(run: Run, mixture: Mixture, tuning: bool = False) -> list[Row]:
    """Every provider at one shape, or those that tune themselves; and with skewed routing, how much longer each takes."""
    run.gate(bench(mixture))
    if mixture.by_weights:
        assert run.limits["copy_gbs"]  # measured while there is nothing else in memory
    if tuning and run.device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        compile_ahead(mixture.sizes[1:])
    balanced, *skewed = (_beside(run, mixture, s, tuning) for s in mixture.routings)
    us = {r.provider: r.us for r in balanced}
    for rows in skewed:
        balanced += [replace(r, over_balanced=_ratio(r.us, us[r.provider])) for r in rows]
    now = {r.key for r in balanced}
    run.rows[:] = [*(r for r in run.rows if r.key not in now), *balanced]
    return balanced


def _beside(run: Run, mixture: Mixture, skewed: bool, tuning: bool) -> list[Row]:
    """What was measured of this shape before, and what is measured now; ours too, if it was not."""
    before = [r for r in run.rows if r.key[:3] == (OP, mixture.label, mode(skewed))]
    names = [p for p in mixture.names(skewed) if (p in TUNING) == tuning]
    if OURS not in (*names, *(r.provider for r in before)):
        names.insert(0, OURS)
    return compared([*before, *_rows(run, mixture, skewed, names)])


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _rows(run: Run, mixture: Mixture, skewed: bool, names: Sequence[str]) -> list[Row]:
    found = peers.experts(run.device)
    truth = Truth(mixture, skewed, run.device)
    run._free()
    args = run._arguments(bench(mixture), (*mixture.sizes, skewed))
    floor = None if mixture.by_weights else products(mixture, run.device)
    rows = [_row(run, mixture, skewed, name, found[name], truth, args, floor) for name in names if name in found]
    del truth, args, floor
    run._free()
    return rows


def _row(
    run: Run, mixture: Mixture, skewed: bool, name: str, fn: measure.Fn, truth: Truth, args: tuple[Tensor, ...], floor: measure.Run | None
) -> Row:
    row = Row(OP, mixture.label, mode(skewed), name, None, **least(mixture), note=peers.NOTES.get((name, OP), ""))

    def figures() -> Figures:
        call = measure.forward_backward(fn, args)
        call()  # what tunes itself does so at the sizes that are timed
        if wrong := truth.wrong(fn):
            raise Wrong(wrong)
        floor_us = row.bytes / run.limits["copy_gbs"] / 1e3 if floor is None else _us(run, floor, True).us
        mib = measure.peak_mib(call, run.device)
        run._free()  # the largest gradients are a third of a GPU's memory, and what is timed has a stream of its own
        timed = _us(run, call, name in MINE)
        return {"us": timed.us, "by_events": timed.by_events, "floor_us": floor_us, "mib": mib}

    try:
        return run.attempt(row, figures)
    except Wrong as wrong:  # ours: a peer's ends its own row
        run.gates[OP] = f"{name}: {wrong}"
        raise Red(f"{OP}: no figures, its gate is red: {run.gates[OP]}") from wrong


class Wrong(AssertionError):
    """A provider does not compute what the function is."""


def _us(run: Run, call: measure.Run, must_capture: bool) -> measure.Timed:
    return measure.device_us(call, run.device, must_capture=must_capture, replays=REPLAYS)
