"""softmax: the contract, and its oddities."""

import pytest
import torch

import liger_fn
from tests import cases
from tests.contract import Contract, wrong
from tests.numerics import assert_near


class TestSoftmax(Contract):
    table = cases.SOFTMAX
    wrong_calls = (
        wrong("int", TypeError, "x must be float32", "torch.int64", ".to(", x=torch.Tensor.long),
        wrong("0-d", ValueError, "x must have at least 1 axes", "[]", x=lambda x: x.sum()),
        wrong("empty", ValueError, "at least 1 element", "0", x=lambda x: x[..., :0]),
        wrong("list", TypeError, "x must be a torch.Tensor", "list", x=torch.Tensor.tolist),
    )


@pytest.mark.parametrize("h", [1, 63, 16384, 16385, 40000])
def test_is_torchs(backend: str, h: int, device: torch.device) -> None:
    """On both sides of the width that a program holds."""
    x = 3 * torch.randn(64, h, device=device)
    assert_near(liger_fn.softmax(x), torch.softmax(x, -1), torch.softmax(x.double(), -1), f"softmax of {h}")


def test_a_constant_cotangent_leaves_nothing(backend: str, device: torch.device) -> None:
    """The sum of a softmax is 1 whatever x is: what is left of the gradient is far below one rounding of a term."""
    for h in (63, 40000):
        x = (3 * torch.randn(3, h, device=device)).requires_grad_()
        (dx,) = torch.autograd.grad((0.7 * liger_fn.softmax(x)).sum(), x)
        assert dx.abs().sum(-1).max() < 1e-9, h


def test_a_row_of_minus_infinity_is_nan(backend: str, device: torch.device) -> None:
    x = torch.zeros(2, 63, device=device)
    x[0] = -torch.inf
    y = liger_fn.softmax(x)
    assert y[0].isnan().all()
    assert not y[1].isnan().any()
