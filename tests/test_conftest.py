"""The net under the other tests: what must catch a wrong kernel does."""

from __future__ import annotations

import pytest
import torch

import liger_fn
from liger_fn import _launch
from tests import cases
from tests.cases import BF16, FP32
from tests.contract import restride
from tests.numerics import assert_near, assert_same_bits, untouched
from tests.sample import Sample


@pytest.mark.parametrize("dtype", [*cases.HALVES, torch.float64])
def test_uninitialised_memory_is_nan(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.ones(3, 5, dtype=dtype, device=device)
    for made in (
        torch.empty(7, dtype=dtype, device=device),
        torch.empty_like(x),
        torch.empty_like(x.T),
        x.new_empty(4),
        torch.empty_strided((3, 2), (2, 1), dtype=dtype, device=device),
        x.clone().resize_(100)[15:],
    ):
        assert bool(made.isnan().all())
    assert bool((torch.empty(7, dtype=torch.int64, device=device) == torch.iinfo(torch.int64).max).all())


@pytest.mark.parametrize("op", cases.TABLES)
def test_unwritten_outputs_show(op: str, device: torch.device) -> None:
    """An op none of whose kernels run returns NaN, so one that leaves out a single element does."""
    if liger_fn.backend(torch.zeros(1, device=device)) == "reference":
        pytest.skip("needs kernels")
    s = Sample(cases.TABLES[op], cases.TABLES[op].typical, FP32, device)
    with _launch.record() as launches:
        values, grads = s.ours()
    assert launches
    shown = values if cases.TABLES[op].autocast else (*values, *grads)  # a matrix product of finite numbers is finite
    assert all(bool(t.isnan().any()) for t in shown)


def test_the_rule_allows_one_rounding_and_no_more() -> None:
    truth = torch.linspace(1, 2, 1001, dtype=torch.float64)
    exact = truth.to(BF16)
    assert_near(exact, exact, truth, "one rounding")
    worse = (exact.view(torch.int16) + 2).view(BF16)
    with pytest.raises(AssertionError, match="over"):
        assert_near(worse, exact, truth, "two bits off")
    assert_near(worse, worse, truth, "no worse than naive")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_rule_sees_special_values(bad: float) -> None:
    truth = torch.ones(5, dtype=torch.float64)
    ours = truth.float().clone()
    ours[2] = bad
    with pytest.raises(AssertionError, match="differ"):
        assert_near(ours, truth.float(), truth, "special")
    with pytest.raises(AssertionError, match="differ"):
        assert_near(truth.float(), ours, ours.double(), "hidden")


def test_dtypes_and_shapes_count() -> None:
    truth = torch.ones(5, dtype=torch.float64)
    with pytest.raises(AssertionError, match="bfloat16"):
        assert_near(truth.to(BF16), truth.float(), truth, "dtype")
    with pytest.raises(AssertionError, match="shape"):
        assert_near(truth.float()[None], truth.float(), truth, "shape")


def test_writes_are_seen() -> None:
    x = torch.tensor([1.0, 0.0, torch.nan])
    with untouched([x, None]):
        x.clone().mul_(2)
    for change in (lambda: x.mul_(2), lambda: x[1].neg_()):
        with pytest.raises(AssertionError, match="written to"), untouched([x]):
            change()
    with pytest.raises(AssertionError, match="1 of 3 elements differ"):
        assert_same_bits([torch.tensor([1.0, 2.0, 3.0])], [torch.tensor([1.0, 2.0, 3.0 + 1e-6])], "value")


@pytest.mark.parametrize("layout", ["transposed", "sliced", "stride-2"])
def test_layouts_differ_and_hold_the_same_numbers(layout: str) -> None:
    x = torch.randn(3, 5)
    y = restride(x, layout)
    assert torch.equal(x, y)
    assert not y.is_contiguous()
    if layout != "transposed":
        assert bool(y.as_strided((y.untyped_storage().nbytes() // 4,), (1,), 0).isnan().any())
