"""The heads: linear cross entropy against the matrix products that it is made of, at the sizes of real models.

A row's floor is three products of its shape (two where the weight is frozen, one without gradients), by cuBLAS into buffers that are there.
They are timed in turns with the provider, since a long run heats a GPU and slows both; and between events around plain calls, since a call
that is captured in a graph keeps the rows whose target is ignored. Workspace is the peak over the inputs and the gradients themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tests.cases import BF16, Maker

from . import measure, peers, table
from .measure import MIB
from .peers import CCE, COMPILE, EAGER, EXACT, EXACT_64, FP32, LIGER, LIGER_FP32, MINE, NATIVE, OURS, RECOMPUTE, WEIGHT, WEIGHT_64
from .results import GREEN, Row
from .run import Figures, Red, Run, _failure, compared
from .table import HEAD_BOTH, HEAD_ERRORS, HEAD_FORWARD, HEAD_FROZEN, HEAD_HALF, HEAD_SWEEP, Sizes

OP = "linear_cross_entropy"
SHAPES: tuple[Sizes, ...] = (  # tokens, hidden, vocabulary
    (8192, 4096, 128256),
    (16384, 4096, 128256),
    (16384, 2048, 128256),
    (32768, 2304, 256000),
    (16384, 2048, 32000),
)
TINY: tuple[Sizes, ...] = ((4, 32, 100), (6, 16, 96))
TOKENS, WIDTH = tuple(4**i * 1024 for i in range(5)), (2048, 128256)
TINY_TOKENS, TINY_WIDTH = (2, 4), (16, 96)
MOST_COMPILED = 16384, 2**31  # rows along tokens; logits of a shape: the compiler's code keeps them all
TURNS = 5
GATE_ROWS = 2500  # several chunks, and room for all of their logits in fp64
LOGITS = 2**34  # bytes that the products' buffer may take: of more rows, a part is timed
COMPARED_ROWS, COMPARED_CLASSES, SLICE = 256, 512, 1024  # of dx, of dweight, and rows at a time in fp64


@dataclass(frozen=True)
class Question:
    """What is asked of a head, and how many products that takes."""

    mode: str
    products: int = 3
    half: bool = False  # of the targets are ignored
    gradients: tuple[bool, bool] = (True, True)  # of x, of the weight


WHOLE, HALF = Question(HEAD_BOTH), Question(HEAD_HALF, half=True)
ALONE, FROZEN = Question(HEAD_FORWARD, 1, gradients=(False, False)), Question(HEAD_FROZEN, 2, gradients=(True, False))
# At the first shape, besides what `asked` names.
OPTIONS: tuple[tuple[Question, tuple[str, ...]], ...] = (
    (WHOLE, (RECOMPUTE, WEIGHT_64, EXACT_64)),
    (HALF, (OURS, WEIGHT, COMPILE, LIGER, LIGER_FP32, CCE)),
    (ALONE, (OURS, LIGER, CCE)),
    (FROZEN, (OURS, LIGER, CCE)),
)
ERRORS = (OURS, WEIGHT, FP32, EXACT, EAGER, COMPILE, LIGER, LIGER_FP32, CCE)


def shapes(device: torch.device) -> tuple[Sizes, ...]:
    """What is measured on `device`: without a GPU only that the harness works."""
    return SHAPES if device.type == "cuda" else TINY


def tokens(device: torch.device) -> tuple[int, ...]:
    return TOKENS if device.type == "cuda" else TINY_TOKENS


def label(sizes: Sizes) -> str:
    return "x".join(map(str, sizes))


def asked(sizes: Sizes) -> tuple[str, ...]:
    """The providers that are measured at a shape."""
    eager = (EAGER,) if sizes in (SHAPES[0], SHAPES[-1], *TINY) else ()
    compiled = (COMPILE,) if sizes[0] * sizes[2] <= MOST_COMPILED[1] else ()
    return OURS, WEIGHT, FP32, EXACT, *eager, *compiled, NATIVE, LIGER, LIGER_FP32, CCE


def asked_by_tokens(n: int) -> tuple[str, ...]:
    return OURS, WEIGHT, EXACT, *((COMPILE,) if n <= MOST_COMPILED[0] else ()), LIGER


def keys() -> set[tuple[str, str, str, str]]:
    """Of all rows that a run on a GPU with every library can have, but those by tokens and those of errors."""
    found = {(OP, label(sizes), HEAD_BOTH, provider) for sizes in SHAPES for provider in asked(sizes)}
    return found | {(OP, label(SHAPES[0]), question.mode, provider) for question, names in OPTIONS for provider in names}


# --- what is timed ----------------------------------------------------------------------------------------------------------------------


def inputs(device: torch.device, sizes: Sizes, question: Question = WHOLE) -> tuple[Tensor, Tensor, Tensor]:
    """x, the weight and the targets; every other target is ignored where half of them are."""
    n, h, v = sizes
    m = Maker(device, BF16)
    x, weight = m.normal(n, h), m.normal(v, h, scale=h**-0.5)
    target = m.targets(n, classes=v, every=2 if question.half else 0)
    return x.requires_grad_(question.gradients[0]), weight.requires_grad_(question.gradients[1]), target


def products(x: Tensor, weight: Tensor, count: int) -> tuple[measure.Run, float]:
    """The matrix products of a head, of as many rows as LOGITS has room for; and how often those rows are in all."""
    x, weight = x.detach(), weight.detach()
    v = weight.shape[0]
    n = len(x)
    while n > 1 and n * v * weight.element_size() > LOGITS:
        n //= 2
    some, logits = x[:n], weight.new_empty(n, v)
    dx = torch.empty_like(some) if count > 1 else None
    dweight = torch.empty_like(weight) if count > 2 else None

    def run() -> None:
        torch.mm(some, weight.T, out=logits)
        if dx is not None:
            torch.mm(logits, weight, out=dx)
        if dweight is not None:
            torch.mm(logits.T, some, out=dweight)

    return run, len(x) / n


def in_turns(runs: Sequence[measure.Run], device: torch.device, turns: int = TURNS) -> list[float]:
    """Microseconds of each, the median over turns: the first, the second, the first again, and so on."""
    turns = turns if device.type == "cuda" else 2
    found = [[_once(run, device) for run in runs] for _ in range(turns)]
    return [median(each) for each in zip(*found, strict=True)]


def _once(run: measure.Run, device: torch.device) -> float:
    if device.type != "cuda":
        return measure._seconds(run, 1) * 1e6
    return measure._times(run, measure._nothing, 1, by_events=True)[0] * 1e3


def _with_gradients(fn: measure.Fn, args: tuple[Tensor, ...]) -> measure.Run:
    """As in `measure`, but that no call comes without gradients: it would be compiled too, for nothing."""
    wanted = [t for t in args if t.requires_grad]
    return lambda: torch.autograd.grad(fn(*args), wanted)


def gate(run: Run) -> None:
    """The function's gate at each width that is measured here, and at the last one each way to sum the weight's gradient."""
    bench = replace(next(b for b in table.ALL if b.op == OP), sizes=SHAPES, gate_rows=GATE_ROWS)
    run.gate(bench)
    small = bench.gate_sizes(table.sizes(bench, run.device)[-1])
    for how in ("fp32", "exact"):
        key = f"{OP} {how}", small
        if key in run._judged:
            continue
        try:
            run._judge(replace(bench, options=_accumulate(how)), small)
        except Exception as wrong:
            run.gates[OP] = " ".join(f"accumulate={how}: {type(wrong).__name__}: {wrong}".split())
            raise Red(f"{OP}: no figures, its gate is red: {run.gates[OP]}") from wrong
        run._judged.add(key)
        run._free()
    assert run.gates[OP] == GREEN


def _accumulate(how: str) -> Any:
    return lambda *sizes: {"accumulate": how}


def _rows(run: Run, sizes: Sizes, question: Question, names: Iterable[str], turns: int = TURNS) -> list[Row]:
    """Time over the products' and workspace of those providers of `names` that there are."""
    gate(run)
    found = peers.heads(run.device)
    args = inputs(run.device, sizes, question)
    floor, times = products(*args[:2], question.products)
    rows = [_row(run, sizes, question, name, found[name], args, floor, times, turns) for name in names if name in found]
    del args, floor
    run._free()
    return rows


def _row(
    run: Run, sizes: Sizes, question: Question, name: str, fn: measure.Fn, args: tuple[Tensor, ...], floor: measure.Run, times: float,
    turns: int,
) -> Row:  # fmt: skip
    n, h, v = sizes

    def figures() -> Figures:
        call = _with_gradients(fn, args) if any(question.gradients) else measure.forward(fn, args)
        peak = measure.peak_mib(call, run.device)
        floor_us, us = in_turns((floor, call), run.device, turns)
        gradients = sum(t.numel() * t.element_size() for t in args if t.requires_grad) / MIB
        return {"us": us, "floor_us": floor_us * times, "mib": None if peak is None else peak - gradients}

    return run.attempt(Row(OP, label(sizes), question.mode, name, None, flops=2 * n * h * v * question.products), figures)


# --- figures ----------------------------------------------------------------------------------------------------------------------------


def speed(run: Run, sizes: Sizes) -> list[Row]:
    """Every provider at one shape; beside a peer's figures, how ours by itself compares."""
    return _add(run, compared(_rows(run, sizes, WHOLE, asked(sizes))))


def options(run: Run) -> list[Row]:
    """At the first shape: what is skipped where it is not wanted, and what less memory costs."""
    return _add(run, [r for question, names in OPTIONS for r in _rows(run, shapes(run.device)[0], question, names)])


def by_tokens(run: Run, n: int) -> list[Row]:
    """Time and workspace at one number of tokens of many, for the plot."""
    sizes = (n, *(WIDTH if run.device.type == "cuda" else TINY_WIDTH))
    turns = max(3, min(9, 2**16 // n))
    rows = _rows(run, sizes, WHOLE, asked_by_tokens(n), turns)
    return _add(run, [replace(r, mode=HEAD_SWEEP, size=n) for r in rows])


def _add(run: Run, rows: list[Row]) -> list[Row]:
    run.rows += rows
    return rows


# --- errors -----------------------------------------------------------------------------------------------------------------------------


def truth(x: Tensor, weight: Tensor, target: Tensor) -> dict[str, Tensor]:
    """In fp64, some rows at a time: the mean loss, its gradients of the first rows of x and the weight, and what is known of each row."""
    x, weight, n = x.detach().double(), weight.detach().double(), len(x)
    dx, dweight = x.new_zeros(min(n, COMPARED_ROWS), x.shape[1]), torch.zeros_like(weight[:COMPARED_CLASSES])
    lse, log_prob = x.new_empty(n), x.new_empty(n)
    for i in range(0, n, SLICE):
        at = slice(i, i + SLICE)
        a, y = x[at] @ weight.T, target[at, None]
        lse[at] = a.logsumexp(-1)
        log_prob[at] = a.gather(1, y).squeeze(1) - lse[at]
        g = a.sub_(lse[at, None]).exp_()
        g.scatter_add_(1, y, torch.full_like(y, -1, dtype=g.dtype)).div_(n)
        dweight += g[:, : len(dweight)].T @ x[at]
        if i < len(dx):
            dx[at] = g[: len(dx) - i] @ weight
    return {"loss": -log_prob.mean(), "dx": dx, "dweight": dweight, "lse": lse, "log_prob": log_prob}


def errors(run: Run) -> list[Row]:
    """How far each provider's results are from fp64, at the first shape."""
    gate(run)
    sizes = shapes(run.device)[0]
    x, weight, target = inputs(run.device, sizes)
    true = truth(x, weight, target)
    every, of_rows, added = peers.heads(run.device), peers.head_rows(run.device), []
    for name in (p for p in ERRORS if p in every):
        row = Row(OP, label(sizes), HEAD_ERRORS, name, None)
        try:
            loss = every[name](x, weight, target)
            dx, dweight = torch.autograd.grad(loss, (x, weight))
            found = {"loss": loss, "dx": dx[: len(true["dx"])], "dweight": dweight[: len(true["dweight"])]}
            with torch.no_grad():
                found["lse"], found["log_prob"] = of_rows[name](x.detach(), weight.detach(), target)
            added.append(replace(row, errors={k: error(t, true[k]) for k, t in found.items() if t is not None}))
            del loss, dx, dweight, found
        except Exception as failed:
            if name in MINE:
                raise
            added.append(replace(row, note=_failure(failed)))
        run._free()
    return _add(run, added)


def error(found: Tensor, true: Tensor) -> float:
    """‖found − true‖ ÷ ‖true‖, to three digits."""
    return float(f"{float((found.detach().double() - true).norm() / true.norm()):.2e}")
