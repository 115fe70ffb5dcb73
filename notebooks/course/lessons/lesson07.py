"""Checks of lesson 7: cross entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from course import DEVICE, Wrong, exercise, near
from course.exercises import Answer

INF = torch.inf
IGNORED = -100


def _pair(made: object, names: str) -> tuple[Tensor, Tensor]:
    if not isinstance(made, tuple) or len(made) != 2:
        raise Wrong(f"the answer must return ({names}), two tensors")
    return made


def _alike(got: Tensor, other: Tensor, truth: Tensor) -> bool:
    """Is an answer this other thing, and not the truth?"""
    if got.shape != truth.shape:
        return False
    close = [torch.allclose(got.double().cpu(), t.double().cpu(), rtol=1e-4, atol=1e-6, equal_nan=True) for t in (other, truth)]
    return close[0] and not close[1]


@exercise("7.1", "merging two parts of a row", hint="m is the larger of the maxima; each sum is multiplied by exp(its own maximum − m)")
def merge(answer: Answer) -> str | None:
    def ask(what: str, left: Tensor, right: Tensor, why: str) -> None:
        parts = [(a.amax(1), torch.exp(a - a.amax(1, keepdim=True)).sum(1)) for a in (left, right)]
        kept = [t.clone() for pair in parts for t in pair]
        m, s = _pair(answer(*parts[0], *parts[1]), "m, s")
        if not all(torch.equal(t, k) for t, k in zip((t for pair in parts for t in pair), kept, strict=True)):
            raise Wrong("an input was overwritten: a part may be merged again elsewhere")
        row = torch.cat((left, right), 1).double()
        top = row.amax(1)
        near(f"m of {what}", m, top, rounding=0.5, why="It is the maximum of both parts.")
        truth = torch.exp(row - top[:, None]).sum(1)
        if isinstance(s, Tensor) and _alike(s, parts[0][1] + parts[1][1], truth):
            raise Wrong(
                f"s of {what} is s₁ + s₂: the two are in different units, exp(m₁) and exp(m₂). Bring both to exp(m) before you add them"
            )
        # exp of a difference d of fp32 numbers is off by |d| roundings; here |d| < 16 where it matters
        near(f"s of {what}", s, truth, rounding=32, why=why)

    def a(size: int, at: float = 0.0) -> Tensor:
        return torch.randn(6, size, device=DEVICE) + at

    ask("two parts with the same maximum", torch.zeros(3, 4, device=DEVICE), torch.zeros(3, 2, device=DEVICE), "Count: 4 ones and 2 ones.")
    ask("parts of 5 and 9 columns", a(5), a(9, 2.0), "Which of the two sums is multiplied by which factor?")
    ask("parts of 9 and 5 columns", a(9, 2.0), a(5), "The first part may have the larger maximum, or the second.")
    ask("logits near 300", a(5, 300.0), a(7, 299.0), "exp(300) is inf in fp32: exp of a difference from the maximum only.")
    empty = (torch.full((2,), -INF, device=DEVICE), torch.zeros(2, device=DEVICE))
    some = (torch.tensor([3.0, -4.0], device=DEVICE), torch.tensor([1.5, 2.5], device=DEVICE))
    for name, first, second, want in (
        ("(−∞, 0) and a part", empty, some, some),
        ("a part and (−∞, 0)", some, empty, some),
        ("(−∞, 0) and (−∞, 0)", empty, empty, empty),
    ):
        m, s = _pair(answer(*first, *second), "m, s")
        near(f"m of {name}", m, want[0].double(), rounding=0.5)
        near(f"s of {name}", s, want[1].double(), rounding=2, why="−∞ − (−∞) is NaN: where m is −∞, subtract 0 instead.")
    return "Right, also for parts without a possible class: (−∞, 0) is the neutral pair."


def _rows(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp in fp64, 0 where the target is ignored."""
    counted = target != IGNORED
    a = logits.double().where(counted[:, None], 0.0)
    lse = torch.logsumexp(a, 1)
    loss = lse - a.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
    return loss.where(counted, 0.0), lse.where(counted, 0.0)


@exercise(
    "7.2",
    "losses in one pass over each row",
    hint="m = −inf, s = 0; for each block: new = max(m, max(a)); s = s · exp(m − new) + sum(exp(a − new)); m = new",
)
def losses(answer: Answer) -> str | None:
    def ask(what: str, logits: Tensor, target: Tensor, why: str) -> None:
        kept = logits.clone()
        loss, lse = _pair(answer(logits, target, IGNORED), "loss, lse")
        if not torch.equal(kept.nan_to_num(7.0), logits.nan_to_num(7.0)):
            raise Wrong("the logits were overwritten: this function only reads them")
        want_loss, want_lse = _rows(logits, target)
        counted = (target != IGNORED).cpu()
        if isinstance(loss, Tensor) and loss.shape == want_loss.shape and bool((loss.cpu()[~counted] != 0).any()):
            raise Wrong(f"{what}: a row whose target is ignored has loss 0, whatever its logits; got {loss.cpu()[~counted].tolist()}")
        near(f"lse of {what}", lse, want_lse, rounding=8, why=why)
        # loss is a difference of two numbers of lse's size: it carries the rounding of those
        size = want_lse.abs().amax() + kept.nan_to_num(0.0, 0.0, 0.0).abs().amax().double()
        if float((loss.double() - want_loss).abs().max()) > 8 * 2**-24 * float(size) + 1e-6:
            near(f"loss of {what}", loss, want_loss, rounding=8, why="loss = lse − the target's logit")

    def a(n: int, v: int) -> Tensor:
        return torch.randn(n, v, device=DEVICE)

    def y(n: int, v: int) -> Tensor:
        return torch.randint(v, (n,), device=DEVICE)

    ask("3 rows of 8 columns", a(3, 8), y(3, 8), "Columns beyond the row must add nothing: load them as −inf, as exp(−inf) = 0.")
    ask("2 rows of 129 columns", a(2, 129), y(2, 129), "Three blocks of 64: is the running sum carried from each to the next?")
    rising = torch.linspace(-20, 20, 150, device=DEVICE).repeat(2, 1)
    ask("rising logits", rising, y(2, 150), "The maximum grows from block to block: the old sum must be multiplied by exp(m − new).")
    ask("falling logits", rising.flip(1).contiguous(), y(2, 150), "The maximum never changes after the first block: nothing to rescale.")
    ask("logits near 300", a(2, 70) + 300, y(2, 70), "exp(300) overflows: subtract the running maximum first.")
    masked = a(2, 140)
    masked[:, :70] = -INF
    ask(
        "70 impossible classes first",
        masked,
        y(2, 70) + 70,
        "The first block is −inf alone: there −inf − (−inf) is NaN, so subtract 0 there.",
    )
    ask("rows that are 90 apart", a(4, 90)[:, :65], y(4, 65), "Row n starts at n · stride, not at n · V.")
    hostile = a(4, 20)
    hostile[1], hostile[2] = torch.nan, INF
    ask("ignored rows of NaN and inf", hostile, torch.tensor([3, IGNORED, IGNORED, 19], device=DEVICE), "Branch on the target.")
    ask("bf16", a(3, 100).bfloat16(), y(3, 100), "Widen what you load to fp32.")
    return "Right for every order of the logits, for masked classes and for ignored rows."


@exercise(
    "7.3", "the gradient in place", hint="da = dloss (exp(a − lse) − [j = y]), stored where a was loaded; 0 for an ignored row, by tl.where"
)
def gradient(answer: Answer) -> str | None:
    def ask(what: str, logits: Tensor, target: Tensor, dloss: Tensor, why: str = "") -> None:
        _, lse = _rows(logits, target)
        n, v = logits.shape
        one_hot = torch.zeros(n, v, dtype=torch.float64, device=DEVICE)
        one_hot[torch.arange(n, device=DEVICE), target.clamp(min=0)] = 1.0
        p, g = torch.exp(logits.double() - lse[:, None]), dloss.double()[:, None]
        counted = (target != IGNORED)[:, None]
        truth = (g * (p - one_hot)).where(counted, 0.0)
        got = answer(logits, target, lse.float(), dloss, IGNORED)
        if not isinstance(got, Tensor):
            raise Wrong("the answer must return the logits, which are their gradient now")
        for other, words in (
            (p - one_hot, "It is the gradient of the sum of the losses: each row's must be multiplied by its dloss."),
            (g * p - one_hot, "dloss multiplies exp(a − lse) alone: it multiplies the −1 at the target, too."),
            (g * p, "The target's column lacks its −1."),
            (-truth, "It has the wrong sign: at the target it is p − 1, below 0."),
        ):
            if _alike(got, other.where(counted, 0.0), truth):
                raise Wrong(f"the gradient of {what}: {words}")
        if bool(got[(target == IGNORED)].isnan().any()):
            raise Wrong(
                f"the gradient of {what} is NaN in an ignored row: 0 · NaN is NaN, so choose by tl.where instead of multiplying by 0"
            )
        # p is off by |a − lse| roundings of fp32, at most 20 here; bf16 has one rounding of its own
        near(f"the gradient of {what}", got, truth, rounding=1.1 if logits.dtype is torch.bfloat16 else 40, why=why)
        if got.data_ptr() != logits.data_ptr():
            raise Wrong("it is right, but in new memory: the gradient must be written where the logits were")

    def a(n: int, v: int) -> Tensor:
        return torch.randn(n, v, device=DEVICE)

    ones = torch.ones(3, device=DEVICE)
    ask("3 rows of 8 columns, dloss = 1", a(3, 8), torch.tensor([0, 7, 3], device=DEVICE), ones)
    uneven = torch.tensor([0.5, -2.0, 0.0], device=DEVICE)
    ask("dloss = 0.5, −2, 0", a(3, 70), torch.tensor([0, 69, 3], device=DEVICE), uneven)
    wide = a(3, 90)
    beside = wide[:, 65:].clone()
    ask("a slice, rows 90 apart", wide[:, :65], torch.tensor([0, 64, 3], device=DEVICE), uneven, "Row n starts at n · stride.")
    if not torch.equal(beside, wide[:, 65:]):
        raise Wrong("columns beyond the row were written to: they are a neighbour's. The store needs mask=j < V")
    hostile = a(3, 20)
    hostile[1] = torch.nan
    ask("a row of NaN whose target is ignored", hostile, torch.tensor([3, IGNORED, 19], device=DEVICE), ones)
    ask("bf16", a(3, 100).bfloat16(), torch.tensor([99, 0, 3], device=DEVICE), uneven, "Compute in fp32, round at the store.")
    return "Right, in the logits' own memory, and no neighbour was touched."


@exercise(
    "7.4",
    "a loss that its logits are donated to",
    hint="forward: turn_, then increment_version(logits), then save them. backward: a new tensor, saved · dloss, every time",
)
def donated(answer: Answer) -> str | None:
    def start(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(seed)
        leaf = torch.randn(5, 12, device=DEVICE).requires_grad_()
        target = torch.tensor([0, 11, IGNORED, 4, 4], device=DEVICE)
        return leaf, leaf * 1.0, target  # a product with a number needs no logits for its own backward

    leaf, logits, target = start()
    before = logits.detach().clone()
    wide = leaf.detach().double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(wide, target)
    (gradient,) = torch.autograd.grad(truth, wide)
    loss = answer(logits, target)
    near("the loss", loss, truth, rounding=16, why="It is the sum of the losses over the number of targets that count.")
    if torch.equal(before, logits.detach()):
        raise Wrong("the logits are as they were: forward was to make their gradient in their own memory, and hold nothing beside it")
    (got,) = torch.autograd.grad(loss, leaf)
    near("the gradient", got, gradient, rounding=40)

    leaf, logits, target = start()
    (got,) = torch.autograd.grad(answer(logits, target) / 8, leaf)
    if _alike(got, gradient, gradient / 8):
        raise Wrong("the gradient of loss / 8 is that of loss: backward's dloss, 0.125 there, must multiply what forward made")
    near("the gradient of loss / 8", got, gradient / 8, rounding=40)

    leaf, logits, target = start()
    third = answer(logits, target) / 3
    (first,) = torch.autograd.grad(third, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(third, leaf)
    if _alike(again, gradient / 9, gradient / 3) or _alike(first, gradient / 9, gradient / 3):
        raise Wrong(
            "two backwards of loss / 3 through one graph: the second is scaled twice, by 1/9. What forward made must stay as it is: "
            "return a new tensor"
        )
    near("the gradient of a second backward", again, gradient / 3, rounding=40)

    leaf, logits, target = start()
    neighbour = logits.square().sum()  # keeps the logits for its own backward
    both = answer(logits, target) + neighbour
    try:
        both.backward()
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
    else:
        raise Wrong(
            "somebody else kept the logits for a backward, and got a wrong gradient in silence: a kernel's write is not seen by autograd. "
            "Tell it: torch.autograd.graph.increment_version(logits)"
        )
    return "Right for any upstream gradient, any number of times; and whoever kept the logits hears of it."
