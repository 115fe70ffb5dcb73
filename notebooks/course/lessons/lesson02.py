"""Checks of lesson 2: counting bytes and FLOPs. The tables are what the lesson's own figures count with."""

from __future__ import annotations

from typing import Any, NamedTuple

from course import Wrong, exercise, same
from course.exercises import Answer


class Count(NamedTuple):
    """What a function of `[N, H]` needs, for each of its numbers."""

    reads: tuple[str, str]  # arrays read in forward, and in backward
    writes: tuple[str, str]
    flops: tuple[int, int]

    def arrays(self, backward: int) -> int:
        """How many arrays pass through memory."""
        return len(self.reads[backward].split()) + len(self.writes[backward].split())


COUNTS = {
    "relu_squared": Count(("x", "dy x"), ("y", "dx"), (2, 3)),
    "rms_norm": Count(("x", "dy x"), ("y", "dx"), (4, 9)),
    "add_rms_norm": Count(("x residual", "dy dsum sum"), ("sum y", "dx"), (5, 10)),
    "swiglu": Count(("gate up", "dy gate up"), ("y", "dgate dup"), (5, 10)),
    "cross_entropy": Count(("logits", "logits"), ("", "dlogits"), (4, 3)),
}
WHICH = ("forward", "backward")


def pair(op: str, got: Any) -> tuple[Any, Any]:
    """An answer's two numbers."""
    if not (isinstance(got, tuple | list) and len(got) == 2):
        raise Wrong(f"{op}: return (forward, backward), got {got!r}")
    return got[0], got[1]


@exercise(
    "2.1",
    "the least bytes",
    hint="what is read + what is written, in arrays; times N · H · size. A backward reads dy and what forward read",
)
def least_bytes(answer: Answer) -> str | None:
    for n, h, size in ((8, 16, 2), (8192, 4096, 2), (100, 7, 4)):
        for op in ("rms_norm", "swiglu", "cross_entropy", "add_rms_norm"):
            count, one = COUNTS[op], n * h * size
            for backward, got in enumerate(pair(op, answer(op, n, h, size))):
                _bytes(op, backward, count, got / one, f"[{n}, {h}] of {size} bytes", size)
    return "Most backwards move more than their forward does: that is where a fused kernel saves most."


def _bytes(op: str, backward: int, count: Count, arrays: float, what: str, size: int) -> None:
    right = count.arrays(backward)
    if arrays == right:
        return
    reads, writes = count.reads[backward].split(), count.writes[backward].split()
    where = f"{op}, {WHICH[backward]}, {what}"
    if arrays * size == right:
        raise Wrong(f"{where}: these are numbers, not bytes: each has {size}")
    if arrays * size == right * 2 and size != 2:
        raise Wrong(f"{where}: each number has {size} bytes here, not 2: the dtype decides")
    if backward and arrays == count.arrays(0) + right:
        raise Wrong(f"{where}: that is forward and backward together; the second number is the backward alone")
    if backward and arrays == right - 1:
        forgotten = (
            "dsum, the gradient of the sum that is returned too" if op == "add_rms_norm" else "dy" if "dy" in reads else "a gradient"
        )
        raise Wrong(
            f"{where}: an array is missing. Is it {forgotten}? A backward reads the gradients that arrive and what the forward read, and writes new ones"
        )
    if arrays == right + 1 and op == "add_rms_norm" and backward:
        raise Wrong(
            f"{where}: x and residual were added, so they have the same gradient, and it is written once. And sum is read, not x and residual"
        )
    if arrays == right + 1:
        raise Wrong(f"{where}: one array too many. Read twice? A kernel that holds a row reads it once")
    lists = f"reads {', '.join(reads)}" + (f", writes {', '.join(writes)}" if writes else ", writes next to nothing")
    raise Wrong(f"{where}: that is {arrays:g} arrays, the least is {right}: it {lists}")


@exercise(
    "2.2",
    "FLOPs of a norm, a gate and a loss",
    hint="count each + − · / exp and max of the formulas; a sum over a row is one + for each number",
)
def flops_each(answer: Answer) -> str | None:
    slips = {
        ("rms_norm", 0, 3): "the sum of the squares is one addition for each number",
        ("rms_norm", 0, 2): "the squares and their sum are work, too: one · and one +",
        ("rms_norm", 1, 7): "dw is missing: dy · x̂, added up over the rows",
        ("rms_norm", 1, 8): "a sum is one + for each number: of mean(g x̂) over the row, and of dw over the rows",
        ("swiglu", 1, 6): "the backward has neither σ nor a from the forward (they were not stored): it computes them again",
        ("swiglu", 1, 7): "σ was not stored: the backward computes exp, + and / again",
        ("swiglu", 0, 4): "σ = 1 / (1 + exp(−gate)) is three: exp, + and /",
        ("cross_entropy", 0, 3): "the maximum is a comparison for each number, the sum an addition: −, exp, max, +",
        ("cross_entropy", 1, 4): "the − 1 is at the target alone: one a row, not one a number",
    }
    for op in ("rms_norm", "swiglu", "cross_entropy"):
        for backward, got in enumerate(pair(op, answer(op))):
            if (op, backward, got) in slips:
                raise Wrong(f"{op}, {WHICH[backward]}: {slips[op, backward, got]}")
            same(f"FLOPs for each number of {op}, {WHICH[backward]},", got, COUNTS[op].flops[backward])
    return "At most 2 FLOPs a byte, where an H100 could do hundreds: nothing that makes the arithmetic cheaper makes these faster."


def product_work(op: str, a: int, b: int, c: int) -> tuple[int, int]:
    """(FLOPs, bytes) in bf16 of `[a, b] [b, c]`, alone, with gradients, or as a head that keeps no `[a, c]`."""
    if op == "matmul":
        return 2 * a * b * c, 2 * (a * b + b * c + a * c)
    flops, factors = 6 * a * b * c, 2 * 3 * (a * b + b * c)
    return flops, factors + (2 * 2 * a * c if op == "matmul with gradients" else 0)


@exercise(
    "2.3",
    "FLOPs and bytes of products",
    hint="2abc FLOPs a product; with gradients three products. Each of the two factors is read, read again by the backward, and has a gradient",
)
def products(answer: Answer) -> str | None:
    for a, b, c in ((4, 8, 16), (8192, 8192, 8192), (16384, 2048, 32000), (1, 4096, 4096)):
        for op in ("matmul", "matmul with gradients", "linear_cross_entropy"):
            got = answer(op, a, b, c)
            if not (isinstance(got, tuple | list) and len(got) == 2):
                raise Wrong(f"{op}: return (flops, bytes), got {got!r}")
            _product(op, a, b, c, *got)
    return "With one row (the last case) a product has 1 FLOP a byte: it waits for the weight. With thousands it waits for nothing."


def _product(op: str, a: int, b: int, c: int, flops: float, moved: float) -> None:
    right, least = product_work(op, a, b, c)
    what = f"{op} of ({a}, {b}, {c})"
    if flops * 2 == right:
        raise Wrong(f"{what}: a multiplication and an addition are two FLOPs")
    if op != "matmul" and flops * 3 == right:
        raise Wrong(f"{what}: that is the forward alone; a gradient of each factor is one more product")
    if op != "matmul" and flops * 3 == right * 2:
        raise Wrong(f"{what}: a gradient is forgotten: both factors have one, so the backward has two products")
    same(f"the FLOPs of {what}", flops, right)
    logits = 2 * a * c
    if moved * 2 == least:
        raise Wrong(f"{what}: these are numbers, not bytes: bf16 has 2")
    if op == "linear_cross_entropy" and moved > least and (moved - least) % logits == 0:
        raise Wrong(
            f"{what}: that has the logits in it, [{a}, {c}]. They need never be in memory: each tile of them can be used where it is made"
        )
    if op == "matmul" and moved == least - logits:
        raise Wrong(f"{what}: the result is written, too")
    if op == "matmul with gradients" and moved in (least - logits, least - 2 * logits):
        raise Wrong(f"{what}: the result is written by the forward, and its gradient is read by the backward")
    if op != "matmul" and moved == least - 2 * (a * b + b * c):
        raise Wrong(
            f"{what}: a factor is read twice and a gradient written: the backward needs both factors again, each for the other's gradient"
        )
    same(f"the bytes of {what}", moved, least)


@exercise("2.4", "the floor", hint="max(bytes / (bandwidth · 1e9), flops / (compute · 1e12)), times 1e6")
def floor_us(answer: Answer) -> str | None:
    for moved, flops, bandwidth, compute in ((134e6, 1e9, 3000.0, 700.0), (1e8, 1e12, 3000.0, 700.0), (3e9, 3e11, 1500.0, 700.0)):
        memory, arithmetic = moved / bandwidth / 1e3, flops / compute / 1e6
        got = answer(moved, flops, bandwidth, compute)
        if abs(got - memory - arithmetic) < 1e-6 * got:
            raise Wrong("that is the sum: a GPU computes while it loads, so the longer of the two decides")
        right = max(memory, arithmetic)
        if abs(got - min(memory, arithmetic)) < 1e-6 * got:
            raise Wrong("that is the shorter of the two: both must be done, so the longer decides")
        if abs(got - right) > 1e-6 * right:
            raise Wrong(f"got {got:.4g} µs, expected {right:.4g}: units? GB/s are 10⁹ bytes, µs are 10⁻⁶ s, a factor of {got / right:.3g}")
    return None
