"""swiglu_packed and geglu_packed: the contract, and their oddities."""

import pytest
import torch
import torch.nn.functional as F

import liger_fn
from liger_fn import _launch
from tests import cases
from tests.contract import Contract, wrong
from tests.numerics import assert_same_bits

WRONG = (
    wrong("int", TypeError, "gate_up must be float32", "torch.int64", ".to(", gate_up=torch.Tensor.long),
    wrong("0-d", ValueError, "gate_up must have at least 1 axes", "[]", gate_up=lambda t: t.sum()),
    wrong("odd", ValueError, "must be even", "[2, 5, 125]", "for two tensors use", gate_up=lambda t: t[..., 1:]),
    wrong("multiplier", TypeError, "up_multiplier must be a Python number", "Tensor", up_multiplier=torch.ones(())),
    wrong("donate", TypeError, "donate must be True or False", "int", donate=0),
)


class TestSwiGLUPacked(Contract):
    table = cases.SWIGLU_PACKED
    wrong_calls = WRONG


class TestGEGLUPacked(Contract):
    table = cases.GEGLU_PACKED
    wrong_calls = (*WRONG, wrong("approximate", ValueError, "'tanh', 'none'", "'erf'", approximate="erf"))


@pytest.mark.parametrize(("op", "of_two"), [("swiglu_packed", "swiglu"), ("geglu_packed", "geglu")])
def test_is_the_function_of_the_halves(backend: str, device: torch.device, op: str, of_two: str) -> None:
    """Bit for bit, values and gradients; gate is the first half."""
    both = torch.randn(3, 7, 126, device=device, dtype=torch.bfloat16, requires_grad=True)
    y, want = getattr(liger_fn, op)(both), getattr(liger_fn, of_two)(*both.chunk(2, -1))
    assert_same_bits([y], [want], "value")
    dy = torch.randn(3, 7, 63, device=device, dtype=torch.bfloat16)
    assert_same_bits(torch.autograd.grad(y, both, dy), torch.autograd.grad(want, both, dy), "gradient")


def test_gate_is_first(backend: str, device: torch.device) -> None:
    both = torch.randn(7, 126, device=device)
    torch.testing.assert_close(liger_fn.swiglu_packed(both), F.silu(both[:, :63]) * both[:, 63:])


def test_one_gradient_and_no_copy(device: torch.device) -> None:
    """Forward reads gate_up where it is, also where its rows are apart; backward writes the halves of one tensor."""
    if not _launch.HAS_TRITON:
        pytest.skip("needs Triton")
    gate_up = torch.randn(3, 7, 200, device=device)[..., 10:136]
    with _launch.record() as launches:
        y, residuals = liger_fn.swiglu_packed.fwd(gate_up)
        (grad,) = liger_fn.swiglu_packed.bwd(residuals, y)
    forward, backward = (launch.args for launch in launches)
    assert all(launch.meta["PACKED"] for launch in launches)  # up stands behind gate: each is the tensor itself, given twice
    assert [t.data_ptr() for t in forward[:3]] == [gate_up.data_ptr(), gate_up.data_ptr(), y.data_ptr()]
    assert forward[3:6] == (200, 200, 63)
    assert [t.data_ptr() for t in backward[:5]] == [t.data_ptr() for t in (y, gate_up, gate_up, grad, grad)]
    assert backward[6:11] == (63, 200, 200, 126, 126)
    assert grad.is_contiguous()


def test_rows_that_are_whole_are_not_viewed(device: torch.device) -> None:
    """A view costs the host as much as an allocation: kernels are given contiguous tensors as they are, whatever their axes."""
    if not _launch.HAS_TRITON:
        pytest.skip("needs Triton")
    gate_up = torch.randn(3, 7, 126, device=device)
    with _launch.record() as launches:
        y, residuals = liger_fn.swiglu_packed.fwd(gate_up)
        (grad,) = liger_fn.swiglu_packed.bwd(residuals, y)
    forward, backward = (launch.args for launch in launches)
    assert all(a is b for a, b in zip((*forward[:3], *backward[:5]), (gate_up, gate_up, y, y, gate_up, gate_up, grad, grad), strict=True))


def test_gradient_over_rows_that_are_apart(backend: str, device: torch.device) -> None:
    """Donated rows of a wider tensor hold the gradient, and what stands between them is left alone."""
    if backend == "reference":
        pytest.skip("plain PyTorch writes over nothing")
    wide = torch.randn(7, 200, device=device)
    part = wide[:, 10:136]
    y, residuals = liger_fn.swiglu_packed.fwd(part.clone())
    dy = torch.randn_like(y)
    (want,) = liger_fn.swiglu_packed.bwd(residuals, dy)
    before = wide.clone()
    _, residuals = liger_fn.swiglu_packed.fwd(part, donate=True)
    (grad,) = liger_fn.swiglu_packed.bwd(residuals, dy, donate=True)
    assert grad.data_ptr() == part.data_ptr()
    before[:, 10:136] = want
    assert_same_bits([wide], [before], "wide")
