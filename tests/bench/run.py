"""One run of the benchmarks: a function's gate first, then its figures."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch

from tests import cases
from tests.cases import BF16, Case, Maker
from tests.numerics import assert_near
from tests.sample import Sample

from . import measure, peers, table
from .peers import DONATE, MINE, OURS
from .results import GREEN, Result, Row, machine
from .table import BOTH, FORWARD, HOST, MODES, SWEEP, Bench, Sizes, Sweep

Figures = dict[str, Any]  # of a row, by name


class Red(AssertionError):
    """A function does not compute what it should, so nobody is told how fast it does."""


class Run:
    """The figures measured so far on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rows: list[Row] = []
        self.gates: dict[str, str] = {}
        self._judged: set[tuple[str, Sizes]] = set()

    @cached_property
    def limits(self) -> dict[str, float]:
        copies = {"copy_gbs": measure.copy_gbs(self.device), "small_copy_gbs": measure.copy_gbs(self.device, measure.SMALL)}
        return copies | {"matmul_tflops": measure.matmul_tflops(self.device)}

    @cached_property
    def machine(self) -> dict[str, str]:
        return machine(self.device)

    def result(self) -> Result:
        return Result(self.machine, self.limits if "limits" in vars(self) else {}, self.gates, self.rows)

    # --- gate ---------------------------------------------------------------------------------------------------------------------------

    def gate(self, bench: Bench, sweep: Sweep | None = None) -> None:
        """Value and gradients against fp64 at each width that is measured; raises `Red`, again and again, where the rule does not hold."""
        try:
            for sizes in table.sizes(sweep or bench, self.device):
                small = bench.gate_sizes(sizes)
                if self.gates.get(bench.op, GREEN) == GREEN and (bench.op, small) not in self._judged:
                    self._judge(bench, small)
                    self._judged.add((bench.op, small))
            self.gates.setdefault(bench.op, GREEN)
        except Exception as wrong:
            self.gates[bench.op] = " ".join(f"{type(wrong).__name__}: {wrong}".split())
        self._free()
        if self.gates[bench.op] != GREEN:
            raise Red(f"{bench.op}: no figures, its gate is red: {self.gates[bench.op]}")

    def _judge(self, bench: Bench, sizes: Sizes) -> None:
        case, table_of_op = Case(bench.shape(sizes), bench.make(*sizes), bench.options(*sizes)), cases.TABLES.get(bench.op)
        if table_of_op is None:
            raise LookupError(f"tests.cases has no table of {bench.op}; add one")
        values = []
        for seed in range(bench.draws):
            s = Sample(table_of_op, case, BF16, self.device, seed)
            parts = s.ours(), s.naive(), s.truth()
            values.append([part[0] for part in parts])
            for i, k in enumerate(s.wrt):
                ours, naive, truth = (part[1][i] for part in parts)
                assert_near(ours, naive, truth, f"{bench.op} {case.name}, gradient of {k}")
            del parts, ours, naive, truth  # a head's are gigabytes
        for i in range(len(values[0][0])):
            ours, naive, truth = (torch.stack([v[who][i] for v in values]) for who in range(3))
            assert_near(ours, naive, truth, f"{bench.op} {case.name}, value {i}")

    # --- device -------------------------------------------------------------------------------------------------------------------------

    def speed(self, bench: Bench, sizes: Sizes) -> list[Row]:
        """Time and memory of each provider, forward alone and with the backward; donating says something of the latter only."""
        self.gate(bench)
        each = peers.providers(bench.op, self.device).items()
        added = [self._device(bench, sizes, mode, p, fn) for p, fn in each for mode in MODES if (p, mode) != (DONATE, FORWARD)]
        self.rows += added
        return added

    def sweep(self, sweep: Sweep, sizes: Sizes) -> list[Row]:
        """Time and memory of forward and backward at one size of many, for plots: from fewer replays."""
        bench = sweep.bench
        self.gate(bench, sweep)
        found = peers.for_sweep(bench.op, self.device).items()
        added = [replace(self._device(bench, sizes, BOTH, *each, replays=(10, 50)), mode=SWEEP, size=sizes[sweep.at]) for each in found]
        self.rows += added
        return added

    def _device(
        self, bench: Bench, sizes: Sizes, mode: str, provider: str, fn: measure.Fn, replays: tuple[int, int] = measure.REPLAYS
    ) -> Row:
        moved, flops = bench.least_bytes(sizes, mode), bench.least_flops(sizes, mode)
        floor = moved / self.limits["copy_gbs"] / 1e3 + flops / self.limits["matmul_tflops"] / 1e6
        note = peers.NOTES.get((provider, bench.op), "")
        row = Row(bench.op, bench.shape(sizes), mode, provider, None, moved, flops, floor, note=note)
        make = measure.forward if mode == FORWARD else measure.forward_backward

        def figures() -> Figures:
            args, renew = self._arguments(bench, sizes), None
            if mode == BOTH and (provider, bench.op) in peers.OVERWRITES:
                args, renew = measure.renewable(args)
            call = make(partial(fn, **bench.options(*sizes)), args)
            mib = measure.peak_mib(call, self.device)
            timed = measure.device_us(call, self.device, renew=renew, must_capture=provider in MINE, replays=replays)
            return {"mib": mib, "us": timed.us, "by_events": timed.by_events}

        return self.attempt(row, figures)

    def attempt(self, row: Row, figures: Callable[[], Figures]) -> Row:
        """`row` with its figures; or with what was in the way: too little memory, or a peer's fault, which ends its own row only."""
        try:
            return replace(row, **figures())
        except torch.OutOfMemoryError:
            return replace(row, note="out of memory")
        except Exception as failed:
            if row.provider in MINE:
                raise
            return replace(row, note=_failure(failed))
        finally:
            self._free()

    def _arguments(self, bench: Bench, sizes: Sizes) -> tuple[Any, ...]:
        inputs, diff = bench.make(*sizes)(Maker(self.device, BF16)), cases.TABLES[bench.op].diff
        return tuple(t if t is None or k not in diff else t.detach().requires_grad_() for k, t in inputs.items())

    def _free(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    # --- host ---------------------------------------------------------------------------------------------------------------------------

    def host(self, bench: Bench, pairs: int = 60, turns: int = 25) -> list[Row]:
        """What a call and its backward cost the host, on a tensor so small that the device never falls behind."""
        self.gate(bench)
        if self.device.type != "cuda":
            pairs, turns = 2, 1
        added, shape = [], bench.shape(bench.tiny)
        for provider in peers.uncompiled(bench.op, self.device):
            if provider != OURS:
                try:
                    cost = self.host_pair(bench, provider, pairs, turns)
                except Exception as failed:
                    added.append(Row(bench.op, shape, HOST, provider, None, note=_failure(failed)))
                    continue
                if not added:
                    added.append(Row(bench.op, shape, HOST, OURS, cost.ours))
                ratio = cost.ratios[len(cost.ratios) // 2]
                added.append(Row(bench.op, shape, HOST, provider, cost.theirs, ours_over_this=ratio))
        self.rows += added
        return added

    def host_pair(self, bench: Bench, provider: str, pairs: int, turns: int) -> measure.Paired:
        """Ours against one other."""
        ours, theirs = (self.step(bench, p) for p in (OURS, provider))
        return measure.paired(ours, theirs, pairs=pairs, turns=turns)

    def step(self, bench: Bench, provider: str = OURS) -> Callable[[], Any]:
        """One call and its backward on a tiny tensor."""
        fn, options = peers.uncompiled(bench.op, self.device)[provider], bench.options(*bench.tiny)
        return measure.step(partial(fn, **options) if options else fn, self._arguments(bench, bench.tiny))


def compared(rows: list[Row]) -> list[Row]:
    """The same rows of one shape; beside a peer's figures, how ours by itself compares."""
    ours = next(r for r in rows if r.provider == OURS)

    def each(r: Row) -> Row:
        if r.provider in MINE:
            return r
        time = ours.over_floor / r.over_floor if ours.over_floor and r.over_floor else None
        return replace(r, ours_over_this=time, ours_mib_over_this=ours.mib / r.mib if ours.mib and r.mib else None)

    return [each(r) for r in rows]


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]
