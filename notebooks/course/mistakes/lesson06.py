"""Likely wrong answers of lesson 6."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from course import mistake
from course.solutions.lesson06 import bytes_kept
from course.solutions.lesson06 import packed_backward as right


@mistake("6.1", "2 bytes")
def numbers(N, I, layers, how):
    return bytes_kept(N, I, layers, how) // 2


@mistake("6.1", "gate and up are missing")
def beyond_the_inputs(N, I, layers, how):
    return bytes_kept(N, I, layers, how) - 4 * N * I * layers


def _grads(gate, up, dy, approximate="none"):
    leaf = gate.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(leaf, approximate=approximate).sum(), leaf)
    return dy * up * slope, dy * F.gelu(gate, approximate=approximate)


@mistake("6.2", "second term")
def no_product_rule(gate, up, dy):
    return dy * up * 0.5 * (1 + torch.erf(gate / 2**0.5)), dy * F.gelu(gate)


@mistake("6.2", "tanh approximation")
def by_tanh(gate, up, dy):
    return _grads(gate, up, dy, "tanh")


@mistake("6.2", "dup")
def up_without_gelu(gate, up, dy):
    return _grads(gate, up, dy)[0], dy * gate


@mistake("6.3", "concatenation")
def by_cat(gate_up, dy):
    return torch.cat(right(gate_up, dy).chunk(2, -1), -1)


@mistake("6.3", "exchanged")
def other_order(gate_up, dy):
    out = right(gate_up, dy)
    half = out.shape[1] // 2
    return out.roll(half, 1)


@mistake("6.3", "overwritten")
def over_its_input(gate_up, dy):
    return gate_up.copy_(right(gate_up, dy))
