"""Checks of lesson 5: rotations."""

from __future__ import annotations

import torch

from course import DEVICE, Wrong, exercise, near
from course.exercises import Answer


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str) -> torch.Tensor:
    r = cos.shape[-1]
    turned, rest = x[..., : 2 * r], x[..., 2 * r :]
    a, b = (turned[..., :r], turned[..., r:]) if layout == "half" else (turned[..., 0::2], turned[..., 1::2])
    first, second = a * cos - b * sin, b * cos + a * sin
    both = torch.cat([first, second], -1) if layout == "half" else torch.stack([first, second], -1).flatten(-2)
    return torch.cat([both, rest], -1)


def _tables(t: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.outer(torch.arange(t), 100.0 ** (-torch.arange(r) / r))
    return angle.cos(), angle.sin()


def _explained(got: object, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str) -> str:
    if isinstance(got, torch.Tensor) and got.shape == x.shape:
        other = "interleaved" if layout == "half" else "half"
        for wrong, why in (
            (_rotated(x, cos, -sin, layout), "It turns the other way: the first of a pair gets − second · sin."),
            (_rotated(x, cos, sin, other), f"Those are the pairs of the layout {other!r}."),
        ):
            if torch.allclose(got.double(), wrong.double(), atol=1e-5):
                return why
    return ""


@exercise(
    "5.1",
    "two layouts",
    hint="a, b = x[:, :R/2], x[:, R/2:R] or x[:, 0:R:2], x[:, 1:R:2]; then a cos − b sin and b cos + a sin, put back in the same order",
)
def rotate_pairs(answer: Answer) -> str | None:
    for layout in ("half", "interleaved"):
        for d, r in ((8, 4), (10, 3)):
            x = torch.randn(5, d)
            kept = x.clone()
            cos, sin = _tables(5, r)
            got = answer(x, cos, sin, layout)
            if not torch.equal(x, kept):
                raise Wrong("x was changed")
            part = 2 * r < d
            truth = _rotated(x.double(), cos.double(), sin.double(), layout)
            why = _explained(got, x, cos, sin, layout)
            near(
                f"layout {layout!r}, {d} numbers of which {2 * r} turn",
                got,
                truth,
                rounding=8,
                why=why or ("Numbers from R on stay." if part else ""),
            )
    return "Both layouts, and a part that stays."


@exercise(
    "5.2",
    "RoPE over a view",
    hint="at = q_ptr + b * b_stride + h * h_stride + t * t_stride; two loads of HALF numbers, D/2 apart; cos at t * HALF",
)
def rope(answer: Answer) -> str | None:
    for heads, t, d in ((2, 3, 8), (3, 5, 16)):
        packed = torch.randn(2, t, heads * d + 4, device=DEVICE)[..., : heads * d]
        for what, q in (
            ("a contiguous q", torch.randn(2, heads, t, d, device=DEVICE)),
            ("a view of [B, T, heads D]", packed.unflatten(-1, (heads, d)).transpose(1, 2)),
        ):
            kept = q.clone()
            cos, sin = (x.to(DEVICE) for x in _tables(t, d // 2))
            got = answer(q, cos, sin)
            if not torch.equal(q, kept):
                raise Wrong("q was overwritten: others may still read it")
            why = _explained(got, q, cos, sin, "half") or (
                "The offsets of q are its strides; those of y are of contiguous memory." if "view" in what else ""
            )
            near(f"y of {what}", got, _rotated(q.double(), cos.double(), sin.double(), "half"), rounding=8, why=why)
    return "Right for views, without a copy."


@exercise("5.3", "the backward of RoPE", hint="the transpose of a rotation by θ is a rotation by −θ: negate sin")
def backward(answer: Answer) -> str | None:
    for layout in ("half", "interleaved"):
        for d, r in ((8, 4), (10, 3)):
            dy, x = torch.randn(2, 5, d, dtype=torch.float64)
            cos, sin = (t.double() * 1.5 for t in _tables(5, r))
            x.requires_grad_()
            (truth,) = torch.autograd.grad(_rotated(x, cos, sin, layout), x, dy)
            got = answer(cos, sin, dy, layout)
            why = ""
            if isinstance(got, torch.Tensor) and got.shape == truth.shape:
                if torch.allclose(got, _rotated(dy, cos, sin, layout)):
                    why = "That is the forward again: the gradient turns the other way."
                elif torch.allclose(got[:, : 2 * r], truth[:, : 2 * r] / 2.25):
                    why = "That is the inverse, R⁻¹, which divides by cos² + sin²: a backward is the transpose."
            near("dq", got, truth, rounding=16, why=why)
    return "The transpose, for scaled tables too."
