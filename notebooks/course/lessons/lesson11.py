"""Checks of lesson 11: the kernel's numbers by running it, its loads by compiling it for an H100."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course import DEVICE, Wrong, exercise, near
from course.exercises import Answer
from course.offline import Compiled, compiled, job, kernel_of

THREADS = 256  # of the programs that are compiled: 8 warps
BLOCK = 4096
WIDEN = "Is what you load widened, `.to(tl.float32)`, before it is squared? A sum in bf16 keeps 8 bits."


def apart(rows: Tensor, stride: int, beyond: float) -> Tensor:
    """The same rows, `stride` elements apart in memory, with `beyond` between them."""
    room = torch.full((len(rows), stride), beyond, dtype=rows.dtype, device=DEVICE)
    room[:, : rows.shape[1]] = rows
    return room[:, : rows.shape[1]]


def machine_code(answer: Answer, *constants: dict[str, Any]) -> list[Compiled]:
    """The reader's kernel, compiled for rows of 4096 in bf16, with each of `constants`."""
    try:
        kernel = kernel_of(answer)
        return compiled(*[job(kernel, warps=THREADS // 32, fp32=("r_ptr",), BLOCK=BLOCK, **more) for more in constants])
    except KeyError as error:
        raise Wrong(f"keep the names of the kernel's arguments: the check compiles it by them, and found no {error}") from None
    except RuntimeError as error:
        raise Wrong(f"the numbers are right, but it is no kernel for a GPU: {error}") from None


def loaded(use: Compiled) -> int:
    """Bytes that a program loads, by the text of its machine code."""
    return sum(bits * n for bits, n in use.loads.items()) // 8 * THREADS


@exercise("11.1", "a row read once", hint="one block as wide as the row: load x and w, r from tl.sum(x * x, 0) / H + eps, store y and r")
def one_pass(answer: Answer) -> str | None:
    eps = 1e-3
    rows = {
        "five rows of 300": torch.randn(5, 300),
        "one row of one column": torch.randn(1, 1),
        "rows of zeros": torch.zeros(2, 64),
        "rows around 3000": 3000 + torch.randn(3, 50),
    }
    for name, values in rows.items():
        h = values.shape[1]
        for stride, where in ((h, ""), (h + 7, ", 7 elements apart")):
            x, w = apart(values.to(DEVICE), stride, beyond=1e9), torch.rand(h, device=DEVICE) + 0.5
            y, r = answer(x, w, eps)
            squares = values.double().square()
            truth = torch.rsqrt(squares.mean(1) + eps)
            _explain(r, squares, h, eps, stride)
            near(f"r of {name}{where}", r, truth, rounding=8)
            near(f"y of {name}{where}", y, values.double() * truth[:, None] * w.cpu().double(), rounding=8)
    half = torch.randn(4, 96, device=DEVICE).bfloat16()
    y, _ = answer(half, torch.ones(96, device=DEVICE).bfloat16(), eps)
    near("y of bf16", y, half.cpu().double() * torch.rsqrt(half.cpu().double().square().mean(1, keepdim=True) + eps), rounding=2, why=WIDEN)

    (use,) = machine_code(answer, {})
    least = 2 * 2 * BLOCK
    if loaded(use) > least:
        times = (loaded(use) - 2 * BLOCK) / (2 * BLOCK)
        raise Wrong(
            f"the numbers are right, but compiled for an H100 a program loads {loaded(use):,} bytes: the row {times:g} times and the weight once. "
            "Load it once, and keep what you loaded"
        )
    if use.loads.get(128, 0) * 16 * THREADS < least:
        raise Wrong(f"the numbers are right, but its loads are narrow: {_words(use.loads)} a thread. Say the mask as `col < H`")
    return f"Compiled: {use.loads[128]} loads of 128 bits a thread, {use.registers} registers, nothing read twice."


def _explain(r: object, squares: Tensor, h: int, eps: float, stride: int) -> None:
    """Wrong divisors of the mean, and what lies beyond the row, by their names."""
    if not isinstance(r, Tensor) or r.shape != squares.shape[:1]:
        return
    got = r.detach().cpu().double()
    block = 1 << (h - 1).bit_length()
    likely = {
        "the squares are summed, not averaged: divide by H": torch.rsqrt(squares.sum(1) + eps),
        "the mean divides by the block, not by H: columns beyond the row do not count": torch.rsqrt(squares.sum(1) / block + eps),
        "eps is missing: a row of zeros has no r": torch.rsqrt(squares.mean(1)),
    }
    right = torch.rsqrt(squares.mean(1) + eps)
    for words, value in likely.items():
        if not torch.allclose(value, right, rtol=1e-5) and torch.allclose(got, value, rtol=1e-4):
            raise Wrong(words)
    if stride > h and len(got) > 1 and abs(got[0] / right[0] - 1) < 1e-4 and not torch.allclose(got[1:], right[1:], rtol=1e-4):
        raise Wrong(f"the first row is right, the next are not: rows of x are x.stride(0) = {stride} apart here, where H is {h}")
    if stride > h and bool((got < 1e-3 * right).all()):
        raise Wrong("r is far too small: columns beyond the row were read (a mask is missing?)")


@exercise(
    "11.2",
    "wide loads",
    hint="if EVEN: write stride and H as multiples of 16, `n // 16 * 16`: the same numbers, and the compiler can see what divides them",
)
def wide_loads(answer: Answer) -> str | None:
    for h, stride in ((300, 300), (64, 64), (64, 70), (41, 48), (1, 1), (304, 320)):
        values, a = torch.randn(3, h, device=DEVICE), torch.randn(3, h, device=DEVICE)
        got = answer(apart(values, stride, beyond=1e9), a)
        why = "when EVEN is false, H and the stride may be anything" if h % 16 or stride % 16 else ""
        near(f"s of rows of {h}, {stride} apart", got, (values.double() + a.double()).cpu(), rounding=2, why=why)
    even, odd = machine_code(answer, {"EVEN": True}, {"EVEN": False})
    if max(odd.loads) > 16:
        raise Wrong(
            f"with EVEN=False, compiled for an H100 it loads {max(odd.loads)} bits at a time. A row of odd length begins where 128 bits may not "
            "be loaded: a GPU stops there with 'misaligned address', which the interpreter does not show"
        )
    if even.loads != {128: 4}:
        narrow = even.loads.get(16, 0)
        what = {
            32: "both loads are still narrow: the mask (H), or where each row begins, is not known to be a multiple of 16",
            16: "one of the two loads is still narrow: x's rows begin at row · stride, a's at row · H, and the masks end at H",
        }.get(narrow, "all four loads of a thread can be of 128 bits")
        raise Wrong(f"the numbers are right; with EVEN=True a thread's loads are {_words(even.loads)}: {what}")
    if even.stores != {128: 2}:
        raise Wrong(f"the loads are wide; the stores are {_words(even.stores)}: the mask of the store, too")
    return f"Compiled: {_words(even.loads)} a thread, where it was {_words(odd.loads)}; {even.registers} registers, where it was {odd.registers}."


def _words(widths: dict[int, int]) -> str:
    return " and ".join(f"{n} of {bits} bits" for bits, n in sorted(widths.items(), reverse=True))


# --- what a multiprocessor holds --------------------------------------------------------------------------------------------------------

FORGOTTEN = {
    "registers": "registers limit the programs, too",
    "round": "a thread gets its registers in eights: 33 take the room of 40",
    "threads": "a multiprocessor has at most 2048 threads",
    "programs": "a multiprocessor has at most 32 programs",
    "shared": "shared memory limits the programs, too: 228 KiB, of which each program takes 1 KiB more than it asks for",
    "reserved": "of shared memory each program takes 1 KiB more than it asks for",
}


def resident(use: Compiled, without: str = "") -> int:
    """Programs on a multiprocessor; `without` a limit, to see who forgot it."""
    registers = use.registers if without == "round" else -(-use.registers // 8) * 8
    limits = {
        "registers": 65536 // (registers * 32 * use.warps),
        "threads": 2048 // (32 * use.warps),
        "programs": 32,
        "shared": 228 * 1024 // max(1, use.shared + 1024 * (without != "reserved")),
    }
    return min(v for k, v in limits.items() if k != without)


def chosen(uses: dict[int, Compiled], held: int, needed: int, count: Callable[[Compiled], int] = resident) -> dict[int, int]:
    """Warps → bytes under way, of those worth timing."""
    flying = {warps: count(use) * held for warps, use in uses.items() if not use.spilled}
    return {warps: n for warps, n in flying.items() if n >= needed}


def _use(warps: int, registers: int, shared: int = 0, spilled: int = 0) -> Compiled:
    return Compiled("", {}, {}, registers, spilled, shared, warps)


CASES: tuple[tuple[dict[int, Compiled], int], ...] = (
    ({4: _use(4, 33), 8: _use(8, 64)}, 8192),
    ({1: _use(1, 220), 2: _use(2, 113), 4: _use(4, 56), 8: _use(8, 38), 16: _use(16, 25), 32: _use(32, 19)}, 8192),
    ({1: _use(1, 24), 2: _use(2, 16)}, 256),
    ({4: _use(4, 64, shared=100 * 1024), 8: _use(8, 64, shared=57 * 1024)}, 16384),
    ({1: _use(1, 255, spilled=224), 4: _use(4, 108)}, 16384),
)


@exercise(
    "11.3",
    "what is worth timing",
    hint="programs = min(65536 // (registers in eights · 32 · warps), 2048 // (32 · warps), 32, 228 · 1024 // (shared + 1024)); bytes = programs · held",
)
def worth_timing(answer: Answer) -> str | None:
    for uses, held in CASES:
        for needed in (0, 20000, 60000):
            got, right = answer(uses, held, needed), chosen(uses, held, needed)
            if got == right:
                continue
            if not isinstance(got, dict):
                raise Wrong(f"return a dict, warps → bytes under way on one multiprocessor; got {type(got).__name__}")
            asked = ", ".join(
                f"{u.warps} warps of {u.registers} registers" + f", {u.shared} bytes shared" * bool(u.shared) for u in uses.values()
            )
            spilling = [w for w in got if uses.get(w, _use(1, 1)).spilled]
            if spilling:
                raise Wrong(
                    f"with {spilling[0]} warps it spills: {uses[spilling[0]].spilled} bytes a thread go to memory and back. Leave it out"
                )
            for limit, words in FORGOTTEN.items():
                if got == chosen(uses, held, needed, partial(resident, without=limit)):
                    raise Wrong(f"for {asked}: {words}")
            if got == dict.fromkeys(got, held) and got != right:
                raise Wrong(f"for {asked}: that is one program's; a multiprocessor has room for several")
            if set(right) < set(got):
                raise Wrong(f"for {asked}: {sorted(set(got) - set(right))} warps have less than the {needed} bytes that are needed")
            raise Wrong(f"for {asked}, {held} bytes each, {needed} needed: got {got}, expected {right}")
    return "With 16 or 32 warps a program the threads run out first: few programs fit, and each waits for its own row."
