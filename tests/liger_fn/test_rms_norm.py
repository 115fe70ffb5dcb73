"""rms_norm: the contract, and its oddities."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

import liger_fn
from tests import cases
from tests.contract import Contract, restride, wrong
from tests.numerics import assert_same_bits
from tests.sample import Sample


class TestRMSNorm(Contract):
    table = cases.RMS_NORM
    wrong_calls = (
        wrong("int-x", TypeError, "x must be float32", "torch.int64", ".to(torch.float32)", x=torch.Tensor.long),
        wrong("list-x", TypeError, "x must be a torch.Tensor", "list", x=torch.Tensor.tolist),
        wrong("int-weight", TypeError, "weight must be float32", "torch.int64", weight=torch.Tensor.long),
        wrong("0-d", ValueError, "the last axis of x", "[]", x=lambda x: x.sum()),
        wrong("no-columns", ValueError, "the last axis of x", "[2, 5, 0]", x=lambda x: x[..., :0]),
        wrong("too-wide", ValueError, "1 to 2147418112", "2147483648", "reshape", x=lambda x: x.new_empty(1, 1).expand(1, 2**31)),
        wrong("weight-shape", ValueError, "weight must have shape [63]", "[62]", weight=lambda w: w[1:]),
        wrong("weight-2d", ValueError, "weight must have shape [63]", "[1, 63]", weight=lambda w: w[None]),
        wrong("weight-device", ValueError, "weight must be on", "meta", ".to(", weight=lambda w: w.to("meta")),
        wrong("cast", ValueError, "'llama', 'gemma', 'none'", "'mistral'", cast="mistral"),
    )


def test_is_torchs_rms_norm(backend: str, device: torch.device) -> None:
    x, w = torch.randn(7, 63, device=device), torch.randn(63, device=device)
    torch.testing.assert_close(liger_fn.rms_norm(x, w, 1e-5), F.rms_norm(x, (63,), w, 1e-5))
    torch.testing.assert_close(liger_fn.rms_norm.reference(x, w, 1e-5), F.rms_norm(x, (63,), w, 1e-5))


@pytest.mark.parametrize(("cast", "dtype"), [("llama", torch.float32), ("gemma", torch.bfloat16), ("none", torch.float32)])
def test_output_dtype_of_mixed_inputs(backend: str, device: torch.device, cast: str, dtype: torch.dtype) -> None:
    x, w = torch.randn(7, 63, device=device, dtype=torch.bfloat16), torch.randn(63, device=device)
    assert liger_fn.rms_norm(x, w, cast=cast).dtype is dtype
    assert liger_fn.rms_norm(x, cast=cast).dtype is torch.bfloat16


def test_llama_cast_rounds_before_the_weight(backend: str, device: torch.device) -> None:
    """As LlamaRMSNorm does: the two casts differ, and in bits."""
    x, w = torch.randn(7, 63, device=device, dtype=torch.bfloat16), torch.randn(63, device=device)
    rounded = liger_fn.rms_norm(x)
    assert torch.equal(liger_fn.rms_norm(x, w, cast="llama"), w * rounded)
    assert not torch.equal(liger_fn.rms_norm(x, w, cast="none"), w * rounded)


@pytest.mark.parametrize("h", [16384, 32784])
def test_each_gradient_of_wide_rows_alone(backend: str, h: int, device: torch.device) -> None:
    """What is launched depends on which are wanted; not a bit of them does."""
    case = cases.Case("wide", lambda m: {k: m.normal(*shape) for k, shape in {"x": (3, h), "weight": (h,)}.items()})
    s = Sample(cases.RMS_NORM, case, torch.float32, device)
    _, residuals = liger_fn.rms_norm.fwd(**s.inputs)
    want = liger_fn.rms_norm.bwd(residuals, s.cots[0])
    for needs in product((False, True), repeat=2):
        got = liger_fn.rms_norm.bwd(residuals, s.cots[0], needs=needs)
        assert_same_bits(got, [g if n else None for g, n in zip(want, needs, strict=True)], f"gradients, wanted: {needs}")


@pytest.mark.parametrize("h", [16400, 32784])
def test_wide_rows_apart(backend: str, h: int, device: torch.device) -> None:
    """Rows of x that lie further apart than those of dy, and the other way round."""
    case = cases.Case("wide", lambda m: {k: m.normal(*shape) for k, shape in {"x": (3, h), "weight": (h,)}.items()})
    for apart in ("x", "dy"):
        s = Sample(cases.RMS_NORM, case, torch.bfloat16, device)
        if apart == "x":
            s.inputs["x"] = restride(s.inputs["x"], "sliced")
        else:
            s.cots = tuple(restride(c, "sliced") for c in s.cots)
        TestRMSNorm().judge([s])
