"""relu_squared: the contract, and its oddities."""

import torch
import torch.nn.functional as F

import liger_fn
from tests import cases
from tests.contract import Contract, wrong


class TestReLUSquared(Contract):
    table = cases.RELU_SQUARED
    wrong_calls = (
        wrong("int-x", TypeError, "x must be float32", "torch.int64", ".to(", x=torch.Tensor.long),
        wrong("0-d", ValueError, "x must have at least 1 axes", "[]", x=lambda x: x.sum()),
        wrong("donate", TypeError, "donate must be True or False", "NoneType", donate=None),
    )


def test_is_relu_squared(backend: str, device: torch.device) -> None:
    x = torch.randn(7, 63, device=device)
    torch.testing.assert_close(liger_fn.relu_squared(x), F.relu(x) ** 2)
