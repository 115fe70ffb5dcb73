"""Checks of lesson 3: masks, rows and tiles."""

from __future__ import annotations

import math

import torch

from course import DEVICE, Wrong, exercise, near, same
from course.exercises import Answer


def _guarded(n: int, beyond: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """n elements, and the memory behind them, which must stay 7."""
    owner = torch.full((n + beyond,), 7.0, device=DEVICE)
    return owner[:n], owner[n:]


@exercise(
    "3.1", "a x + y, with a mask", hint="`i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)`, and `mask=i < n` at every load and store"
)
def scale_add(answer: Answer) -> str | None:
    for n in (64, 1, 37, 0):
        x, y = torch.randn(2, n, device=DEVICE)
        kept = x.clone(), y.clone()
        got = answer(x, y, 2.5)
        if not (torch.equal(x, kept[0]) and torch.equal(y, kept[1])):
            raise Wrong("an input was changed: store to z_ptr, not to x_ptr or y_ptr")
        near(
            f"z for n = {n}",
            got,
            2.5 * x.double() + y.double(),
            why="Do all programs add their own offset to the addresses?" if n == 64 else "",
        )
    empty, real = torch.empty_like, torch.full((37 + 128,), 7.0, device=DEVICE)
    try:  # the launcher asks for memory by empty_like: it is given the start of a larger array
        torch.empty_like = lambda *args, **kwargs: real[:37]
        answer(torch.ones(37, device=DEVICE), torch.ones(37, device=DEVICE), 1.0)
    finally:
        torch.empty_like = empty
    if bool((real[37:] != 7).any()):
        raise Wrong(f"{int((real[37:] != 7).sum())} elements behind z were overwritten: the store needs `mask=i < n`")
    return "Right for every length, and nothing behind the array is touched."


@exercise(
    "3.2",
    "softmax of a row",
    hint="load the row with other=-inf, subtract its maximum, `tl.exp`, divide by `tl.sum`; rows start `stride` apart",
)
def softmax(answer: Answer) -> str | None:
    def ask(what: str, x: torch.Tensor, why: str) -> None:
        near(what, answer(x), x.double().softmax(-1), rounding=16, why=why)

    ask("y of 3 x 16", torch.randn(3, 16, device=DEVICE), "")
    ask(
        "y of 5 x 11, all values near -30", torch.randn(5, 11, device=DEVICE) - 30,
        "Columns beyond the row count in it: the load's `other` must be -inf.",
    )  # fmt: skip
    ask("y of large values", torch.randn(2, 8, device=DEVICE) * 10 + 500, "exp overflows: subtract the row's maximum first.")
    wide = torch.randn(4, 40, device=DEVICE)
    ask("y of a slice, rows 40 apart", wide[:, 8:21], "A row starts at row * stride, not at row * C.")
    part = torch.randn(2, 9, device=DEVICE)
    part[0, :5] = -math.inf
    ask("y of a row that is -inf in part", part, "")
    same("the shape of y for one row", tuple(answer(torch.randn(1, 1, device=DEVICE)).shape), (1, 1))
    return "Right for odd widths, large values, and rows of a slice."


@exercise(
    "3.3",
    "a transpose in tiles",
    hint="row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), col likewise of program_id(1); write at col * R + row",
)
def transpose(answer: Answer) -> str | None:
    for x, what in (
        (torch.randn(16, 16, device=DEVICE), "16 x 16"),
        (torch.randn(16, 48, device=DEVICE), "16 x 48"),
        (torch.randn(5, 19, device=DEVICE), "5 x 19"),
        (torch.randn(40, 40, device=DEVICE)[3:24, 2:35:2], "21 x 17, a slice with a column stride of 2"),
        (torch.randn(1, 33, device=DEVICE), "1 x 33"),
    ):
        hint = "Columns of x are `col_stride` apart." if "slice" in what else "Element (r, c) of x goes to c * R + r of y."
        near(f"y of {what}", answer(x), x.T.double(), rounding=0.5, why=hint)
    return "Right for odd sizes and any strides."
