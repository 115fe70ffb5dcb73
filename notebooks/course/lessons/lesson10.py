"""Checks of lesson 10: the reader's tests, run on right functions, which they must pass, and on faulty ones, which they must catch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.gradcheck import GradcheckError

from course import DEVICE, Wrong, exercise
from course.exercises import Answer

IGNORED = -100


class Subject(NamedTuple):
    """What a test is called with, and of a faulty function what would have shown its fault."""

    name: str
    make: Callable[[], tuple[Any, ...]]
    remedy: str


def judge(test: Answer, right: Sequence[Subject], faulty: Sequence[Subject]) -> str:
    """A test is worth something if it is green on what is right and red on what is wrong: any error counts as red, as in pytest."""
    for name, make, remedy in right:
        try:
            returned = test(*make())
        except AssertionError as error:
            raise Wrong(f"your test fails {name}, which is right: {str(error) or 'its assert has no message'}. {remedy}") from error
        except GradcheckError as error:
            raise Wrong(
                f"gradcheck fails {name}, which is right: its finite differences need inputs in fp64, not fp32 (lesson 1)"
            ) from error
        if isinstance(returned, bool):
            raise Wrong(f"your test returned {returned}, which nobody reads: a test raises, by `assert`, where something is wrong")
    missed = [s for s in faulty if not _red(test, s)]
    if missed:
        lines = [f"· {s.name}: {s.remedy}" for s in missed]
        raise Wrong("\n".join([f"your test lets {len(missed)} of {len(faulty)} faults pass:", *lines]))
    return f"Green on {len(right)} right, red on {len(faulty)} faulty."


def _red(test: Answer, subject: Subject) -> bool:
    try:
        test(*subject.make())
    except NotImplementedError:
        raise
    except Exception:
        return True
    return False


# --- 10.1: bytes ------------------------------------------------------------------------------------------------------------------------


def _inputs() -> list[Tensor]:
    x = torch.randn(4, 6, device=DEVICE)
    x[0, 0], x[1, 1], x[2, 2] = torch.nan, 0.0, torch.inf
    return [x, torch.randn(6, 4, device=DEVICE).T, torch.randn(8, device=DEVICE).bfloat16()]


def _writes(write: Callable[[list[Tensor]], object]) -> Callable[[], tuple[Any, ...]]:
    """A call that writes past the version counter, as a kernel does."""

    def make() -> tuple[Any, ...]:
        tensors = _inputs()
        return lambda: write([t.data for t in tensors]), tensors

    return make


@exercise("10.1", "a test of purity", hint="clone each tensor, call, then compare t.contiguous().view(torch.uint8) with that of the clone")
def untouched(answer: Answer) -> str | None:
    nan = "NaN is not equal to itself as a number; its bytes are."
    return judge(
        answer,
        [Subject("a call that writes nothing, where an input holds NaN", _writes(lambda ts: [t + 1 for t in ts]), nan)],
        [
            Subject("the first tensor is zeroed", _writes(lambda ts: ts[0].zero_()), "a kernel leaves t._version as it was; keep a clone."),
            Subject("the last tensor is scaled", _writes(lambda ts: ts[-1].mul_(2)), "look at every tensor."),
            Subject("two rows are exchanged", _writes(lambda ts: ts[1].copy_(ts[1].flip(0))), "sums do not see an exchange."),
            Subject("0 becomes −0", _writes(lambda ts: ts[0][1, 1].fill_(-0.0)), "−0 equals 0 as a number; compare bytes."),
            Subject("NaN becomes 0", _writes(lambda ts: ts[0].nan_to_num_(0.0, torch.inf)), "a comparison that forgives NaN sees nothing."),
        ],
    )


# --- 10.2: cotangents -------------------------------------------------------------------------------------------------------------------


def gradients(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(gate)
    return dy * up * s * (1 + gate * (1 - s)), dy * gate * s


def as_memory(t: Tensor) -> Tensor:
    """What a kernel reads that takes `t` for contiguous: one element after the other; 7 stands for what lies beyond its memory."""
    stored = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())[t.storage_offset() :][: t.numel()]
    return F.pad(stored, (0, t.numel() - stored.numel()), value=7.0).view(t.shape)


def swiglu(bwd: Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor | None, ...]]) -> Callable[[], tuple[Any, ...]]:
    """SwiGLU with the backward `bwd(ctx, gate, up, dy)`."""

    class Swiglu(Function):
        @staticmethod
        def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
            ctx.save_for_backward(gate, up)
            ctx.kept = gradients(gate, up, torch.ones_like(gate))
            return F.silu(gate) * up

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            grads = bwd(ctx, *(t.detach() for t in ctx.saved_tensors), dy)
            return tuple(g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=True))

    return lambda: (Swiglu.apply,)


def _overwrites(ctx: Any, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    grads = gradients(gate, up, dy)
    for t, g in zip((gate, up), grads, strict=True):
        t.data.copy_(g)
    return grads


def _scales_what_it_kept(ctx: Any, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    return tuple(g.mul_(dy).clone() for g in ctx.kept)


def _only_where_gate_needs_it(ctx: Any, gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
    return gradients(gate, up, dy) if ctx.needs_input_grad[0] else (None, None)


@exercise("10.2", "a test of a backward", hint="grad(y, leaves, dy, retain_graph=True) for several dy, twice each; then with gate frozen")
def backward(answer: Answer) -> str | None:
    right = swiglu(lambda ctx, gate, up, dy: gradients(gate, up, dy))
    ignores = swiglu(lambda ctx, gate, up, dy: gradients(gate, up, torch.ones_like(dy)))
    no_expanded = swiglu(lambda ctx, gate, up, dy: gradients(gate, up, as_memory(dy) if 0 in dy.stride() else dy))
    no_transposed = swiglu(lambda ctx, gate, up, dy: gradients(gate, up, dy if 0 in dy.stride() else as_memory(dy)))
    return judge(
        answer,
        [Subject("SwiGLU", right, "Is the truth that of the same cotangent? Allow for rounding: torch.allclose.")],
        [
            Subject("dy is ignored", ignores, "send a cotangent that is not 1."),
            Subject("scaled in place", swiglu(_scales_what_it_kept), "a second backward through the same graph, dy not 1."),
            Subject("gate and up are overwritten", swiglu(_overwrites), "compare the second backward too, or the inputs' bytes."),
            Subject("an expanded dy is read as dense", no_expanded, "send what `.sum().backward()` sends: strides (0, 0)."),
            Subject("a transposed dy is read as rows", no_transposed, "send dy.T.contiguous().T."),
            Subject("a frozen gate leaves up without gradient", swiglu(_only_where_gate_needs_it), "ask for up's gradient alone."),
        ],
    )


# --- 10.3: offsets ----------------------------------------------------------------------------------------------------------------------


def int32(n: int) -> int:
    """`n` as 32 bits hold it."""
    return (n + 2**31) % 2**32 - 2**31


@exercise(
    "10.3", "a test of offsets", hint="row * stride + column for small numbers, past 2**31, past 2**32, and at an odd offset past 2**24"
)
def offsets(answer: Answer) -> str | None:
    def of(offset: Callable[[int, int, int], int]) -> Callable[[], tuple[Any, ...]]:
        return lambda: (offset,)

    return judge(
        answer,
        [Subject("64-bit offsets", of(lambda row, column, stride: row * stride + column), "Python's own integers never overflow.")],
        [
            Subject("32 bits", of(lambda r, c, s: int32(r * s + c)), "a row times a stride past 2**31."),
            Subject("widened after the product", of(lambda r, c, s: int32(r * s) + c), "a row times a stride past 2**31."),
            Subject("32 bits without sign", of(lambda r, c, s: (r * s + c) % 2**32), "2**31 fits there: go past 2**32."),
            Subject("fp32", of(lambda r, c, s: int(torch.tensor(r * s + c, dtype=torch.float32))), "an odd offset past 2**24 has no fp32."),
            Subject("row and column exchanged", of(lambda r, c, s: c * s + r), "two that differ, and a stride that is not 1."),
        ],
    )


# --- 10.4: numbers ----------------------------------------------------------------------------------------------------------------------


def _dweight(x: Tensor, dy: Tensor) -> Tensor:
    return (x.float() * dy.float()).sum(0)


def _in_bf16(x: Tensor, dy: Tensor) -> Tensor:
    total = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
    for a, b in zip(x.split(16), dy.split(16), strict=True):
        total += _dweight(a, b).to(x.dtype)
    return total


def _loses_a_remainder(x: Tensor, dy: Tensor) -> Tensor:
    n = len(x) // 16 * 16
    return _dweight(x[:n], dy[:n])


def _one_is_nan(x: Tensor, dy: Tensor) -> Tensor:
    out = _dweight(x, dy)
    out[-1] = torch.nan
    return out


@exercise(
    "10.4", "a test of numbers", hint="truth in fp64, naive in bf16; assert norm(ours − truth) <= norm(naive − truth) + 2**−8 norm(truth)"
)
def numbers(answer: Answer) -> str | None:
    def of(fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], tuple[Any, ...]]:
        return lambda: (lambda x, dy: fn(x, dy).to(x.dtype),)

    return judge(
        answer,
        [
            Subject(
                "a sum in fp32, rounded once", of(_dweight), "The truth is of the same bf16 inputs, widened; one rounding is up to 2**−8."
            )
        ],
        [
            Subject("the running sum is bf16", of(_in_bf16), "16 rows a chunk: thousands of rows, and no tolerance beyond the rule's."),
            Subject("2% too large", of(lambda x, dy: 1.02 * _dweight(x, dy)), "a tolerance of 0.2 hides it: take the rule."),
            Subject(
                "the last rows are lost",
                of(_loses_a_remainder),
                "a number of rows that 16 does not divide, with both signs, so that a lost row does not drown.",
            ),
            Subject("one element is NaN", of(_one_is_nan), "`error > allowed` is False of NaN: write `assert error <= allowed`."),
        ],
    )


# --- 10.5: edges ------------------------------------------------------------------------------------------------------------------------


def cross_entropy(fault: str = "") -> Callable[[], tuple[Any, ...]]:
    """A loss of rows with targets, right or with one fault."""

    def loss(logits: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        counted = target != IGNORED
        wrong = counted & ((target < 0) | (target >= logits.shape[-1]))
        if fault != "range" and bool(wrong.any()):
            raise ValueError(f"targets must be in [0, {logits.shape[-1]}) or {IGNORED}")
        rows = F.cross_entropy(logits, target.clamp(0, logits.shape[-1] - 1), reduction="none")
        rows = rows if fault == "leak" else torch.where(counted, rows, 0.0)
        if reduction == "none":
            return rows.detach() + (rows.sum() - rows.sum().detach()) / len(rows) if fault == "none" else rows
        if reduction == "sum":
            return rows.sum()
        count = torch.tensor(float(len(rows))) if fault == "count" else counted.sum()
        return rows.sum() / (count if fault == "empty" else count.clamp(min=1))

    return lambda: (loss,)


@exercise(
    "10.5",
    "a test of edges",
    hint="some ignored; all ignored (loss and gradient 0); a target of V (an error); 'none' with a cotangent a row",
)
def edges(answer: Answer) -> str | None:
    return judge(
        answer,
        [Subject("a loss", cross_entropy(), "All ignored: loss and gradient are 0. A target of V: ValueError, which your test expects.")],
        [
            Subject("all ignored gives NaN", cross_entropy("empty"), "a batch whose targets are all −100."),
            Subject("the mean divides by all rows", cross_entropy("count"), "some targets −100, and PyTorch's loss beside it."),
            Subject("a target of V gives a number", cross_entropy("range"), "it must raise; try / except / else, or a flag."),
            Subject("ignored rows are counted", cross_entropy("leak"), "some targets −100, and each row's loss or gradient."),
            Subject("one cotangent for all rows", cross_entropy("none"), 'reduction="none" with a cotangent that differs from row to row.'),
        ],
    )
