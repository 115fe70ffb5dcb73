"""Answers of lesson 10."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import grad

from course import DEVICE, solution


@solution("10.1")
def assert_untouched(call, tensors):
    def bytes_of(t):
        return t.detach().contiguous().view(torch.uint8)

    kept = [bytes_of(t).clone() for t in tensors]
    call()
    for n, (t, before) in enumerate(zip(tensors, kept, strict=True)):
        assert torch.equal(bytes_of(t), before), f"tensor {n} was written to"


@solution("10.2")
def check_backward(swiglu):
    gate, up = (torch.randn(3, 5, device=DEVICE).requires_grad_() for _ in range(2))

    def want(dy):
        return grad(F.silu(gate) * up, (gate, up), dy)

    dense = torch.randn(3, 5, device=DEVICE)
    cotangents = dense, dense, torch.tensor(0.5, device=DEVICE).expand(3, 5), dense.T.contiguous().T
    wants = [want(dy) for dy in cotangents]
    y = swiglu(gate, up)
    for dy, ws in zip(cotangents, wants, strict=True):
        for g, w in zip(grad(y, (gate, up), dy, retain_graph=True), ws, strict=True):
            assert torch.allclose(g, w, atol=1e-5), f"{dy.stride()}"
    (alone,) = grad(swiglu(gate.detach(), up), up, dense)
    assert torch.allclose(alone, wants[0][1], atol=1e-5), "frozen gate"


@solution("10.3")
def check_offsets(offset):
    for row, column, stride in ((2, 3, 7), (1, 2**24, 1), (20_000, 5, 128_256), (2**20, 1, 2**14 + 1)):
        assert offset(row, column, stride) == row * stride + column, (row, column, stride)


@solution("10.4")
def check_dweight(dweight):
    x, dy = torch.randn(2, 4099, 32, device=DEVICE).bfloat16()
    truth = (x.double() * dy.double()).sum(0)
    naive = (x * dy).sum(0)
    error = (dweight(x, dy).double() - truth).norm()
    allowed = (naive.double() - truth).norm() + torch.finfo(torch.bfloat16).eps / 2 * truth.norm()
    assert error <= allowed, f"error {float(error):.3g}, allowed {float(allowed):.3g}"


@solution("10.5")
def check_loss(loss):
    logits = torch.randn(5, 7, device=DEVICE).requires_grad_()
    target = torch.tensor([3, -100, 0, 6, -100], device=DEVICE)
    for reduction in ("mean", "sum", "none"):
        ours, theirs = loss(logits, target, reduction), F.cross_entropy(logits, target, reduction=reduction)
        assert torch.allclose(ours, theirs, atol=1e-5), reduction
        dy = torch.rand_like(theirs)
        assert torch.allclose(*(grad(y, logits, dy)[0] for y in (ours, theirs)), atol=1e-5), f"gradient of {reduction}"
    none = loss(logits, torch.full_like(target, -100))
    assert float(none.detach()) == 0
    assert not grad(none, logits)[0].any()
    raised = False
    try:
        loss(logits, torch.full_like(target, 7))
    except ValueError:
        raised = True
    assert raised, "a target of 7, where there are 7 classes"
