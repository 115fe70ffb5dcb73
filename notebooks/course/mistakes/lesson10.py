"""Tests that do not catch what they should."""

from __future__ import annotations

import torch

from course import mistake


@mistake("10.1", "fails a right implementation", "NaN")
def by_equality(fn, *inputs):
    before = [t.detach().clone() for t in inputs]
    y = fn(*inputs)
    torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(a, t) for a, t in zip(before, inputs, strict=True))


@mistake("10.1", "second backward")
def backward_once(fn, *inputs):
    before = [t.detach().clone().view(torch.int32) for t in inputs]
    torch.autograd.grad(fn(*inputs).sum(), inputs)
    assert all(torch.equal(a, t.detach().view(torch.int32)) for a, t in zip(before, inputs, strict=True))


@mistake("10.2", "for 1")
def loss_backward_alone(fn, x):
    assert torch.autograd.grad(fn(x), x)[0].isfinite().all()


@mistake("10.2", "in place")
def a_new_graph_each_time(fn, x):
    one, three = (torch.autograd.grad(fn(x), x, torch.tensor(g))[0].clone() for g in (1.0, 3.0))
    assert torch.allclose(three, 3 * one)


@mistake("10.3", "forward takes x")
def cotangents_alone(op, x):
    y, res = op.fwd(x)
    assert torch.equal(op.bwd(res, torch.ones(()).expand(y.shape)), op.bwd(res, torch.ones(y.shape)))


@mistake("10.3", "backward takes dy")
def forward_alone(op, x):
    assert torch.equal(op.fwd(x.T.contiguous().T)[0], op.fwd(x)[0])


@mistake("10.4", "off by 1 %")
def a_tolerance(ours, naive, truth):
    assert ours.dtype == naive.dtype
    assert ours.shape == naive.shape
    assert torch.allclose(ours.double(), truth, rtol=0.1, atol=0.05)


@mistake("10.4", "one NaN")
def greater_is_wrong(ours, naive, truth):
    assert ours.dtype == naive.dtype
    assert ours.shape == naive.shape
    error = (ours.double() - truth).norm()
    if error > (naive.double() - truth).norm() + torch.finfo(ours.dtype).eps / 2 * truth.norm():
        raise AssertionError


@mistake("10.4", "fails a right implementation", "rounded once")
def no_rounding_allowed(ours, naive, truth):
    assert (ours.double() - truth).norm() < (naive.double() - truth).norm()
