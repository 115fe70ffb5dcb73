"""add_rms_norm: the contract, and its oddities."""

from itertools import product

import pytest
import torch
from torch import Tensor

import liger_fn
from tests import cases
from tests.contract import Contract, restride, wrong
from tests.numerics import assert_near, assert_same_bits
from tests.sample import Sample


class TestAddRMSNorm(Contract):
    table = cases.ADD_RMS_NORM
    wrong_calls = (
        wrong("int-x", TypeError, "x must be float32", "torch.int64", ".to(torch.float32)", x=torch.Tensor.long),
        wrong("list-residual", TypeError, "residual must be a torch.Tensor", "list", residual=torch.Tensor.tolist),
        wrong("int-weight", TypeError, "weight must be float32", "torch.int64", weight=torch.Tensor.long),
        wrong("0-d", ValueError, "the last axis of x", "[]", x=lambda x: x.sum()),
        wrong("no-columns", ValueError, "the last axis of x", "[2, 5, 0]", x=lambda x: x[..., :0]),
        wrong("too-wide", ValueError, "1 to 2147418112", "2147483648", "reshape", x=lambda x: x.new_empty(1, 1).expand(1, 2**31)),
        wrong("residual-shape", ValueError, "residual must have shape [2, 5, 63]", "[1, 5, 63]", residual=lambda r: r[:1]),
        wrong("residual-dtype", TypeError, "residual must be torch.float32", "torch.bfloat16", ".to(", residual=torch.Tensor.bfloat16),
        wrong("residual-device", ValueError, "residual must be on", "meta", ".to(", residual=lambda r: r.to("meta")),
        wrong("weight-shape", ValueError, "weight must have shape [63]", "[62]", weight=lambda w: w[1:]),
        wrong("weight-device", ValueError, "weight must be on", "meta", ".to(", weight=lambda w: w.to("meta")),
        wrong("cast", ValueError, "'llama', 'gemma', 'none'", "'mistral'", cast="mistral"),
    )


def _tensors(device: torch.device, *shape: int) -> list[Tensor]:
    s = Sample(cases.ADD_RMS_NORM, cases.ADD_RMS_NORM.typical, torch.bfloat16, device)
    return [t.detach().requires_grad_() for t in s.tensors]


@pytest.mark.parametrize("cast", ["llama", "gemma", "none"])
@pytest.mark.parametrize("h", [63, 70001])
def test_is_the_norm_of_the_rounded_sum(backend: str, cast: str, h: int, device: torch.device) -> None:
    """In bits: what a model computes in two steps, it computes in one."""
    x, residual = (torch.randn(3, h, device=device, dtype=torch.bfloat16) for _ in range(2))
    w = torch.randn(h, device=device)
    y, s = liger_fn.add_rms_norm(x, residual, w, cast=cast)
    assert_same_bits((y, s), (liger_fn.rms_norm(x + residual, w, cast=cast), x + residual), "output")


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_used(backend: str, used: int, device: torch.device) -> None:
    """The cotangent of an output that nobody reads is zeros: the sum's gradient is then the norm's alone, and the other way round."""
    s = Sample(cases.ADD_RMS_NORM, cases.ADD_RMS_NORM.typical, torch.bfloat16, device)
    s.cots = tuple(c if i == used else torch.zeros_like(c) for i, c in enumerate(s.cots))
    leaves = [t.detach().requires_grad_() for t in s.tensors]
    got = torch.autograd.grad(s.f()(*leaves)[used], leaves, s.cots[used])
    for name, ours, naive, truth in zip(s.wrt, got, s.naive()[1], s.truth()[1], strict=True):
        assert_near(ours, naive, truth, f"gradient of {name}")
    if used:
        assert_same_bits(got[:2], [s.cots[1]] * 2, "gradient of the sum")
        assert not got[2].any()


@pytest.mark.parametrize("retain", [False, True])
def test_equal_gradients_are_accumulated_apart(backend: str, retain: bool, device: torch.device) -> None:
    """x and residual get one gradient: written to in place, by autograd or by an optimiser, they must be two."""
    x, residual, w = _tensors(device)
    cots = [torch.randn_like(x), torch.randn_like(x)]
    ys = liger_fn.add_rms_norm(x, residual, w)
    torch.autograd.backward(ys, cots, retain_graph=retain)
    assert x.grad is not None
    assert residual.grad is not None
    once = x.grad.clone()
    assert_same_bits((residual.grad,), (once,), "gradient of residual")
    assert x.grad.data_ptr() != residual.grad.data_ptr()
    x.grad.mul_(2)
    assert_same_bits((residual.grad,), (once,), "gradient of residual, after a change of the other")
    x.grad = None
    torch.autograd.backward(ys if retain else liger_fn.add_rms_norm(x, residual, w), cots)
    assert_same_bits((x.grad, residual.grad), (once, 2 * once), "gradients, one of them accumulated")


def test_gradients_added_to_in_place(backend: str, device: torch.device) -> None:
    """Non-leaves with other readers: autograd sums their gradients, in place where it may, whichever comes first."""
    for order in (1, -1):
        x, residual, w = _tensors(device)
        a, b = x * 1, residual * 1
        a.retain_grad()
        b.retain_grad()
        parts = [(liger_fn.add_rms_norm(a, b, w), None), ((a * 3, b * 5), None)][::order]
        cots = [torch.randn_like(x) for _ in range(4)]
        outs = [t for ys, _ in parts for t in ys]
        torch.autograd.backward(outs, cots)
        norm, plain = (cots[:2], cots[2:]) if order == 1 else (cots[2:], cots[:2])
        ys = liger_fn.add_rms_norm(x, residual, w)
        alone = torch.autograd.grad(ys, (x, residual), norm)
        want = [g + k * c for g, k, c in zip(alone, (3, 5), plain, strict=True)]
        assert_same_bits((a.grad, b.grad, x.grad, residual.grad), (*want, *want), "sum of gradients")


def test_same_tensor_twice(backend: str, device: torch.device) -> None:
    """x + x: both gradients go to one leaf."""
    x, _, w = _tensors(device)
    s = torch.randn_like(x)
    both = torch.autograd.grad(liger_fn.add_rms_norm(x, x, w), x, (s, s))[0]
    other = x.detach().clone().requires_grad_()
    one = torch.autograd.grad(liger_fn.add_rms_norm(x, other, w), (x, other), (s, s))
    assert_same_bits((both,), (one[0] + one[1],), "gradient")


def test_one_tensor_only_where_memory_may_be_reused(backend: str, device: torch.device) -> None:
    """`bwd` hands out two tensors; with `donate`, one for both. Residuals keep no copy of the sum."""
    x, residual, w = (t.detach() for t in _tensors(device))
    (y, s), residuals = liger_fn.add_rms_norm.fwd(x, residual, w)
    assert residuals.s is s
    dx, dresidual, _ = liger_fn.add_rms_norm.bwd(residuals, (y, s))
    assert dx.data_ptr() != dresidual.data_ptr()
    shared = liger_fn.add_rms_norm.bwd(residuals, (y, s), donate=True)
    assert shared[0] is shared[1]
    assert_same_bits(shared[:2], (dx, dresidual), "gradient")


def test_a_sum_changed_in_place_is_an_error(backend: str, device: torch.device) -> None:
    """The backward reads s: a change that it would take for s is refused by autograd, as for PyTorch's own functions."""
    x, residual, w = _tensors(device)
    y, s = liger_fn.add_rms_norm(x, residual, w)
    with torch.no_grad():
        s += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("h", [16384, 32784])
def test_each_gradient_of_wide_rows_alone(backend: str, h: int, device: torch.device) -> None:
    """What is launched depends on which are wanted; not a bit of them does."""
    case = cases.Case("wide", lambda m: {k: m.normal(*shape) for k, shape in {"x": (3, h), "residual": (3, h), "weight": (h,)}.items()})
    s = Sample(cases.ADD_RMS_NORM, case, torch.float32, device)
    _, residuals = liger_fn.add_rms_norm.fwd(**s.inputs)
    want = liger_fn.add_rms_norm.bwd(residuals, s.cots)
    for needs in product((False, True), repeat=3):
        got = liger_fn.add_rms_norm.bwd(residuals, s.cots, needs=needs)
        assert_same_bits(got, [g if n else None for g, n in zip(want, needs, strict=True)], f"gradients, wanted: {needs}")


@pytest.mark.parametrize("apart", [0, 1])
def test_wide_rows_apart(backend: str, apart: int, device: torch.device) -> None:
    """Rows of x, and of y's cotangent, that lie further apart than those of residual and of its own; and the other way round."""
    shapes = {"x": (3, 16400), "residual": (3, 16400), "weight": (16400,)}
    s = Sample(cases.ADD_RMS_NORM, cases.Case("wide", lambda m: {k: m.normal(*v) for k, v in shapes.items()}), torch.bfloat16, device)
    name = ("x", "residual")[apart]
    s.inputs[name] = restride(s.inputs[name], "sliced")
    s.cots = tuple(restride(c, "sliced") if i == apart else c for i, c in enumerate(s.cots))
    TestAddRMSNorm().judge([s])
