"""cross_entropy: the contract, and its oddities."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import liger_fn
from tests import cases
from tests.contract import Contract, wrong
from tests.numerics import assert_same_bits


class TestCrossEntropy(Contract):
    table = cases.CROSS_ENTROPY
    wrong_calls = (
        wrong("int-logits", TypeError, "logits must be float32", "torch.int64", ".to(", logits=torch.Tensor.long),
        wrong("0-d", ValueError, "logits must have at least 1 axes", "[]", logits=lambda a: a.sum()),
        wrong("no-classes", ValueError, "at least 1 element", "0", logits=lambda a: a[..., :0]),
        wrong("float-target", TypeError, "integer dtype", "torch.float32", ".long()", target=torch.Tensor.float),
        wrong("bool-target", TypeError, "integer dtype", "torch.bool", target=torch.Tensor.bool),
        wrong("list-target", TypeError, "target must be a torch.Tensor", "list", target=torch.Tensor.tolist),
        wrong("target-shape", ValueError, "target must have shape [2, 5]", "[10]", target=torch.Tensor.flatten),
        wrong("probabilities", TypeError, "integer dtype", "torch.float32", target=lambda t: torch.rand(2, 5, 63)),
        wrong("device", ValueError, "target must be on", "meta", ".to(", target=lambda t: t.to("meta")),
        wrong("reduction", ValueError, "'mean', 'sum', 'none'", "'average'", reduction="average"),
    )


def inputs(device: torch.device, rows: int = 6, classes: int = 63) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    target = torch.randint(classes, (rows,), device=device, generator=generator)
    return torch.randn(rows, classes, device=device, generator=generator), target


def grad_and_loss(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = liger_fn.cross_entropy(leaf, target, **options)
    return torch.autograd.grad(loss.sum(), leaf)[0], loss.detach()


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_is_torchs_cross_entropy(backend: str, reduction: str, device: torch.device) -> None:
    logits, target = inputs(device)
    target[::3] = -100
    torch.testing.assert_close(
        liger_fn.cross_entropy(logits, target, reduction=reduction), F.cross_entropy(logits, target, reduction=reduction)
    )


@pytest.mark.parametrize("dtype", cases.HALVES)
def test_loss_is_fp32(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    logits, target = inputs(device)
    for reduction in cases.REDUCTIONS:
        assert liger_fn.cross_entropy(logits.to(dtype), target, reduction=reduction).dtype is torch.float32


@pytest.mark.parametrize("bad", [63, -1, 2**40, -(2**40), -99])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_target_out_of_range(backend: str, bad: int, reduction: str, device: torch.device) -> None:
    """An error on a CPU. On a GPU, where looking would make the host wait, NaN in that row, its gradient, and any sum over it."""
    logits, target = inputs(device)
    target[2] = bad
    if device.type == "cpu":
        with pytest.raises(ValueError, match=rf"cross_entropy: every target must be in \[0, 63\) or be ignore_index=-100, got {bad} "):
            liger_fn.cross_entropy(logits, target, reduction=reduction)
        return
    grad, loss = grad_and_loss(logits, target, reduction=reduction)
    others = torch.arange(6, device=device) != 2
    assert bool(grad[2].isnan().all())
    assert bool(grad[others].isfinite().all())
    assert torch.equal(loss.isnan(), ~others) if reduction == "none" else bool(loss.isnan())


@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_all_ignored(backend: str, reduction: str, device: torch.device) -> None:
    logits, target = inputs(device)
    grad, loss = grad_and_loss(logits, torch.full_like(target, -100), reduction=reduction)
    assert not loss.any()
    assert not grad.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reduction", cases.REDUCTIONS)
def test_ignored_rows_may_hold_anything(backend: str, value: float, reduction: str, device: torch.device) -> None:
    logits, target = inputs(device)
    target[2] = -100
    clean = grad_and_loss(logits, target, reduction=reduction)
    logits[2] = value
    assert_same_bits(grad_and_loss(logits, target, reduction=reduction), clean, "gradient and loss")
    assert not clean[0][2].any()
    leaf = logits.clone().requires_grad_()
    loss = liger_fn.cross_entropy.reference(leaf, target, reduction=reduction)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), leaf)[0], clean[0])


def test_infinite_logits_are_not_hidden(backend: str, device: torch.device) -> None:
    """A row with a logit at +inf has no finite loss; the other rows do not notice."""
    logits, target = inputs(device)
    clean = grad_and_loss(logits, target, reduction="none")
    logits[2, (target[2] + 1) % 63] = math.inf
    grad, loss = grad_and_loss(logits, target, reduction="none")
    others = torch.arange(6, device=device) != 2
    assert not bool(loss[2].isfinite())
    assert not bool(grad[2].isfinite().all())
    assert_same_bits((grad[others], loss[others]), (clean[0][others], clean[1][others]), "other rows")


def test_each_row_honours_its_own_cotangent(backend: str, device: torch.device) -> None:
    logits, target = inputs(device)
    leaf = logits.requires_grad_()
    each = liger_fn.cross_entropy(leaf, target, reduction="none")
    scale = torch.arange(6.0, device=device)
    (grad,) = torch.autograd.grad(each, leaf, scale)
    want = scale[:, None] * (logits.softmax(-1) - F.one_hot(target, 63))
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_narrow_targets_do_not_wrap(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """-100 is 156 in uint8, and a vocabulary of 50257 is negative in int16."""
    target = torch.tensor([100, 0, 3] if dtype is torch.int8 else [156, 0, 3], device=device)
    logits = torch.randn(3, 50257, device=device)
    want = liger_fn.cross_entropy(logits, target, reduction="none")
    assert bool((want > 0).all())
    assert torch.equal(liger_fn.cross_entropy(logits, target.to(dtype), reduction="none"), want)


@pytest.mark.parametrize("confidence", [8.0, 16.0, 24.0, 60.0])
def test_a_confident_row_keeps_its_gradient(backend: str, confidence: float, device: torch.device) -> None:
    """p_y − 1 in fp32 would keep no digit once the others' share is below 6e-8."""
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 999, 512, 7])
    logits[torch.arange(4), target] += confidence

    def grad(fn: Any, dtype: torch.dtype) -> Tensor:
        leaf = logits.to(device, dtype).requires_grad_()
        fn(leaf, target.to(device)).backward()
        assert leaf.grad is not None
        return leaf.grad[torch.arange(4), target].double()

    others = torch.softmax(logits.double(), -1).scatter(-1, target[:, None], 0.0).sum(-1).to(device)
    torch.testing.assert_close(grad(liger_fn.cross_entropy, torch.float32), -others / 4, rtol=2e-6, atol=0.0)
