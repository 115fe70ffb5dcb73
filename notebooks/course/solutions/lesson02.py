"""Answers of lesson 2."""

from __future__ import annotations

from course import solution


@solution("2.1")
def least_bytes(op, N, H, size):
    reads_and_writes = {
        "rms_norm": (2, 3),  # x, y; dy, x, dx
        "swiglu": (3, 5),  # gate, up, y; dy, gate, up, dgate, dup
        "cross_entropy": (1, 2),  # logits; logits, dlogits
        "add_rms_norm": (4, 4),  # x, residual, sum, y; dy, dsum, sum, dx
    }
    forward, backward = reads_and_writes[op]
    return forward * N * H * size, backward * N * H * size


@solution("2.2")
def flops_each(op):
    return {
        "rms_norm": (4, 9),  # x·x, +, ·r, ·w; x·r, dy·w, g·x̂, +, x̂·c, −, ·r, dy·x̂, +
        "swiglu": (5, 10),  # exp, +, /, ·gate, ·up; the first four again, dy·a, dy·up, 1−s, ·a, s+, ·
        "cross_entropy": (4, 3),  # max, −, exp, +; −, exp, ·dloss
    }[op]


@solution("2.3")
def product_work(op, a, b, c):
    if op == "matmul":
        return 2 * a * b * c, 2 * (a * b + b * c + a * c)
    factors = 3 * (a * b + b * c)  # read, read again, and their gradients written
    result = 2 * a * c if op == "matmul with gradients" else 0
    return 6 * a * b * c, 2 * (factors + result)


@solution("2.4")
def floor_us(bytes, flops, bandwidth, compute):
    return max(bytes / (bandwidth * 1e9), flops / (compute * 1e12)) * 1e6
