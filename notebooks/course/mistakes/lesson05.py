"""Likely wrong answers of lesson 5."""

from __future__ import annotations

import torch

from course import mistake
from course.solutions.lesson05 import rope, rotate_pairs


@mistake("5.1", "turns the other way")
def other_way(x, cos, sin, layout):
    return rotate_pairs(x, cos, -sin, layout)


@mistake("5.1", "the pairs of the layout 'half'")
def one_layout(x, cos, sin, layout):
    return rotate_pairs(x, cos, sin, "half")


@mistake("5.1", "columns 6 to 9", "stay")
def forgets_the_rest(x, cos, sin, layout):
    r = cos.shape[-1]
    y = torch.zeros_like(x)
    y[:, : 2 * r] = rotate_pairs(x[:, : 2 * r], cos, sin, layout)
    return y


@mistake("5.1", "x was changed")
def in_place(x, cos, sin, layout):
    return x.copy_(rotate_pairs(x, cos, sin, layout))


@mistake("5.2", "a view", "are its strides")
def as_if_contiguous(q, cos, sin):
    B, H, T, D = q.shape
    flat = q.as_strided(q.shape, (H * T * D, T * D, D, 1))
    return rope(flat.clone(), cos, sin)


@mistake("5.2", "overwritten")
def over_q(q, cos, sin):
    return q.copy_(rope(q, cos, sin))


@mistake("5.2", "turns the other way")
def minus_forgotten(q, cos, sin):
    return rope(q, cos, -sin)


@mistake("5.3", "forward again")
def forward_again(cos, sin, dy, layout):
    return rotate_pairs(dy, cos, sin, layout)


@mistake("5.3", "the inverse")
def inverse(cos, sin, dy, layout):
    size = cos**2 + sin**2
    return rotate_pairs(dy, cos / size, -sin / size, layout)
