"""Tests of lesson 10 that are red on what is right, or green on what is wrong."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch.autograd import grad

from course import DEVICE, mistake


@mistake("10.1", "fails", "NaN is not equal to itself")
def by_value(call, tensors):
    kept = [t.clone() for t in tensors]
    call()
    assert all(torch.equal(t, k) for t, k in zip(tensors, kept, strict=True))


@mistake("10.1", "lets 5 of 5", "_version")
def by_version(call, tensors):
    kept = [t._version for t in tensors]
    call()
    assert [t._version for t in tensors] == kept


@mistake("10.1", "lets 2 of 5", "−0 equals 0", "forgives NaN")
def by_forgiving_values(call, tensors):
    kept = [t.nan_to_num() for t in tensors]
    call()
    assert all(torch.equal(t.nan_to_num(), k) for t, k in zip(tensors, kept, strict=True))


@mistake("10.1", "look at every tensor")
def the_first_alone(call, tensors):
    kept = tensors[0].clone().view(torch.int32)
    call()
    assert torch.equal(tensors[0].view(torch.int32), kept)


@mistake("10.1", "returned True", "`assert`")
def returns_a_verdict(call, tensors):
    kept = [t.clone() for t in tensors]
    call()
    return all(torch.equal(t.contiguous().view(torch.uint8), k.contiguous().view(torch.uint8)) for t, k in zip(tensors, kept, strict=True))


def _leaves():
    return [torch.randn(3, 5, device=DEVICE).requires_grad_() for _ in range(2)]


@mistake("10.2", "lets 5 of 6", "a second backward", "strides (0, 0)", "up's gradient alone")
def one_dense_cotangent(swiglu):
    gate, up = _leaves()
    dy = torch.randn(3, 5, device=DEVICE)
    want = grad(F.silu(gate) * up, (gate, up), dy)
    assert all(torch.allclose(g, w, atol=1e-5) for g, w in zip(grad(swiglu(gate, up), (gate, up), dy), want, strict=True))


@mistake("10.2", "not 1", "dy.T")
def sum_alone(swiglu):
    gate, up = _leaves()
    want = grad((F.silu(gate) * up).sum(), (gate, up))
    y = swiglu(gate, up).sum()
    for _ in range(2):
        assert all(torch.allclose(g, w, atol=1e-5) for g, w in zip(grad(y, (gate, up), retain_graph=True), want, strict=True))


@mistake("10.2", "fails SwiGLU", "same cotangent")
def another_cotangent(swiglu):
    gate, up = _leaves()
    want = grad((F.silu(gate) * up).sum(), gate)[0]
    assert torch.allclose(grad((2 * swiglu(gate, up)).sum(), gate)[0], want)


@mistake("10.2", "gradcheck", "fp64")
def differences_in_fp32(swiglu):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.autograd.gradcheck(swiglu, _leaves())


@mistake("10.3", "lets 4 of 5", "past 2**31", "odd offset")
def small_offsets(offset):
    assert offset(2, 3, 7) == 17


@mistake("10.3", "lets 1 of 5", "go past 2**32")
def just_past_2_31(offset):
    assert offset(16_745, 3, 128_256) == 16_745 * 128_256 + 3


@mistake("10.4", "lets 3 of 4", "tolerance of 0.2", "both signs")
def a_loose_tolerance(dweight):
    x, dy = torch.rand(2, 4099, 32, device=DEVICE).bfloat16()
    assert torch.allclose(dweight(x, dy).float(), (x.float() * dy.float()).sum(0), rtol=0.2)


@mistake("10.4", "False of NaN")
def lets_nan_through(dweight):
    x, dy = torch.randn(2, 4099, 32, device=DEVICE).bfloat16()
    truth, naive = (x.double() * dy.double()).sum(0), (x * dy).sum(0).double()
    if (dweight(x, dy).double() - truth).norm() > (naive - truth).norm() + 2**-8 * truth.norm():
        raise AssertionError("too far")


@mistake("10.4", "16 does not divide", "thousands")
def few_round_rows(dweight):
    x, dy = torch.randn(2, 16, 32, device=DEVICE).bfloat16()
    truth, naive = (x.double() * dy.double()).sum(0), (x * dy).sum(0).double()
    assert (dweight(x, dy).double() - truth).norm() <= (naive - truth).norm() + 2**-8 * truth.norm()


@mistake("10.4", "fails a sum in fp32", "same bf16 inputs")
def truth_of_other_inputs(dweight):
    x, dy = torch.randn(2, 4099, 32, device=DEVICE)
    truth = (x.double() * dy.double()).sum(0)
    assert torch.allclose(dweight(x.bfloat16(), dy.bfloat16()).double(), truth, rtol=1e-5)


@mistake("10.5", "all ignored gives NaN", "divides by all rows", "must raise")
def no_edge(loss):
    logits, target = torch.randn(4, 7, device=DEVICE), torch.tensor([1, 2, 3, 0], device=DEVICE)
    for reduction in ("mean", "none"):
        assert torch.allclose(loss(logits, target, reduction), F.cross_entropy(logits, target, reduction=reduction), atol=1e-5)


@mistake("10.5", "fails a loss", "All ignored")
def nan_expected(loss):
    logits, target = torch.randn(4, 7, device=DEVICE), torch.full((4,), -100, device=DEVICE)
    assert torch.allclose(loss(logits, target), F.cross_entropy(logits, target), equal_nan=True)


@mistake("10.5", "lets 1 of 5", "differs from row to row")
def values_alone(loss):
    logits, target = torch.randn(4, 7, device=DEVICE), torch.tensor([1, -100, 3, 0], device=DEVICE)
    for reduction in ("mean", "sum", "none"):
        assert torch.allclose(loss(logits, target, reduction), F.cross_entropy(logits, target, reduction=reduction), atol=1e-5)
    assert float(loss(logits, torch.full_like(target, -100))) == 0
    raised = False
    try:
        loss(logits, torch.full_like(target, 7))
    except ValueError:
        raised = True
    assert raised
