"""Checks of lesson 5: rotations."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
    """Which likely wrong rotation `got` is, in words; nothing where it is none of them."""
    if not isinstance(got, torch.Tensor) or got.shape != x.shape:
        return ""
    other = "interleaved" if layout == "half" else "half"
    for wrong, why in (
        (_rotated(x, cos, -sin, layout), "It turns the other way: the first of a pair gets − second · sin."),
        (_rotated(x, cos, sin, other), f"Those are the pairs of the layout {other!r}."),
        (_rotated(x, cos[:1], sin[:1], layout), "Every position turns by the angles of position 0: a table's rows are its width apart."),
        (x, "That is x itself, not turned."),
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
                raise Wrong("x was changed: others may still read it")
            truth = _rotated(x.double(), cos.double(), sin.double(), layout)
            why = _explained(got, x, cos, sin, layout) or ("Numbers from R on stay." if 2 * r < d else "")
            near(f"layout {layout!r}, {d} numbers of which {2 * r} turn", got, truth, rounding=8, why=why)
    return "Both layouts, and a part that stays."


@exercise("5.2", "rows of the weights, reordered", hint='"(h d pair) w -> (h pair d) w": einops.rearrange does it in one call')
def to_halves(answer: Answer) -> str | None:
    for heads, d, width in ((1, 8, 5), (3, 8, 7)):
        x, weights = torch.randn(6, width, dtype=torch.float64), torch.randn(2, heads * d, width, dtype=torch.float64)
        cos, sin = (t.double() for t in _tables(6, d // 2))
        new = [answer(w.clone(), heads) for w in weights]
        if not all(isinstance(n, torch.Tensor) and n.shape == w.shape for n, w in zip(new, weights, strict=True)):
            raise Wrong(f"the result must be a tensor {list(weights[0].shape)}, as the weight is")

        def scores(weights: object, layout: str, x=x, heads=heads, d=d, cos=cos, sin=sin) -> torch.Tensor:
            q, k = (_rotated((x @ w.T).unflatten(-1, (heads, d)).transpose(0, 1), cos, sin, layout) for w in weights)
            return q @ k.transpose(-1, -2)

        why, got, first = "", new[0], weights[0]
        if torch.equal(got, first):
            why = "The weight is unchanged."
        elif torch.equal(got, first.unflatten(0, (heads, 2, d // 2)).transpose(1, 2).reshape(first.shape)):
            why = "That goes the other way, from halves to interleaved."
        elif torch.equal(got, torch.cat([first[0::2], first[1::2]])):
            why = "Rows of different heads are mixed: reorder within each head."
        near(f"q · k, with {heads} heads of {d},", scores(new, "half"), scores(weights, "interleaved"), rounding=64, why=why)
    return "The same attention, by the other layout."


class _Copies(TorchDispatchMode):
    """Counts copies of tensors as large as the one watched."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.calls = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        copies = func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
        self.calls += copies and args[0].numel() == self.numel
        return func(*args, **(kwargs or {}))


@exercise(
    "5.3",
    "RoPE over a view",
    hint="q = q_ptr + (i // H) * b_stride + (i % H) * h_stride + t * t_stride + j; its pairs are HALF apart; the tables' row begins at "
    "t * HALF, that of y at (i * T + t) * 2 * HALF",
)
def rope(answer: Answer) -> str | None:
    copies = 0
    for heads, t, d in ((2, 3, 8), (3, 5, 16)):
        packed = torch.randn(2, t, heads * d + 4, device=DEVICE)[..., : heads * d]
        for what, q in (
            ("a contiguous q", torch.randn(2, heads, t, d, device=DEVICE)),
            ("a view of [B, T, heads D]", packed.unflatten(-1, (heads, d)).transpose(1, 2)),
        ):
            kept = q.clone()
            cos, sin = (x.to(DEVICE) for x in _tables(t, d // 2))
            with _Copies(q.numel()) as watch:
                got = answer(q, cos, sin)
            if not torch.equal(q, kept):
                raise Wrong("q was overwritten: others may still read it")
            why = _explained(got, q, cos, sin, "half") or (
                "The offsets of q are its strides; those of y are of contiguous memory." if "view" in what else ""
            )
            near(f"y of {what}", got, _rotated(q.double(), cos.double(), sin.double(), "half"), rounding=8, why=why)
            if not got.is_contiguous():
                raise Wrong(f"y of {what} has the right numbers, but is not contiguous: its strides are {got.stride()}")
            copies += watch.calls
    if copies:
        raise Wrong("right numbers, but q was copied first: that moves as many bytes as the rotation does. Pass its strides")
    return "Right for views, without a copy."


@exercise("5.4", "the backward of RoPE", hint="the transpose of a rotation by θ is a rotation by −θ: negate sin")
def backward(answer: Answer) -> str | None:
    for layout in ("half", "interleaved"):
        for d, r in ((8, 4), (10, 3)):
            dy, x = torch.randn(2, 5, d, dtype=torch.float64)
            cos, sin = (t.double() * 1.5 for t in _tables(5, r))
            x.requires_grad_()
            (truth,) = torch.autograd.grad(_rotated(x, cos, sin, layout), x, dy)
            kept = dy.clone()
            got = answer(cos, sin, dy, layout)
            if not torch.equal(dy, kept):
                raise Wrong("dy was changed: autograd may give it to others")
            why = ""
            if isinstance(got, torch.Tensor) and got.shape == truth.shape:
                if torch.allclose(got, _rotated(dy, cos, sin, layout)):
                    why = "That is the forward again: the gradient turns the other way."
                elif torch.allclose(got[:, : 2 * r], truth[:, : 2 * r] / 2.25):
                    why = "That is the inverse, A⁻¹, which divides by cos² + sin²: a backward is the transpose."
                elif not bool(got[:, 2 * r :].any()) and 2 * r < d:
                    why = "Numbers that passed through have a gradient too: dy itself."
            near(f"dq, layout {layout!r}, {d} numbers of which {2 * r} turn,", got, truth, rounding=16, why=why)
    return "The transpose, for scaled tables too."
