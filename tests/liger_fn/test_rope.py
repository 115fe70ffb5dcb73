"""rope: the contract, and its oddities."""

import pytest
import torch
from torch import Tensor

import liger_fn
from tests import cases
from tests.contract import Contract, wrong
from tests.sample import Sample


class TestRope(Contract):
    table = cases.ROPE
    wrong_calls = (
        wrong("int-q", TypeError, "q must be float32", "torch.int64", ".to(", q=torch.Tensor.long),
        wrong("3-d", ValueError, "q must be [batch, heads, length", "[3, 5, 10]", q=lambda q: q[0]),
        wrong("odd-head", ValueError, "even head dimension", "[2, 3, 5, 9]", q=lambda q: q[..., :9]),
        wrong("k-length", ValueError, "k must be [2, k_heads, 5, 10]", "[2, 1, 4, 10]", k=lambda k: k[:, :, 1:]),
        wrong("k-dtype", TypeError, "k must be torch.float32", "torch.bfloat16", ".to(", k=torch.Tensor.bfloat16),
        wrong("partial-cos", ValueError, "cos must be [2 or 1, 5, 10]", "[2, 5, 6]", cos=lambda c: c[..., :6]),
        wrong("partial-sin", ValueError, "sin must be [2 or 1, 5, 10]", "[2, 5, 6]", sin=lambda s: s[..., :6]),
        wrong("half-tables", ValueError, "cos must be [2 or 1, 5, 10]", "[2, 5, 5]", cos=lambda c: c[..., :5]),
        wrong("longer-tables", ValueError, "cos must be", "[2, 6, 10]", cos=lambda c: c.new_ones(2, 6, 10)),
        wrong("4-d-tables", ValueError, "cos must be", "[2, 1, 5, 10]", cos=lambda c: c[:, None]),
        wrong("device", ValueError, "cos must be on", "meta", ".to(", cos=lambda c: c.to("meta")),
        wrong("learned-cos", ValueError, "no gradient is computed for cos", "cos.detach()", cos=lambda c: c.clone().requires_grad_()),
    )


def test_is_a_rotation_of_pairs(backend: str, device: torch.device) -> None:
    """By complex numbers: channel i and channel i + D/2 are one, which turns by its angle."""
    q, k = torch.randn(2, 3, 5, 10, device=device), torch.randn(2, 1, 5, 10, device=device)
    angle = torch.randn(2, 5, 5, device=device)
    table = torch.cat((angle, angle), -1)
    for x, y in zip((q, k), liger_fn.rope(q, k, table.cos(), table.sin()), strict=True):
        turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)[:, None]
        torch.testing.assert_close(y, torch.cat((turned.real, turned.imag), -1))


@pytest.mark.parametrize("which", ["first", "second"])
def test_one_output_used(backend: str, which: str, device: torch.device) -> None:
    """The cotangent of an output that nobody reads is zeros, not an error."""
    s = Sample(cases.ROPE, cases.ROPE.typical, torch.float32, device)
    i = ("first", "second").index(which)
    leaves = [t.detach().requires_grad_() for t in s.tensors]
    grads = torch.autograd.grad(s.f()(*leaves)[i], leaves, s.cots[i])
    assert torch.equal(grads[i], s.ours()[1][i])
    assert not grads[1 - i].any()


def test_layout_is_kept(backend: str, device: torch.device) -> None:
    """A transposed view in, a transposed view out: attention's reshape after it then copies nothing."""
    s = Sample(cases.ROPE, cases.ROPE.sized(5), torch.float32, device)
    values, grads = s.ours()
    assert [v.stride() for v in values] == [t.stride() for t in s.tensors]
    assert all(g.shape == t.shape for g, t in zip(grads, s.tensors, strict=True))


def test_a_table_differentiated_under_a_transform_is_refused(backend: str, device: torch.device) -> None:
    """vmap hides that cos is differentiated; a gradient of zero would be wrong."""
    q, cos = torch.randn(3, 1, 2, 4, 6, device=device), torch.randn(3, 1, 4, 6, device=device)

    def loss(cos: Tensor) -> Tensor:
        return torch.func.vmap(lambda q, c: liger_fn.rope(q, q, c, c)[0])(q, cos).sum()

    with pytest.raises(ValueError, match=r"^rope: no gradient is computed for cos"):
        torch.func.grad(loss)(cos)
