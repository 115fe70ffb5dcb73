"""layer_norm: the contract, and its oddities."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

import liger_fn
from liger_fn import _norm_rows
from tests import cases
from tests.contract import Contract, wrong
from tests.numerics import assert_same_bits
from tests.sample import Sample


class TestLayerNorm(Contract):
    table = cases.LAYER_NORM
    wrong_calls = (
        wrong("int-x", TypeError, "x must be float32", "torch.int64", ".to(torch.float32)", x=torch.Tensor.long),
        wrong("list-x", TypeError, "x must be a torch.Tensor", "list", x=torch.Tensor.tolist),
        wrong("int-weight", TypeError, "weight must be float32", "torch.int64", weight=torch.Tensor.long),
        wrong("int-bias", TypeError, "bias must be float32", "torch.int64", bias=torch.Tensor.long),
        wrong("0-d", ValueError, "the last axis of x", "[]", x=lambda x: x.sum()),
        wrong("no-columns", ValueError, "the last axis of x", "[2, 5, 0]", x=lambda x: x[..., :0]),
        wrong("too-wide", ValueError, "1 to 2147418112", "2147483648", "reshape", x=lambda x: x.new_empty(1, 1).expand(1, 2**31)),
        wrong("weight-shape", ValueError, "weight must have shape [63]", "[62]", weight=lambda w: w[1:]),
        wrong("bias-2d", ValueError, "bias must have shape [63]", "[1, 63]", bias=lambda b: b[None]),
        wrong("weight-device", ValueError, "weight must be on", "meta", ".to(", weight=lambda w: w.to("meta")),
        wrong("bias-device", ValueError, "bias must be on", "meta", ".to(", bias=lambda b: b.to("meta")),
    )


@pytest.mark.parametrize("h", [63, 70001])
def test_is_torchs_layer_norm(backend: str, h: int, device: torch.device) -> None:
    x, w, b = (torch.randn(*shape, device=device) for shape in ((7, h), (h,), (h,)))
    torch.testing.assert_close(liger_fn.layer_norm(x, w, b), F.layer_norm(x, (h,), w, b))
    torch.testing.assert_close(liger_fn.layer_norm.reference(x, w, b), F.layer_norm(x, (h,), w, b))


def test_rounds_once(backend: str, device: torch.device) -> None:
    """Whole numbers: every step is exact in fp32, so y is the exact result rounded to bf16, and no step before it was."""
    x = torch.tensor([[1.0, -1.0]], device=device, dtype=torch.bfloat16)
    w = torch.tensor([1.0 + 2**-10, 3.0 + 2**-9], device=device)
    b = torch.tensor([2.0**-8, -(2.0**-7)], device=device)
    y = liger_fn.layer_norm(x, w, b, eps=0.0)
    assert_same_bits((y,), ((torch.tensor([[1.0, -1.0]], device=device) * w + b).bfloat16(),), "value")
    assert not torch.equal(y, x * w.bfloat16() + b.bfloat16())


@pytest.mark.parametrize("h", [64, 16384 + 64, 65536 + 64])
def test_a_large_mean_cancels_nothing(backend: str, h: int, device: torch.device) -> None:
    """Of 4096 ± 1 the mean square in fp32 has no digit of the variance left."""
    sign = torch.ones(3, h, device=device)
    sign[:, ::2] = -1
    torch.testing.assert_close(liger_fn.layer_norm(4096 + sign, eps=0.0), sign, rtol=1e-3, atol=0)


@pytest.mark.parametrize("h", [1000, 16384, 20000, 65552, 70001])
def test_the_mean_is_rounded_once(backend: str, h: int, device: torch.device) -> None:
    """Every element of a row inherits the error of its mean: half the spacing of fp32, and next to nothing of the sum's own."""
    x = 1e4 + torch.randn(20, h, device=device)
    mean = liger_fn.layer_norm.fwd(x)[1].mean
    assert float((mean.double() - x.double().mean(-1)).abs().max()) < 0.52 * 2.0**-10


def test_mixed_dtypes(backend: str, device: torch.device) -> None:
    """y has x's dtype, and each gradient its tensor's, before autograd would make it so."""
    dtypes = torch.bfloat16, torch.float32, torch.float16
    tensors = [torch.randn(*shape, device=device, dtype=d) for shape, d in zip(((7, 63), (63,), (63,)), dtypes, strict=True)]
    y, residuals = liger_fn.layer_norm.fwd(*tensors)
    assert y.dtype is torch.bfloat16
    assert tuple(g.dtype for g in liger_fn.layer_norm.bwd(residuals, y)) == dtypes


def test_sums_over_wide_rows_in_parts(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device of many processors, where several programs share the rows of a block of columns."""
    monkeypatch.setattr(_norm_rows, "processors", lambda device: 40)
    case = cases.Case(
        "parts", lambda m: {k: m.normal(*shape) for k, shape in {"x": (35, 16400), "weight": (16400,), "bias": (16400,)}.items()}
    )
    TestLayerNorm().judge([Sample(cases.LAYER_NORM, case, torch.bfloat16, device)])


@pytest.mark.parametrize("h", [16384, 32784])
def test_each_gradient_of_wide_rows_alone(backend: str, h: int, device: torch.device) -> None:
    """What is launched depends on which are wanted; not a bit of them does."""
    case = cases.Case("wide", lambda m: {k: m.normal(*shape) for k, shape in {"x": (3, h), "weight": (h,), "bias": (h,)}.items()})
    s = Sample(cases.LAYER_NORM, case, torch.float32, device)
    _, residuals = liger_fn.layer_norm.fwd(**s.inputs)
    want = liger_fn.layer_norm.bwd(residuals, s.cots[0])
    for needs in product((False, True), repeat=3):
        got = liger_fn.layer_norm.bwd(residuals, s.cots[0], needs=needs)
        assert_same_bits(got, [g if n else None for g, n in zip(want, needs, strict=True)], f"gradients, wanted: {needs}")
