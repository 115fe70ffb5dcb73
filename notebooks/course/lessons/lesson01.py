"""Checks of lesson 1: a pair of pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from course import Wrong, exercise, near, same
from course.exercises import Answer


@exercise("1.1", "SwiGLU forward", hint="torch.sigmoid is σ; for the residuals, look which tensors stand in dgate and in dup")
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
        kept_numbers = sum(t.numel() for t in residuals if isinstance(t, torch.Tensor))
        if kept_numbers < 2 * gate.numel():
            raise Wrong("too little is kept: dgate reads gate and up, and dup reads gate; dy is all else that backward gets")
        if kept_numbers > 2 * gate.numel():
            raise Wrong("more than two tensors are kept: silu and sigmoid of gate can be computed again in backward")
        if torch.equal(y, answer(gate, up)[0]) is False:
            raise Wrong("two calls gave different bits")
    return None


@exercise(
    "1.2", "SwiGLU backward", hint="each gradient is dy times the derivative of silu(gate) * up, with the other of the two held fixed"
)
def backward(answer: Answer) -> str | None:
    for dtype in (torch.float64, torch.float32):
        for shape in ((4, 8), (7,)):
            gate, up, dy = torch.randn(3, *shape, dtype=dtype)
            g, u, d = gate.double(), up.double(), dy.double()
            s = torch.sigmoid(g)
            got = answer((gate, up), dy)
            same("the number of gradients", len(got) if isinstance(got, tuple | list) else 1, 2, "dgate and dup, in this order")
            slope = s * (1 + g * (1 - s))
            likely = {
                "It is dy up σ'(gate): silu is a product, a σ(a), and the product rule has two terms.": d * u * s * (1 - s),
                "It is dy up σ(gate): that is the first term of the product rule; a σ'(a) is missing.": d * u * s,
                "σ' is σ(1 − σ); yours has σ².": d * u * s * (1 + g * s),
                "dy is missing: the chain rule multiplies by what comes from above.": u * slope,
                "up is missing: silu(gate) is multiplied by up, so its slope is too.": d * slope,
                "That is dup: the order is (dgate, dup).": d * g * s,
            }
            for name, grad in zip(("dgate", "dup"), got, strict=True):
                same(f"the dtype of {name}", getattr(grad, "dtype", dtype), dtype, "compute in the dtype of gate, up and dy")
            near("dgate", got[0], d * u * slope, rounding=16, why=next((w for w, t in likely.items() if _is(got[0], t)), ""))
            near("dup", got[1], d * g * s, rounding=16, why="dup = dy silu(gate)")
    return "The same as autograd, in fp64 and fp32, for any dy."


def _is(got: object, what: torch.Tensor) -> bool:
    return isinstance(got, torch.Tensor) and got.shape == what.shape and torch.allclose(got.double(), what, atol=1e-4)


@exercise("1.3", "finite differences", hint="for each i: copy a, add h at i; the same with −h; divide the difference of the losses by 2 h")
def slope(answer: Answer) -> str | None:
    a = torch.randn(2, 3, dtype=torch.float64)
    kept = a.clone()
    got = answer(lambda t: (t**3).sum() + (t[0] * t[1]).sum(), a, 1e-5)
    if not torch.equal(a, kept):
        raise Wrong("a was changed: add the step to a copy")
    truth = 3 * a**2 + a.flip(0)
    if isinstance(got, torch.Tensor) and got.shape == truth.shape:
        same("the dtype of the slope", got.dtype, a.dtype, "torch.zeros(a.shape) is fp32; torch.zeros_like(a) has a's dtype")
        error = float((got - truth).abs().max())
        if 1e-7 < error < 1e-3:
            raise Wrong(f"it is off by {error:.1e}, about h: one-sided differences. Take L(a + h) − L(a − h), over 2 h")
    near("the slope", got, truth, rounding=1e7)
    return f"Right to {float((got - truth).abs().max()):.0e}."
