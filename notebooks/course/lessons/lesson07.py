"""Checks of lesson 7: the online softmax and cross entropy."""

from __future__ import annotations

import math

import torch

from course import DEVICE, Wrong, exercise, near
from course.exercises import Answer

NEUTRAL = (torch.tensor([-math.inf]), torch.tensor([0.0]))


@exercise(
    "7.1", "merging two parts of a softmax", hint="m = maximum(m1, m2); s = s1 exp(m1 − m) + s2 exp(m2 − m); where m is −inf take s1 + s2"
)
def merge(answer: Answer) -> str | None:
    z = torch.randn(4, 12, dtype=torch.float64) * 5
    parts = [(p.max(1).values, (p - p.max(1, keepdim=True).values).exp().sum(1)) for p in (z[:, :3], z[:, 3:4], z[:, 4:])]
    m, s = answer(answer(parts[0], parts[1]), parts[2])
    why = "Each sum must be brought to the new maximum first: times exp(its maximum − the new one)."
    near("m", m, z.max(1).values, why="m is the larger of the two.")
    near("m + log s", m + s.log(), z.logsumexp(1), rounding=16, why=why)
    again = answer(parts[0], answer(parts[2], parts[1]))
    near("m + log s in another grouping", again[0] + again[1].log(), z.logsumexp(1), rounding=16, why=why)
    one = (torch.tensor([3.0]), torch.tensor([2.0]))
    for a, b, want in ((one, NEUTRAL, one), (NEUTRAL, one, one), (NEUTRAL, NEUTRAL, NEUTRAL)):
        got = answer(a, b)
        if bool(got[1].isnan().any()) or bool(got[0].isnan().any()):
            raise Wrong("(−inf, 0) merged gives NaN: −inf − (−inf). Where the new maximum is −inf, no exponential is needed")
        if not (torch.equal(got[0], want[0]) and torch.allclose(got[1], want[1])):
            raise Wrong(f"(−inf, 0) must be neutral: got {tuple(float(t) for t in got)}, expected {tuple(float(t) for t in want)}")
    return "Associative, with a neutral element."


@exercise(
    "7.2",
    "the loss of a row in one pass",
    hint="m = −inf, s = 0; a block with other=−inf; new = max(m, max(block)); s = s exp(m − new) + sum(exp(block − new)); lse = m + log(s)",
)
def loss(answer: Answer) -> str | None:
    def ask(what: str, z: torch.Tensor, target: torch.Tensor, why: str = "") -> None:
        kept = z.clone()
        got = answer(z, target)
        if not (isinstance(got, tuple | list) and len(got) == 2):
            raise Wrong("return (loss, lse)")
        if not torch.equal(z.nan_to_num(7), kept.nan_to_num(7)):
            raise Wrong("the logits were changed")
        counts = target != -100
        lse = z.double().logsumexp(1)
        truth = lse - z.double().gather(1, target.clamp(min=0)[:, None])[:, 0]
        near(f"lse of {what}", got[1][counts], lse[counts], rounding=16, why=why)
        near(f"the loss of {what}", got[0][counts], truth[counts], rounding=64, why=why)
        if bool((got[0][~counts] != 0).any()):
            raise Wrong(
                f"the loss of ignored rows of {what} is {got[0][~counts].tolist()}, expected 0: a target of −100 is no column, and such a row may hold NaN"
            )

    def make(n: int, v: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(n, v, device=DEVICE) * 3, torch.randint(v, (n,), device=DEVICE)

    ask("rows of one block", *make(4, 16))
    z, target = make(3, 50)
    ask(
        "rows of 50 in blocks of 16",
        z,
        target,
        "A row is several blocks: s must be shrunk when the maximum rises, and columns beyond the row must be −inf in it.",
    )
    ask("rows of 50, all near −40", z - 40, target, "columns beyond the row must be −inf in it.")
    ask(
        "rows that rise to 200",
        torch.linspace(0, 200, 50, device=DEVICE).repeat(2, 1),
        target[:2],
        "exp overflows unless the maximum is taken off first.",
    )
    z, target = make(4, 33)
    target[1] = -100
    z[1] = math.nan
    ask("rows of which one is ignored", z, target)
    return "One pass, any width, and ignored rows are 0."


@exercise(
    "7.3", "the gradient of cross entropy", hint="p = exp(z − lse); dz = g (p − 1 where the column is the target); 0 where target is −100"
)
def gradient(answer: Answer) -> str | None:
    for n, v in ((3, 16), (4, 37)):
        z, target, g = torch.randn(n, v, device=DEVICE) * 3, torch.randint(v, (n,), device=DEVICE), torch.rand(n, device=DEVICE) + 0.5
        target[1] = -100
        z[1] = math.nan
        lse = z.double().logsumexp(1)
        hot = torch.nn.functional.one_hot(target.clamp(min=0), v).double()
        p = (z.double() - lse[:, None]).exp()
        truth = torch.where((target != -100)[:, None], g.double()[:, None] * (p - hot), 0.0)
        got = answer(z, target, lse.float(), g)
        if isinstance(got, torch.Tensor) and got.shape == truth.shape:
            if bool(got[1].isnan().any()):
                raise Wrong("the ignored row's gradient is NaN: 0 · NaN is NaN. Choose by `tl.where`, or store zeros")
            d = got.double()
            for wrong, why in (
                (p - hot, "g is missing: the upstream gradient is not always 1."),
                (g.double()[:, None] * p, "Minus 1 at the target is missing."),
                (g.double()[:, None] * p - hot, "g multiplies both parts, the 1 at the target too."),
            ):
                if torch.allclose(d[0], wrong[0], atol=1e-5) and not torch.allclose(d[0], truth[0], atol=1e-5):
                    raise Wrong(why)
        near(f"dz of {n} x {v}", got, truth, rounding=64)
    return "Right for any upstream gradient; ignored rows are 0."
