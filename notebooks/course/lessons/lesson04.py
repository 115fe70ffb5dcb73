"""Checks of lesson 4: RMSNorm and its gradients."""

from __future__ import annotations

import torch

from course import DEVICE, Wrong, exercise, near
from course.exercises import Answer

EPS = 1e-6


def _r(x: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    return torch.rsqrt(x.double().square().mean(-1) + eps)


@exercise("4.1", "the forward of RMSNorm", hint="load with other=0.0 and widen to fp32; r = 1 / sqrt(sum(x²) / H + eps); store y and r")
def forward(answer: Answer) -> str | None:
    def ask(what: str, x: torch.Tensor, w: torch.Tensor, eps: float, why: str) -> None:
        kept = x.clone()
        made = answer(x, w, eps)
        if not isinstance(made, tuple) or len(made) != 2:
            raise Wrong("the answer must return (y, r)")
        if not torch.equal(kept, x):
            raise Wrong("x was overwritten: store to y_ptr")
        near(f"r of {what}", made[1], _r(x, eps), rounding=20, why=why)
        truth = x.double() * _r(x, eps)[:, None] * w.double()
        near(f"y of {what}", made[0], truth, rounding=1.5 if x.dtype is torch.bfloat16 else 20, why=why)

    def x(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE)

    ask("4 x 16", x(4, 16), torch.rand(16, device=DEVICE), EPS, "Is it the mean of the squares, and is eps inside of the root?")
    ask("3 x 13", x(3, 13), torch.rand(13, device=DEVICE), EPS, "The mean divides by H, not by the block's size.")
    ask("a small row, eps = 0.1", x(2, 8) * 0.01, torch.ones(8, device=DEVICE), 0.1, "eps is added to the mean square, inside of the root.")
    ask("a slice, rows 40 apart", x(4, 40)[:, :24], torch.ones(24, device=DEVICE), EPS, "Rows of x are `stride` apart; those of y are H.")
    ask("bf16 of 4 x 300", x(4, 300).bfloat16(), torch.ones(300, device=DEVICE).bfloat16(), EPS, "Widen x to fp32 before you square it.")
    return "Right for odd widths, slices, a large eps and bf16."


@exercise("4.2", "dx of RMSNorm", hint="g = dy w; m = sum(g x) / H; dx = r g − x r³ m")
def dx(answer: Answer) -> str | None:
    for n, h in ((4, 16), (3, 13), (1, 1)):
        x, dy = torch.randn(2, n, h, device=DEVICE)
        w = torch.rand(h, device=DEVICE) + 0.5
        r = _r(x)
        g = dy.double() * w.double()
        mean = (g * x.double()).mean(1, keepdim=True)
        got = answer(dy, x, w, r.float())
        truth = r[:, None] * g - x.double() * r[:, None] ** 3 * mean
        if isinstance(got, torch.Tensor) and got.shape == truth.shape:
            d = got.double()
            for other, why in (
                (r[:, None] * g, "This is r g alone: r depends on x too, which gives the second term."),
                (
                    r[:, None] * g - x.double() * r[:, None] ** 3 * mean * h,
                    "The second term has the mean of g x over the row, not its sum.",
                ),
                (
                    r[:, None] * dy.double() - x.double() * r[:, None] ** 3 * (dy * x).double().mean(1, keepdim=True),
                    "It is the gradient without the weight: g = dy w.",
                ),
            ):
                if h > 1 and torch.allclose(d, other, rtol=1e-4, atol=1e-5) and not torch.allclose(d, truth, rtol=1e-4, atol=1e-5):
                    raise Wrong(why)
        # of a single column dx is a difference of equals: what is left of it is rounding of its terms
        near(f"dx of {n} x {h}", got, truth, rounding=64) if h > 1 else _small(got)
    return "Right, and orthogonal to the row up to eps."


def _small(got: torch.Tensor) -> None:
    if float(got.abs().max()) > 1e-4:
        raise Wrong("a row of one column is ±1 whatever its x is: its dx must be nearly 0")


@exercise(
    "4.3",
    "dw in two stages",
    hint="a running sum of zeros((BLOCK,)); for n in range(program_id, N, P): add dy x r of row n; store it at program_id * H",
)
def dw(answer: Answer) -> str | None:
    for n, h, programs in ((8, 16, 8), (9, 16, 4), (13, 11, 3), (2, 5, 6)):
        x, dy = torch.randn(2, n, h, device=DEVICE)
        r = torch.rand(n, device=DEVICE) + 0.5
        share = dy.double() * x.double() * r.double()[:, None]
        got = answer(dy, x, r, programs)
        what = f"dw of {n} rows by {programs} programs"
        if isinstance(got, torch.Tensor) and got.shape == (h,):
            d = got.double()
            if n > programs and torch.allclose(d, share[:programs].sum(0), rtol=1e-4, atol=1e-5):
                raise Wrong(f"{what} has the first {programs} rows alone: a program must walk on, by {programs} rows at a time")
            if torch.allclose(d, (dy.double() * x.double()).sum(0), rtol=1e-4, atol=1e-5):
                raise Wrong(f"{what} lacks r: each row's share is dy x r")
        why = "Programs without a row must write zeros." if n < programs else ""
        near(what, got, share.sum(0), rounding=16, why=why)
        if not torch.equal(got, answer(dy, x, r, programs)):
            raise Wrong("two runs gave different bits: something is added in no fixed order")
    return "Right for any number of programs, with the same bits each time."
