"""group_norm: the contract, and its oddities."""

import sys

import pytest
import torch
import torch.nn.functional as F

import liger_fn
from liger_fn import _group_rows
from tests import cases
from tests.contract import Contract, wrong
from tests.numerics import assert_same_bits
from tests.sample import Sample


class TestGroupNorm(Contract):
    table = cases.GROUP_NORM
    wrong_calls = (
        wrong("int-x", TypeError, "x must be float32", "torch.int64", ".to(torch.float32)", x=torch.Tensor.long),
        wrong("list-x", TypeError, "x must be a torch.Tensor", "list", x=torch.Tensor.tolist),
        wrong("int-weight", TypeError, "weight must be float32", "torch.int64", weight=torch.Tensor.long),
        wrong("int-bias", TypeError, "bias must be float32", "torch.int64", bias=torch.Tensor.long),
        wrong("1-d", ValueError, "x must have at least 2 axes", "[2]", ".unsqueeze(0)", x=lambda x: x[:, 0, 0, 0]),
        wrong("groups-do-not-divide", ValueError, "num_groups must divide", "6 channels", "got 4", "divisor of 6", num_groups=4),
        wrong("no-groups", ValueError, "num_groups must be an integer of at least 1", "got 0", num_groups=0),
        wrong("fraction-of-groups", ValueError, "num_groups must be an integer", "got 3.0", num_groups=3.0),
        wrong("groups-true", ValueError, "num_groups must be an integer", "got True", num_groups=True),
        wrong("no-space", ValueError, "a group must have 1 to", "[2, 6, 0, 7]", "3 groups", x=lambda x: x[:, :, :0]),
        wrong("no-channels", ValueError, "a group must have 1 to", "[2, 0, 5, 7]", x=lambda x: x[:, :0]),
        wrong(
            "too-large",
            ValueError,
            "1 to 2147418112",
            "2147483648",
            "reshape",
            num_groups=1,
            x=lambda x: x.new_empty(1, 1).expand(3, 2**31),
        ),
        wrong("weight-shape", ValueError, "weight must have shape [6]", "channels", "[5]", weight=lambda w: w[1:]),
        wrong("bias-2d", ValueError, "bias must have shape [6]", "[1, 6]", bias=lambda b: b[None]),
        wrong("weight-device", ValueError, "weight must be on", "meta", ".to(", weight=lambda w: w.to("meta")),
        wrong("bias-device", ValueError, "bias must be on", "meta", ".to(", bias=lambda b: b.to("meta")),
    )


@pytest.mark.parametrize(("shape", "groups"), [((7, 12, 5, 3), 4), ((3, 12), 4), ((2, 6, 131, 130), 2), ((5, 6, 140, 130), 3)])
def test_is_torchs_group_norm(backend: str, shape: tuple[int, ...], groups: int, device: torch.device) -> None:
    x, w, b, dy = (torch.randn(*s, device=device) for s in (shape, shape[1:2], shape[1:2], shape))
    want = F.group_norm(x, groups, w, b)
    torch.testing.assert_close(liger_fn.group_norm(x, groups, w, b), want)
    torch.testing.assert_close(liger_fn.group_norm.reference(x, groups, w, b), want)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    got = torch.autograd.grad(liger_fn.group_norm(x, groups, w, b), leaves, dy)
    wide = [t.detach().double().requires_grad_() for t in leaves]  # torch's own fp32 sums of tens of thousands of terms are off by more
    want_grads = torch.autograd.grad(F.group_norm(wide[0], groups, *wide[1:]), wide, dy.double())
    for a, c, error in zip(got, want_grads, (1e-5, 1e-4, 1e-4), strict=True):  # the last two are hundreds
        torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=error)


def test_one_group_of_a_row_is_layer_norm(backend: str, device: torch.device) -> None:
    x, w, b = (torch.randn(*s, device=device) for s in ((7, 63), (63,), (63,)))
    torch.testing.assert_close(liger_fn.group_norm(x, 1, w, b), liger_fn.layer_norm(x, w, b))


def test_rounds_once(backend: str, device: torch.device) -> None:
    """Whole numbers: every step is exact in fp32, so y is the exact result rounded to bf16, and no step before it was."""
    x = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]], device=device, dtype=torch.bfloat16)
    w = torch.tensor([1.0 + 2**-10, 3.0 + 2**-9], device=device)
    b = torch.tensor([2.0**-8, -(2.0**-7)], device=device)
    y = liger_fn.group_norm(x, 1, w, b, eps=0.0)
    assert_same_bits((y,), ((x.float() * w[:, None] + b[:, None]).bfloat16(),), "value")
    assert not torch.equal(y, x * w.bfloat16()[:, None] + b.bfloat16()[:, None])


@pytest.mark.parametrize("s", [64, 40000])
@pytest.mark.parametrize("n", [1, 5])
def test_a_large_mean_cancels_nothing(backend: str, s: int, n: int, device: torch.device) -> None:
    """Of 4096 ± 1 the mean square in fp32 has no digit of the variance left."""
    sign = torch.ones(n, 4, s, device=device)
    sign[..., ::2] = -1
    torch.testing.assert_close(liger_fn.group_norm(4096 + sign, 2, eps=0.0), sign, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("shape", "groups"), [((5, 8, 125), 4), ((2, 6, 131, 130), 2), ((5, 6, 140, 130), 3)])
def test_the_mean_is_rounded_once(backend: str, shape: tuple[int, ...], groups: int, device: torch.device) -> None:
    """Every element of a group inherits the error of its mean: half the spacing of fp32, and next to nothing of the sum's own."""
    x = 1e4 + torch.randn(*shape, device=device)
    mean = liger_fn.group_norm.fwd(x, groups)[1].mean
    truth = x.double().reshape(shape[0] * groups, -1).mean(-1)
    assert float((mean.double() - truth).abs().max()) < 0.52 * 2.0**-10


@pytest.mark.parametrize("weight", [True, False])
def test_nothing_is_left_of_one_element(backend: str, weight: bool, device: torch.device) -> None:
    """The output does not depend on a group that is one element: its gradient is zero, and not the rounding of a product."""
    x = torch.randn(5, 7, device=device, requires_grad=True)
    w = torch.randn(7, device=device) if weight else None
    (dx,) = torch.autograd.grad(liger_fn.group_norm(x, 7, w), x, torch.randn(5, 7, device=device))
    assert torch.equal(dx, torch.zeros_like(dx))


def test_memory_format(backend: str, device: torch.device) -> None:
    """Of channels-last x the numbers are those of contiguous x, and y is contiguous."""
    x, w = torch.randn(2, 6, 5, 7, device=device), torch.randn(6, device=device)
    y = liger_fn.group_norm(x.contiguous(memory_format=torch.channels_last), 3, w)
    assert_same_bits((y,), (liger_fn.group_norm(x, 3, w),), "value")
    assert y.is_contiguous()


def test_mixed_dtypes(backend: str, device: torch.device) -> None:
    """y has x's dtype, and each gradient its tensor's, before autograd would make it so."""
    dtypes = torch.bfloat16, torch.float32, torch.float16
    x, w, b = (torch.randn(*shape, device=device, dtype=d) for shape, d in zip(((7, 6, 5), (6,), (6,)), dtypes, strict=True))
    y, residuals = liger_fn.group_norm.fwd(x, 3, w, b)
    assert y.dtype is torch.bfloat16
    assert tuple(g.dtype for g in liger_fn.group_norm.bwd(residuals, y)) == dtypes


@pytest.mark.parametrize("shape", [(2, 6, 33), (2, 10, 3, 2), (1, 2, 150)])
@pytest.mark.parametrize("enough", [0, 2**20])
def test_many_blocks_and_parts(
    backend: str, shape: tuple[int, ...], enough: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels for large groups at small ones, cut into many pieces: every loop runs several times."""
    module = sys.modules["liger_fn.group_norm"]
    monkeypatch.setattr(module, "FWD_MOST", 0)
    monkeypatch.setattr(module, "BWD_MOST", 0)
    for name, value in (("BLOCK", 32), ("TILE", 16), ("MERGED", 4), ("ENOUGH", enough), ("WARPS", 1)):
        monkeypatch.setattr(_group_rows, name, value)
    _group_rows.tile.cache_clear()
    for groups in (1, shape[1]):
        case = cases.Case(
            "parts",
            lambda m: {k: m.normal(*s) for k, s in {"x": shape, "weight": shape[1:2], "bias": shape[1:2]}.items()},
            {"num_groups": groups},
        )
        TestGroupNorm().judge([Sample(cases.GROUP_NORM, case, torch.bfloat16, device)])
    monkeypatch.undo()
    _group_rows.tile.cache_clear()
