"""swiglu: the contract, and its oddities; donation, of all the family."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import liger_fn
from liger_fn import _launch
from tests import cases
from tests.contract import Contract, wrong
from tests.numerics import assert_same_bits, untouched


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
        wrong("multiplier", TypeError, "gate_multiplier must be a Python number", "Tensor", gate_multiplier=torch.ones(())),
        wrong("donate", TypeError, "donate must be True or False", "int", donate=1),
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


def test_falcon_h1(backend: str, device: torch.device) -> None:
    """Its MLP multiplies the gate before the activation, and what comes after the MLP by another number."""
    gate, up = torch.randn(2, 7, 63, device=device)
    want = up * F.silu(gate * 0.7) * -1.3
    torch.testing.assert_close(liger_fn.swiglu(gate, up, gate_multiplier=0.7, up_multiplier=-1.3), want)


def test_a_factor_of_negative_zero_is_zero(backend: str, device: torch.device) -> None:
    """The two are equal, and so one launch's plan is the other's: the same call must not depend on what was called before."""
    x = torch.ones(2, 8, device=device)
    for by in (0.0, -0.0):
        assert not liger_fn.swiglu(x, x, up_multiplier=by).signbit().any()


def test_halves_are_not_copied(device: torch.device) -> None:
    """The kernels read the halves of a packed projection where they are, forward and backward."""
    if not _launch.HAS_TRITON:
        pytest.skip("needs Triton")
    both = torch.randn(2, 7, 126, device=device)
    gate, up = both.chunk(2, -1)
    with _launch.record() as launches:
        y, residuals = liger_fn.swiglu.fwd(gate, up)
        liger_fn.swiglu.bwd(residuals, y)
    forward, backward = (launch.args for launch in launches)
    for args in (forward, backward[1:]):
        assert [t.data_ptr() for t in args[:2]] == [gate.data_ptr(), up.data_ptr()]
    assert forward[3:5] == (126, 126)
    assert backward[7:9] == (126, 126)


# --- donation ---------------------------------------------------------------------------------------------------------------------------

# Each op of two tensors and of one, as (op, how many, the width of each)
FAMILY = {
    "swiglu": (2, 63),
    "geglu": (2, 63),
    "reglu": (2, 63),
    "swiglu_packed": (1, 126),
    "geglu_packed": (1, 126),
    "relu_squared": (1, 63),
}


def donor(op: str, device: torch.device, layout: str = "contiguous") -> tuple[list[Tensor], list[Tensor]]:
    """(leaves, the tensors made of them that `op` takes)."""
    n, width = FAMILY[op]
    torch.manual_seed(0)
    wide = torch.randn(7, n, width, device=device, dtype=torch.bfloat16).requires_grad_()
    if layout == "halves":  # rows that alternate, in one tensor
        return [wide], list((wide * 2).unbind(1))
    return [wide], [wide[:, i] * 2 for i in range(n)]


@pytest.mark.parametrize("layout", ["contiguous", "halves"])
@pytest.mark.parametrize("op", FAMILY)
def test_donated_memory_holds_the_gradients(backend: str, device: torch.device, op: str, layout: str) -> None:
    """The same bits as without, in the memory of the inputs; the explicit pair likewise."""
    f = getattr(liger_fn, op)
    found = []
    for donate in (False, True):
        leaves, made = donor(op, device, layout)
        kept = [t.data_ptr() for t in made]
        seen: list[int] = []
        for t in made:
            t.register_hook(lambda g, seen=seen: seen.append(g.data_ptr()))
        y = f(*made, donate=donate)
        y.backward(torch.ones_like(y))
        found.append((y.detach(), leaves[0].grad))
        reused = donate and backend != "reference"
        assert (sorted(seen) == sorted(kept)) is reused
        made = [t.detach() for t in donor(op, device, layout)[1]]
        _, residuals = f.fwd(*made, donate=donate)
        before = [t.clone() for t in made]
        grads = f.bwd(residuals, torch.ones_like(y))
        assert_same_bits(made, before, "input of a bwd that may run again")
        again = f.bwd(residuals, torch.ones_like(y), donate=True)
        assert_same_bits(again, grads, "gradient")
        assert [g.data_ptr() == t.data_ptr() for g, t in zip(again, made, strict=True)] == [reused] * len(made)
    assert_same_bits(found[1], found[0], "value and gradient")


@pytest.mark.parametrize("op", FAMILY)
def test_a_graph_that_is_kept_is_not_written_to(backend: str, device: torch.device, op: str) -> None:
    leaves, made = donor(op, device)
    before = [t.detach().clone() for t in made]
    y = getattr(liger_fn, op)(*made, donate=True)
    dy = torch.ones_like(y)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert_same_bits([t.detach() for t in made], before, "input")
    assert_same_bits(torch.autograd.grad(y, leaves, dy, retain_graph=True), first, "second gradient")
    assert_same_bits(torch.autograd.grad(y, leaves, dy), first, "third gradient")


@pytest.mark.parametrize("op", FAMILY)
@pytest.mark.parametrize("which", [0, -1])
def test_who_else_saved_what_was_donated_raises(device: torch.device, op: str, which: int) -> None:
    leaves, made = donor(op, device)
    if liger_fn.backend(made[0]) == "reference":
        pytest.skip("plain PyTorch writes over nothing")
    other = made[which].sigmoid().sum() + (made[which] ** 2).sum()
    y = getattr(liger_fn, op)(*made, donate=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other, leaves)


def _expanded(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate[:1].expand(7, 63), up


def _copied(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Kernels need unit stride in the last axis."""
    return gate[:, ::2], up[:, ::2]


def _one_tensor(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate, gate.view_as(gate)


def _overlapping(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate[1:], gate[:-1]


def _overlapping_rows(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate[:, :40], gate[:, 23:]


def _overlapping_itself(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.as_strided((5, 63), (40, 1)), up[:5]


@pytest.mark.parametrize("of", [_expanded, _copied, _one_tensor, _overlapping, _overlapping_rows, _overlapping_itself])
def test_shared_memory_is_not_written_to(backend: str, device: torch.device, of: Any) -> None:
    """Donated all the same, the gradients are right, and memory that holds other numbers too is left alone."""
    found = []
    for donate in (False, True):
        leaves, made = donor("swiglu", device)
        gate, up = of(*made)
        before = gate.detach().clone()
        y = liger_fn.swiglu(gate, up, donate=donate)
        y.backward(torch.ones_like(y))
        found.append(leaves[0].grad)
        assert_same_bits([gate.detach()], [before], "gate")
    assert_same_bits(found[1:], found[:1], "gradient")


def test_leaves_and_what_needs_no_gradient_are_not_written_to(backend: str, device: torch.device) -> None:
    gate = torch.randn(7, 63, device=device, requires_grad=True)
    up = torch.randn(7, 63, device=device)
    with untouched([gate, up]):
        liger_fn.swiglu(gate, up, donate=True).sum().backward()
        liger_fn.swiglu(gate * 1, up, donate=True).sum().backward()
        liger_fn.swiglu(up, gate * 1, donate=True).sum().backward()


def test_a_cotangent_in_donated_memory(backend: str, device: torch.device) -> None:
    """`y.backward(gate)`: what is read as dy is not written to."""
    found = []
    for donate in (False, True):
        leaves, (gate, up) = donor("swiglu", device)
        dy = gate.detach()
        with untouched([dy]):
            liger_fn.swiglu(gate, up, donate=donate).backward(dy)
        found.append(leaves[0].grad)
    assert_same_bits(found[1:], found[:1], "gradient")


@pytest.mark.usefixtures("fresh_compiler")
def test_compilers_donate_nothing(backend: str, device: torch.device) -> None:
    gate, up = torch.randn(2, 7, 63, device=device)

    def pair(gate: Tensor, up: Tensor) -> Any:
        y, residuals = liger_fn.swiglu.fwd(gate, up, donate=True)
        return liger_fn.swiglu.bwd(residuals, y, donate=True)

    want = pair(gate.clone(), up.clone())
    with untouched([gate, up]):
        assert_same_bits(torch.compile(pair, fullgraph=True, backend="aot_eager")(gate, up), want, "compiled gradient")
