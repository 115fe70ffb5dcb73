"""Answers of lesson 1."""

from __future__ import annotations

import torch

from course import solution


@solution("1.1")
def forward(gate, up):
    return gate * torch.sigmoid(gate) * up, (gate, up)


@solution("1.2")
def backward(residuals, dy):
    gate, up = residuals
    s = torch.sigmoid(gate)
    return dy * up * s * (1 + gate * (1 - s)), dy * gate * s


@solution("1.3")
def slope(loss, a, h=1e-5):
    out = torch.empty_like(a)
    for i in range(a.numel()):
        step = torch.zeros_like(a)
        step.view(-1)[i] = h
        out.view(-1)[i] = (loss(a + step) - loss(a - step)) / (2 * h)
    return out
