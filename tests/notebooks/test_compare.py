"""The words of a comparison: what kind of wrong an array is."""

from __future__ import annotations

import math

import pytest
import torch
from course import Wrong, near, same

TRUTH = torch.linspace(1, 2, 48, dtype=torch.float64).view(6, 8)


def changed(rows: slice, columns: slice, value: float) -> torch.Tensor:
    out = TRUTH.float()
    out[rows, columns] = value
    return out


@pytest.mark.parametrize(
    ("got", "says"),
    [
        (TRUTH.float() * 8, r"times 8, everywhere"),
        (TRUTH.float() / 8, r"\(1/8\)"),
        (-TRUTH.float(), "times -1"),
        (TRUTH.float() + 1, "plus 1"),
        (torch.zeros(6, 8), "zero everywhere"),
        (changed(slice(4, 6), slice(None), 9.0), "rows 4 to 5"),
        (changed(slice(None), slice(5, 8), 9.0), "columns 5 to 7"),
        (changed(slice(0, 1), slice(3, 4), 9.0), "1 of 48 elements"),
        (changed(slice(2, 3), slice(None), math.nan), "never written"),
        (TRUTH.float().T, r"shape \[8, 6\], expected \[6, 8\]"),
        (TRUTH.long(), "dtype torch.int64"),
        (None, "must be a tensor, got NoneType"),
    ],
)
def test_what_is_wrong_is_said(got: object, says: str) -> None:
    with pytest.raises(Wrong, match=says):
        near("y", got, TRUTH)


def test_rounding_passes_and_more_does_not() -> None:
    near("y", TRUTH.float(), TRUTH)
    near("y", TRUTH.bfloat16(), TRUTH)
    with pytest.raises(Wrong, match="is rounding"):
        near("y", TRUTH.bfloat16().float(), TRUTH)
    near("y", TRUTH.bfloat16().float(), TRUTH, naive=TRUTH.bfloat16())


def test_infinities_must_be_in_place() -> None:
    truth = TRUTH.clone()
    truth[0, 0] = math.inf
    near("y", truth.float(), truth)
    with pytest.raises(Wrong, match="not finite"):
        near("y", TRUTH.float(), truth)


def test_a_count_names_both() -> None:
    same("bytes", 8, 8)
    with pytest.raises(Wrong, match="bytes is 4, expected 8: two arrays"):
        same("bytes", 4, 8, "two arrays")
