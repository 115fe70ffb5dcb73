"""softmax: the contract, and its oddities."""

import pytest
import torch

import liger_fn
from tests import cases
from tests.contract import Contract, wrong


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
    x = 3 * torch.randn(3, h, device=device)
    torch.testing.assert_close(liger_fn.softmax(x), torch.softmax(x.double(), -1).float(), rtol=2e-6, atol=0.0)


def test_a_row_of_minus_infinity_is_nan(backend: str, device: torch.device) -> None:
    x = torch.zeros(2, 63, device=device)
    x[0] = -torch.inf
    y = liger_fn.softmax(x)
    assert y[0].isnan().all()
    assert not y[1].isnan().any()
