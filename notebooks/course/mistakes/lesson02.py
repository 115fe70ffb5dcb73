"""Likely wrong answers of lesson 2."""

from __future__ import annotations

from course import mistake
from course.solutions.lesson02 import least_bytes, product


@mistake("2.1", "not bytes")
def numbers(op, N, H):
    return tuple(b // 2 for b in least_bytes(op, N, H))


@mistake("2.1", "fp32")
def in_fp32(op, N, H):
    return tuple(b * 2 for b in least_bytes(op, N, H))


@mistake("2.1", "lacks an array")
def without_dy(op, N, H):
    forward, backward = least_bytes(op, N, H)
    return forward, backward - 2 * N * H


@mistake("2.1", "together")
def both_together(op, N, H):
    forward, backward = least_bytes(op, N, H)
    return forward, forward + backward


@mistake("2.2", "two FLOPs")
def multiplies_alone(M, K, N):
    flops, moved, _ = product(M, K, N)
    return flops // 2, moved, flops / 2 / moved


@mistake("2.2", "written too")
def factors_alone(M, K, N):
    moved = 2 * (M * K + K * N)
    return 2 * M * K * N, moved, 2 * M * K * N / moved


@mistake("2.3", "the sum")
def added(bytes, flops, bandwidth, compute):
    return bytes / bandwidth / 1e3 + flops / compute / 1e6


@mistake("2.3", "the shorter")
def shorter(bytes, flops, bandwidth, compute):
    return min(bytes / bandwidth / 1e3, flops / compute / 1e6)


@mistake("2.3", "units")
def in_seconds(bytes, flops, bandwidth, compute):
    return max(bytes / bandwidth / 1e9, flops / compute / 1e12)
