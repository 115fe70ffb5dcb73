"""geglu: the contract, and its oddities."""

import pytest
import torch
import torch.nn.functional as F

import liger_fn
from tests import cases
from tests.contract import Contract, wrong


class TestGeGLU(Contract):
    table = cases.GEGLU
    wrong_calls = (
        wrong("int-gate", TypeError, "gate must be float32", "torch.int64", ".to(", gate=torch.Tensor.long),
        wrong("0-d", ValueError, "gate must have at least 1 axes", "[]", gate=lambda g: g.sum()),
        wrong("shapes", ValueError, "up must have shape [2, 5, 63]", "[2, 5, 62]", up=lambda u: u[..., 1:]),
        wrong("dtypes", TypeError, "up must be torch.float32", "torch.bfloat16", ".to(", up=torch.Tensor.bfloat16),
        wrong("multiplier", TypeError, "gate_multiplier must be a Python number", "str", gate_multiplier="2"),
        wrong("donate", TypeError, "donate must be True or False", "int", donate=1),
        wrong("approximate", ValueError, "'tanh', 'none'", "'erf'", approximate="erf"),
    )


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_is_gelu_times_up(backend: str, device: torch.device, approximate: str) -> None:
    gate, up = torch.randn(2, 7, 63, device=device)
    torch.testing.assert_close(liger_fn.geglu(gate, up, approximate=approximate), F.gelu(gate, approximate=approximate) * up)


def test_the_approximation_is_a_choice(backend: str, device: torch.device) -> None:
    gate = torch.full((1, 64), 2.0, device=device)
    one, other = (liger_fn.geglu(gate, torch.ones_like(gate), approximate=a) for a in ("tanh", "none"))
    assert 5e-5 < (one - other).abs().max() < 1e-3
    torch.testing.assert_close(liger_fn.geglu(gate, torch.ones_like(gate)), one)


@pytest.mark.parametrize("value", [-4.0, -6.0, -8.0])
def test_far_below_zero_keeps_its_digits(device: torch.device, value: float) -> None:
    """1 + tanh(u) is 0 in fp32 from u = −9 on."""
    gate = torch.full((1, 64), value, device=device)
    a = gate.double()  # in fp64 too, as a sigmoid: 1 + tanh(u) is 0 there from u = −19 on
    want = (a * torch.sigmoid((8 / torch.pi) ** 0.5 * (a + 0.044715 * a**3))).float()
    if liger_fn.backend(gate) != "reference":
        torch.testing.assert_close(liger_fn.geglu(gate, torch.ones_like(gate)), want, rtol=1e-4, atol=0)
