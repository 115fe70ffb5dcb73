"""swiglu_mlp: the contract, and its oddities."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import liger_fn
from tests import cases
from tests.contract import Contract, wrong
from tests.numerics import assert_near, assert_same_bits


class TestSwiGLUMLP(Contract):
    table = cases.SWIGLU_MLP
    wrong_calls = (
        wrong("int-x", TypeError, "x must be float32", "torch.int64", ".to(", x=torch.Tensor.long),
        wrong("0-d", ValueError, "x must have at least 1 axes", "[]", x=lambda x: x.sum()),
        wrong("transposed", ValueError, "w_gate must be [I, 24]", "[24, 63]", w_gate=lambda w: w.T),
        wrong("w-up", ValueError, "w_up must have shape [63, 24]", "[62, 24]", w_up=lambda w: w[1:]),
        wrong("w-down", ValueError, "w_down must be [O, 63]", "[63, 24]", w_down=lambda w: w.T),
        wrong("dtype", TypeError, "w_up must be torch.float32", "torch.bfloat16", ".to(", w_up=torch.Tensor.bfloat16),
        wrong("device", ValueError, "w_down must be on", "meta", ".to(", w_down=lambda w: w.to("meta")),
        wrong("multiplier", TypeError, "up_multiplier must be a Python number", "bool", up_multiplier=True),
    )


def inputs(device: torch.device) -> list[Tensor]:
    return [torch.randn(*shape, device=device, requires_grad=True) for shape in ((2, 5, 24), (63, 24), (63, 24), (24, 63))]


def test_is_the_mlp(backend: str, device: torch.device) -> None:
    def plain(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)

    tensors = [t.detach() for t in inputs(device)]
    assert_near(liger_fn.swiglu_mlp(*tensors), plain(*tensors), plain(*(t.double() for t in tensors)), "swiglu_mlp")


def test_saves_two_activations(backend: str, device: torch.device) -> None:
    """The projections of x, and not their gated product."""
    tensors = inputs(device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        liger_fn.swiglu_mlp(*tensors)
    own = [t for t in saved if all(t.data_ptr() != i.data_ptr() for i in tensors)]
    assert [list(t.shape) for t in own] == [[10, 63], [10, 63]]


def test_what_backward_makes_is_written_over_what_it_needs_no_more(device: torch.device) -> None:
    """With `donate`, dg and du go where g and u were; without, g and u stay."""
    tensors = [t.detach() for t in inputs(device)]
    y, residuals = liger_fn.swiglu_mlp.fwd(*tensors)
    before = [residuals.gate.clone(), residuals.up.clone()]
    want = liger_fn.swiglu_mlp.bwd(residuals, y)
    assert_same_bits([residuals.gate, residuals.up], before, "projection")
    assert_same_bits(liger_fn.swiglu_mlp.bwd(residuals, y, donate=True), want, "gradient")
    if liger_fn.backend(y) != "reference":
        assert not torch.equal(residuals.gate, before[0])
        assert not torch.equal(residuals.up, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_takes_all_four_in_its_dtype(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    with torch.autocast(device.type, torch.bfloat16):
        assert liger_fn.swiglu_mlp(*(t.to(dtype) for t in inputs(device))).dtype is torch.bfloat16
