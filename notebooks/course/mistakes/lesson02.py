"""Likely wrong answers of lesson 2."""

from __future__ import annotations

from course import mistake
from course.solutions.lesson02 import flops_each, least_bytes, product_work


@mistake("2.1", "not bytes")
def numbers(op, N, H, size):
    return least_bytes(op, N, H, 1)


@mistake("2.1", "the dtype decides")
def always_bf16(op, N, H, size):
    return least_bytes(op, N, H, 2)


@mistake("2.1", "an array is missing", "dy")
def without_dy(op, N, H, size):
    forward, backward = least_bytes(op, N, H, size)
    return forward, backward - N * H * size


@mistake("2.1", "together")
def both_together(op, N, H, size):
    forward, backward = least_bytes(op, N, H, size)
    return forward, forward + backward


@mistake("2.1", "Read twice?")
def reads_the_row_twice(op, N, H, size):
    forward, backward = least_bytes(op, N, H, size)
    return forward + N * H * size * (op == "rms_norm"), backward


@mistake("2.1", "the same gradient")
def two_gradients_of_a_sum(op, N, H, size):
    forward, backward = least_bytes(op, N, H, size)
    return forward, backward + N * H * size * (op == "add_rms_norm")


@mistake("2.2", "the sum of the squares")
def without_the_sum(op):
    return (3, 9) if op == "rms_norm" else flops_each(op)


@mistake("2.2", "dw is missing")
def without_dw(op):
    return (4, 7) if op == "rms_norm" else flops_each(op)


@mistake("2.2", "computes them again")
def as_if_kept(op):
    return (5, 6) if op == "swiglu" else flops_each(op)


@mistake("2.3", "two FLOPs")
def multiplies_alone(op, a, b, c):
    flops, moved = product_work(op, a, b, c)
    return flops // 2, moved


@mistake("2.3", "a gradient is forgotten")
def one_gradient(op, a, b, c):
    flops, moved = product_work(op, a, b, c)
    return flops if op == "matmul" else flops // 3 * 2, moved


@mistake("2.3", "written, too")
def factors_alone(op, a, b, c):
    flops, moved = product_work(op, a, b, c)
    return flops, moved - 2 * a * c * (op == "matmul")


@mistake("2.3", "the logits")
def keeps_logits(op, a, b, c):
    flops, moved = product_work(op, a, b, c)
    return flops, moved + 4 * a * c * (op == "linear_cross_entropy")


@mistake("2.4", "the sum")
def added(bytes, flops, bandwidth, compute):
    return bytes / bandwidth / 1e3 + flops / compute / 1e6


@mistake("2.4", "the shorter")
def shorter(bytes, flops, bandwidth, compute):
    return min(bytes / bandwidth / 1e3, flops / compute / 1e6)


@mistake("2.4", "units")
def in_seconds(bytes, flops, bandwidth, compute):
    return max(bytes / bandwidth / 1e9, flops / compute / 1e12)
