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
    halves = [gate_up.data_ptr(), gate_up[..., 63:].data_ptr()]
    assert [t.data_ptr() for t in forward[:2]] == halves
    assert forward[3:5] == (200, 200)
    assert [t.data_ptr() for t in backward[:5]] == [y.data_ptr(), *halves, grad.data_ptr(), grad[..., 63:].data_ptr()]
    assert grad.is_contiguous()
