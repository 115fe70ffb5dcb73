"""Checks of lesson 2: counting."""

from __future__ import annotations

from course import Wrong, exercise, same
from course.exercises import Answer

ARRAYS = {"rms_norm": (2, 3), "swiglu": (3, 5), "cross_entropy": (1, 2)}


@exercise(
    "2.1",
    "the least bytes",
    hint="rms_norm: x, y; backward dy, x, dx. swiglu: gate, up, y; backward dy, gate, up, dgate, dup. 2 bytes each",
)
def least_bytes(answer: Answer) -> str | None:
    for n, h in ((8, 16), (8192, 4096)):
        for op, (forward, backward) in ARRAYS.items():
            got = answer(op, n, h)
            if not (isinstance(got, tuple | list) and len(got) == 2):
                raise Wrong("return (forward, backward)")
            if tuple(got) == (forward * n * h, backward * n * h):
                raise Wrong(f"{op}: these are numbers, not bytes: bf16 has 2")
            if tuple(got) == (4 * forward * n * h, 4 * backward * n * h):
                raise Wrong(f"{op}: these are bytes of fp32: bf16 has 2")
            if got[1] == 2 * n * h * (backward - 1):
                raise Wrong(f"{op}: the backward lacks an array: it reads dy and the inputs, and writes a gradient for each input")
            if got[1] == 2 * n * h * (forward + backward):
                raise Wrong(f"{op}: that is forward and backward together; the second number is the backward alone")
            same(f"the forward bytes of {op} for [{n}, {h}]", got[0], 2 * forward * n * h, f"{forward} arrays")
            same(f"the backward bytes of {op} for [{n}, {h}]", got[1], 2 * backward * n * h, f"{backward} arrays")
    return None


@exercise("2.2", "a matrix product", hint="2 M K N FLOPs; 2 (M K + K N + M N) bytes; their quotient")
def product(answer: Answer) -> str | None:
    for m, k, n in ((4, 8, 16), (8192, 8192, 8192), (1, 4096, 4096)):
        flops, moved, intensity = answer(m, k, n)
        if flops == m * k * n:
            raise Wrong("a multiplication and an addition are two FLOPs")
        same(f"FLOPs of {m} x {k} x {n}", flops, 2 * m * k * n)
        if moved == 2 * (m * k + k * n):
            raise Wrong("the result is written too")
        same(f"bytes of {m} x {k} x {n}", moved, 2 * (m * k + k * n + m * n), "two factors and the result, 2 bytes a number")
        if abs(intensity - flops / moved) > 1e-9 * intensity:
            raise Wrong(f"the intensity is FLOPs over bytes, {flops / moved:.4g}, got {intensity:.4g}")
    return "With one row (the last case), a product has an intensity of 1: it waits for the weight."


@exercise("2.3", "the floor", hint="max(bytes / (bandwidth · 1e9), flops / (compute · 1e12)), times 1e6")
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
