"""Checks of lesson 10: the reader writes tests, which are run on right and on wrong implementations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from course import Wrong, exercise
from course.exercises import Answer


def judge(test: Callable[..., Any], right: Mapping[str, tuple[Any, ...]], wrong: Mapping[str, tuple[Any, ...]]) -> None:
    """The test passes what is right, and fails what is wrong by an AssertionError."""
    for name, args in right.items():
        try:
            test(*args)
        except AssertionError as error:
            raise Wrong(f"your test fails a right implementation ({name}): {error}") from error
    for name, args in wrong.items():
        try:
            test(*args)
        except AssertionError:
            continue
        raise Wrong(f"your test passes a wrong implementation: {name}")


def _function(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """An autograd Function of a pair, applied."""
    made = type("Made", (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})
    return made.apply


def _square(store: bool, again: bool, early: bool) -> Callable[..., Any]:
    """x², which may write over x in backward or in forward, or change what it kept."""

    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.kept = [x, torch.ones_like(x) * 2]
        y = x * x
        if early:
            x.detach().numpy()[:] = 0
        return y

    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        x, two = ctx.kept
        dx = dy * two * x
        if store:
            x.detach().numpy()[:] = dx.numpy()
            dx = dx.clone()
        if again:
            two.mul_(2)
        return dx

    return _function(forward, backward)


@exercise(
    "10.1",
    "a test of purity",
    hint="keep clones; y = fn(*inputs); grad twice with retain_graph=True; compare views as integers: t.view(torch.int32), so that NaN equals itself",
)
def pure(answer: Answer) -> str | None:
    def x() -> torch.Tensor:
        return torch.randn(6).requires_grad_()

    nan = torch.tensor([float("nan"), 1.0, 2.0], requires_grad=True)
    judge(
        answer,
        {
            "x²": (_square(False, False, False), x()),
            "x² of an x with NaN": (_square(False, False, False), nan),
            "a b": (torch.mul, x(), x()),
        },
        {
            "its backward writes the gradient over its input": (_square(True, False, False), x()),
            "its forward writes zeros over its input": (_square(False, False, True), x()),
            "its second backward is twice its first": (_square(False, True, False), x()),
        },
    )
    return "It passes the pure ones, NaN included, and catches three that are not."


def _loss(scale: str) -> Callable[..., Any]:
    """A mean of squares, whose gradient is made in forward."""

    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.dx = 2 * x / x.numel()
        return (x * x).mean()

    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        if scale == "never":
            return ctx.dx.clone()
        if scale == "in place":
            return ctx.dx.mul_(g).clone()
        if scale == "twice":
            return ctx.dx * g * g
        return ctx.dx * g

    return _function(forward, backward)


@exercise(
    "10.2",
    "a test with an upstream gradient",
    hint="y = fn(x); a, b, c = grad(y, x, g, retain_graph=True) for g of 1, 3, 3; b = 3 a and c = b, and a asked again is a",
)
def linear_in_the_cotangent(answer: Answer) -> str | None:
    def x() -> torch.Tensor:
        return torch.randn(5).requires_grad_()

    wrong = {
        "it takes the upstream gradient for 1": (_loss("never"), x()),
        "it multiplies by the upstream gradient twice": (_loss("twice"), x()),
        "it scales what it kept in place: the second backward is scaled again": (_loss("in place"), x()),
    }
    judge(
        answer,
        {"a mean of squares": (_loss("right"), x()), "cross entropy": (lambda t: F.cross_entropy(t[None], torch.tensor([1])), x())},
        wrong,
    )
    return "It catches a gradient that is not scaled, scaled twice, or scaled for good."


def _flat(t: torch.Tensor) -> torch.Tensor:
    """What a kernel reads that takes `t` for contiguous: the memory from its first element on."""
    need = t.numel()
    have = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    memory = t.as_strided((min(need, have),), (1,))
    return torch.cat([memory, memory.new_full((need - len(memory),), 7.0)]).view(t.shape)


def _op(x_flat: bool, dy_flat: bool) -> SimpleNamespace:
    """x² as a pair; its parts may take what they get for contiguous."""

    def fwd(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = _flat(x) if x_flat else x
        return x * x, x

    def bwd(res: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return 2 * res * (_flat(dy) if dy_flat else dy)

    return SimpleNamespace(fwd=fwd, bwd=bwd)


@exercise(
    "10.3",
    "a test of strides",
    hint="dy: torch.ones_like(y), torch.ones(()).expand(y.shape), a transposed copy y.T.contiguous().T; use a dy with different numbers for the transposed one; x: x.T.contiguous().T",
)
def takes_any_strides(answer: Answer) -> str | None:
    x = torch.randn(3, 4)
    wrong = {"its backward takes dy for contiguous": (_op(False, True), x), "its forward takes x for contiguous": (_op(True, False), x)}
    judge(answer, {"x²": (_op(False, False), x), "x², of one row": (_op(False, False), torch.randn(1, 4))}, wrong)
    return "It catches a backward and a forward that read memory in order."


@exercise(
    "10.4",
    "a test of numbers",
    hint="assert dtype and shape; err = (ours.double() − truth).norm(); assert err <= naive's + eps / 2 · truth.norm(); with NaN, `<=` is False, and so the assertion fails",
)
def exact_enough(answer: Answer) -> str | None:
    truth = torch.randn(64, 8, dtype=torch.float64)
    naive = truth.bfloat16()
    off = (truth * 1.01).bfloat16()
    nan = naive.clone()
    nan[3, 4] = float("nan")
    rough = (truth * (1 + 0.02 * torch.randn(64, 8, dtype=torch.float64))).bfloat16()
    right = {
        "rounded once": (naive.clone(), naive, truth),
        "better than a rough naive": (naive.clone(), rough, truth),
        "as rough as naive": (rough.clone(), rough, truth),
        "fp32": (truth.float(), truth.float(), truth),
    }
    wrong = {
        "off by 1 %, which a tolerance of 0.02 would pass": (off, naive, truth),
        "one NaN": (nan, naive, truth),
        "in fp32 where bf16 was asked for": (truth.float(), naive, truth),
        "of another shape": (naive[:1], naive, truth),
        "all zeros": (torch.zeros_like(naive), naive, truth),
        "fp32 that was rounded to bf16 in between": (truth.bfloat16().float(), truth.float(), truth),
    }
    judge(answer, right, wrong)
    return "The rule, and nothing to tune."
