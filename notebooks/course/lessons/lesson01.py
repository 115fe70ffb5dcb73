"""Checks of lesson 1: a pair of pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from course import Wrong, exercise, near, same
from course.exercises import Answer


@exercise("1.1", "SwiGLU forward", hint="gate * torch.sigmoid(gate) * up, and (gate, up) for the backward")
def forward(answer: Answer) -> str | None:
    for shape in ((4, 8), (3,), (2, 1, 5), (0, 4)):
        gate, up = torch.randn(2, *shape)
        kept = gate.clone(), up.clone()
        made = answer(gate, up)
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], tuple)):
            raise Wrong("return two things: y, and a tuple of residuals")
        if not (torch.equal(gate, kept[0]) and torch.equal(up, kept[1])):
            raise Wrong("an input was changed: a pure function makes new tensors; in PyTorch, names that end in _ write in place")
        y, residuals = made
        if isinstance(y, torch.Tensor) and gate.numel() > 4 and torch.allclose(y, F.silu(up) * gate, atol=1e-5):
            raise Wrong("gate and up are exchanged: silu is taken of gate")
        near(f"y of shape {list(shape)}", y, F.silu(gate.double()) * up.double(), rounding=8, why="y = gate σ(gate) up")
        if sum(t.numel() for t in residuals) > 2 * gate.numel():
            raise Wrong("more than two tensors are kept: silu and sigmoid of gate can be computed again in backward")
        if torch.equal(y, answer(gate, up)[0]) is False:
            raise Wrong("two calls gave different bits")
    return None


@exercise("1.2", "SwiGLU backward", hint="s = sigmoid(gate); dup = dy * gate * s; dgate = dy * up * s * (1 + gate * (1 - s))")
def backward(answer: Answer) -> str | None:
    for dtype in (torch.float64, torch.float32):
        for shape in ((4, 8), (7,)):
            gate, up, dy = torch.randn(3, *shape, dtype=dtype)
            g, u, d = gate.double(), up.double(), dy.double()
            s = torch.sigmoid(g)
            got = answer((gate, up), dy)
            same("the number of gradients", len(got) if isinstance(got, tuple) else 1, 2, "dgate and dup, in this order")
            why = ""
            if torch.allclose(got[0].double(), d * u * s * (1 - s), atol=1e-4):
                why = "It is dy up σ'(gate): silu is a product, a σ(a), and the product rule has two terms."
            elif torch.allclose(got[0].double(), u * s * (1 + g * (1 - s)), atol=1e-4):
                why = "dy is missing: the chain rule multiplies by what comes from above."
            elif torch.allclose(got[0].double(), d * g * s, atol=1e-4):
                why = "That is dup: the order is (dgate, dup)."
            near("dgate", got[0], d * u * s * (1 + g * (1 - s)), rounding=16, why=why)
            near("dup", got[1], d * g * s, rounding=16, why="dup = dy silu(gate)")
            same("the dtype of dgate", got[0].dtype, dtype)
    return "The same as autograd, in fp64 and fp32, for any dy."


@exercise("1.3", "finite differences", hint="for each i: copy a, add h at i; the same with −h; divide the difference of the losses by 2 h")
def slope(answer: Answer) -> str | None:
    a = torch.randn(2, 3, dtype=torch.float64)
    kept = a.clone()
    got = answer(lambda t: (t**3).sum() + (t[0] * t[1]).sum(), a, 1e-5)
    if not torch.equal(a, kept):
        raise Wrong("a was changed: add the step to a copy")
    truth = 3 * a**2 + a.flip(0)
    if isinstance(got, torch.Tensor) and got.shape == truth.shape:
        error = float((got - truth).abs().max())
        if 1e-7 < error < 1e-3:
            raise Wrong(f"it is off by {error:.1e}, about h: one-sided differences. Take L(a + h) − L(a − h), over 2 h")
    near("the slope", got, truth, rounding=1e7)
    return f"Right to {float((got - truth).abs().max()):.0e}."
