"""reglu: the contract, and its oddities."""

import torch
import torch.nn.functional as F

import liger_fn
from tests import cases
from tests.contract import Contract, wrong


class TestReGLU(Contract):
    table = cases.REGLU
    wrong_calls = (
        wrong("int-gate", TypeError, "gate must be float32", "torch.int64", ".to(", gate=torch.Tensor.long),
        wrong("0-d", ValueError, "gate must have at least 1 axes", "[]", gate=lambda g: g.sum()),
        wrong("shapes", ValueError, "up must have shape [2, 5, 63]", "[2, 5, 62]", up=lambda u: u[..., 1:]),
        wrong("dtypes", TypeError, "up must be torch.float32", "torch.bfloat16", ".to(", up=torch.Tensor.bfloat16),
        wrong("multiplier", TypeError, "gate_multiplier must be a Python number", "str", gate_multiplier="2"),
        wrong("donate", TypeError, "donate must be True or False", "int", donate=1),
    )


def test_is_relu_times_up(backend: str, device: torch.device) -> None:
    gate, up = torch.randn(2, 7, 63, device=device)
    torch.testing.assert_close(liger_fn.reglu(gate, up), F.relu(gate) * up)
