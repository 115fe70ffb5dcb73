"""Checks of lesson 11: counting what a multiprocessor holds."""

from __future__ import annotations

from course import Wrong, exercise, same
from course.exercises import Answer

REGISTERS, THREADS = 65536, 2048


def threads(registers: int, warps: int) -> int:
    """Threads at work on a multiprocessor."""
    programs = min(REGISTERS // (registers * 32 * warps), THREADS // (32 * warps))
    return programs * 32 * warps


@exercise(
    "11.1",
    "threads at work",
    hint="programs = min(65536 // (registers · 32 · warps), 2048 // (32 · warps)); threads = programs · 32 · warps",
)
def threads_at_work(answer: Answer) -> str | None:
    for registers, warps in ((64, 8), (32, 4), (16, 4), (96, 8), (255, 4), (64, 32)):
        got, right = answer(registers, warps), threads(registers, warps)
        if got == REGISTERS // registers and got != right:
            raise Wrong(f"{got} threads of {registers} registers: whole programs only (of {32 * warps} threads), and at most 2048 threads")
        if got * 32 == right or got == right // (32 * warps):
            raise Wrong("these are programs or warps, not threads")
        same(f"threads at work with {registers} registers and {warps} warps", got, right)
    return None


@exercise("11.2", "bytes in flight", hint="programs = threads_at_work // (32 · warps); each loads 2 H bytes")
def bytes_in_flight(answer: Answer) -> str | None:
    for h, warps, registers in ((4096, 8, 40), (4096, 4, 64), (8192, 16, 40), (1024, 4, 32)):
        programs = threads(registers, warps) // (32 * warps)
        got = answer(h, warps, registers)
        if got == programs * h:
            raise Wrong("these are numbers: bf16 has 2 bytes each")
        if got == 2 * h:
            raise Wrong("that is one program; a multiprocessor holds several")
        same(
            f"bytes in flight for H = {h}, {warps} warps, {registers} registers",
            got,
            2 * h * programs,
            f"{programs} programs of {2 * h} bytes",
        )
    return None


@exercise(
    "11.3",
    "warps for a row",
    hint="block = next power of two; block / 32 / warps numbers a thread: take warps = block // 512, between 1 and 32",
)
def warps_for(answer: Answer) -> str | None:
    for h in (1, 100, 256, 300, 1000, 2048, 4096, 5000, 16384, 32768):
        block = 1 << (h - 1).bit_length()
        got = answer(h)
        if not isinstance(got, int) or got < 1 or got > 32 or got & (got - 1):
            raise Wrong(f"for H = {h} got {got!r}: warps must be a power of two from 1 to 32")
        each = block / 32 / got
        if block <= 256 and got != 1:
            raise Wrong(f"for H = {h} got {got} warps: one warp holds such a row with {block / 32:g} numbers a thread")
        if block > 256 and not 8 <= each <= 32:
            raise Wrong(f"for H = {h} (a block of {block}) {got} warps give a thread {each:g} numbers: 8 to 32 are asked for")
    return None
