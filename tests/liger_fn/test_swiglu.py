"""swiglu: the contract, and its oddities."""

import torch
import torch.nn.functional as F

import liger_fn
from tests import cases
from tests.contract import Contract, wrong


class TestSwiGLU(Contract):
    table = cases.SWIGLU
    wrong_calls = (
        wrong("int-gate", TypeError, "gate must be float32", "torch.int64", ".to(", gate=torch.Tensor.long),
        wrong("no-tensor", TypeError, "up must be a torch.Tensor", "NoneType", up=None),
        wrong("0-d", ValueError, "gate must have at least 1 axes", "[]", gate=lambda g: g.sum()),
        wrong("shapes", ValueError, "up must have shape [2, 5, 63]", "[2, 5, 62]", up=lambda u: u[..., 1:]),
        wrong("broadcast", ValueError, "up must have shape [2, 5, 63]", "[63]", up=lambda u: u[0, 0]),
        wrong("dtypes", TypeError, "up must be torch.float32", "torch.bfloat16", ".to(", up=torch.Tensor.bfloat16),
        wrong("devices", ValueError, "up must be on", "meta", ".to(", up=lambda u: u.to("meta")),
    )


def test_is_silu_times_up(backend: str, device: torch.device) -> None:
    gate, up = torch.randn(2, 7, 63, device=device)
    torch.testing.assert_close(liger_fn.swiglu(gate, up), F.silu(gate) * up)


def test_halves_of_one_projection(backend: str, device: torch.device) -> None:
    """gate and up as views of one fused projection, and one tensor as both."""
    both = torch.randn(7, 126, device=device, requires_grad=True)
    y = liger_fn.swiglu(*both.chunk(2, -1))
    want = liger_fn.swiglu(*(t.contiguous() for t in both.chunk(2, -1)))
    torch.testing.assert_close(y, want)
    (grad,) = torch.autograd.grad(y.sum(), both, retain_graph=True)
    (want_grad,) = torch.autograd.grad(want.sum(), both)
    torch.testing.assert_close(grad, want_grad)
    same = torch.randn(7, 63, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(liger_fn.swiglu(same, same).sum(), same)
    torch.testing.assert_close(grad, torch.autograd.grad((F.silu(same) * same).sum(), same)[0])
