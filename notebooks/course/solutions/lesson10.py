"""Answers of lesson 10."""

from __future__ import annotations

import torch

from course import solution


def _bits(t):
    return t.detach().clone().view(torch.int32)


@solution("10.1")
def pure(fn, *inputs):
    inputs = [t if t.requires_grad else t.clone().requires_grad_() for t in inputs]
    before = [_bits(t) for t in inputs]
    y = fn(*inputs)
    dy = torch.ones_like(y)
    first = [_bits(g) for g in torch.autograd.grad(y, inputs, dy, retain_graph=True)]
    second = [_bits(g) for g in torch.autograd.grad(y, inputs, dy)]
    assert all(torch.equal(a, _bits(t)) for a, t in zip(before, inputs, strict=True)), "an input was written to"
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "a second backward differs"


@solution("10.2")
def linear_in_the_cotangent(fn, x):
    y = fn(x)
    one, three, again = (torch.autograd.grad(y, x, torch.tensor(g), retain_graph=True)[0].clone() for g in (1.0, 3.0, 1.0))
    assert torch.allclose(three, 3 * one), "not linear in the upstream gradient"
    assert torch.allclose(again, one), "a backward changes the next one"


@solution("10.3")
def takes_any_strides(op, x):
    y, res = op.fwd(x)
    assert torch.equal(op.bwd(res, torch.ones(()).expand(y.shape)), op.bwd(res, torch.ones(y.shape)))
    dy = torch.randn(y.shape)
    assert torch.equal(op.bwd(res, dy.T.contiguous().T), op.bwd(res, dy))
    assert torch.equal(op.fwd(x.T.contiguous().T)[0], y)


@solution("10.4")
def exact_enough(ours, naive, truth):
    assert ours.dtype == naive.dtype, f"{ours.dtype}, expected {naive.dtype}"
    assert ours.shape == naive.shape, f"{ours.shape}, expected {naive.shape}"
    error, allowed = (ours.double() - truth).norm(), (naive.double() - truth).norm()
    assert error <= allowed + torch.finfo(ours.dtype).eps / 2 * truth.norm(), f"error {error}"
