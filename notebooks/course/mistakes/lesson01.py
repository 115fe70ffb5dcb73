"""Likely wrong answers of lesson 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from course import mistake
from course.solutions.lesson01 import slope as central


@mistake("1.1", "an input was changed")
def in_place(gate, up):
    kept = gate.clone()
    return gate.mul_(torch.sigmoid(gate)).mul_(up), (kept, up)


@mistake("1.1", "exchanged")
def exchanged(gate, up):
    return F.silu(up) * gate, (gate, up)


@mistake("1.1", "more than two tensors")
def keeps_all(gate, up):
    return F.silu(gate) * up, (gate, up, torch.sigmoid(gate))


@mistake("1.1", "too little is kept")
def keeps_gate_alone(gate, up):
    return F.silu(gate) * up, (gate,)


@mistake("1.1", "return two things")
def y_alone(gate, up):
    return F.silu(gate) * up


@mistake("1.2", "product rule")
def no_product_rule(residuals, dy):
    gate, up = residuals
    s = torch.sigmoid(gate)
    return dy * up * s * (1 - s), dy * gate * s


@mistake("1.2", "dy is missing")
def dy_is_one(residuals, dy):
    gate, up = residuals
    s = torch.sigmoid(gate)
    return up * s * (1 + gate * (1 - s)), gate * s


@mistake("1.2", "up is missing")
def up_forgotten(residuals, dy):
    gate, _ = residuals
    s = torch.sigmoid(gate)
    return dy * s * (1 + gate * (1 - s)), dy * gate * s


@mistake("1.2", "the dtype of dgate is torch.float32")
def always_fp32(residuals, dy):
    gate, up = (t.float() for t in residuals)
    s = torch.sigmoid(gate)
    return dy.float() * up * s * (1 + gate * (1 - s)), dy.float() * gate * s


@mistake("1.2", "the order is (dgate, dup)")
def other_order(residuals, dy):
    gate, up = residuals
    s = torch.sigmoid(gate)
    return dy * gate * s, dy * up * s * (1 + gate * (1 - s))


@mistake("1.3", "one-sided")
def one_sided(loss, a, h=1e-5):
    out = torch.empty_like(a)
    for i in range(a.numel()):
        step = torch.zeros_like(a)
        step.view(-1)[i] = h
        out.view(-1)[i] = (loss(a + step) - loss(a)) / h
    return out


@mistake("1.3", "the dtype of the slope is torch.float32")
def into_fp32(loss, a, h=1e-5):
    return central(loss, a, h).float()


@mistake("1.3", "times 2")
def half_the_step(loss, a, h=1e-5):
    out = torch.empty_like(a)
    for i in range(a.numel()):
        step = torch.zeros_like(a)
        step.view(-1)[i] = h
        out.view(-1)[i] = (loss(a + step) - loss(a - step)) / h
    return out


@mistake("1.3", "a was changed")
def steps_in_place(loss, a, h=1e-5):
    out = torch.empty_like(a)
    for i in range(a.numel()):
        a.view(-1)[i] += h
        up = loss(a)
        a.view(-1)[i] -= 2 * h
        out.view(-1)[i] = (up - loss(a)) / (2 * h)
    return out
