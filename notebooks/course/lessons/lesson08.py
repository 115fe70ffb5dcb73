"""Checks of lesson 8: linear cross entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from course import DEVICE, Wrong, exercise, near, same
from course.exercises import Answer

IGNORED = -100


class Largest(TorchDispatchMode):
    """The most numbers that any new tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.is_floating_point():
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.element_size())
        return out


def _truth(x: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss over the targets that count, dx and dw, in fp64; zeros where none counts."""
    a, b = (t.detach().double().requires_grad_() for t in (x, w))
    total = torch.nn.functional.cross_entropy(a @ b.T, target, reduction="sum", ignore_index=IGNORED)
    loss = total / max(1, int((target != IGNORED).sum()))
    dx, dw = torch.autograd.grad(loss, (a, b))
    return loss.detach(), dx, dw


def _is(got: object, other: Tensor, truth: Tensor) -> bool:
    """Is an answer this other thing, and not the truth?"""
    if not isinstance(got, Tensor) or got.shape != truth.shape:
        return False
    return all(torch.allclose(got.double(), t, rtol=1e-4, atol=1e-7) == right for t, right in ((other, True), (truth, False)))


@exercise("8.1", "bytes at the peak", hint="three arrays of N · V numbers of 4 bytes; one of rows · V numbers of 2")
def peaks(answer: Answer) -> str | None:
    for N, V, rows in ((8192, 128256, 1024), (10, 7, 3)):
        made = answer(N, V, rows)
        if not isinstance(made, tuple) or len(made) != 2:
            raise Wrong("the answer must return (eager, chunked), two numbers of bytes")
        eager, chunked = made
        unit = N * V
        words = {
            2 * unit: "one array in bf16: those have gone when the peak comes",
            4 * unit: "one array in fp32. Which others live at the same time?",
            6 * unit: "three arrays of 2 bytes: the softmax is made in fp32, of 4",
            8 * unit: "two arrays in fp32. The backward of log-softmax reads two and writes a third",
            16 * unit: "four arrays in fp32: when log-softmax's result exists, its input is freed, as no backward reads it",
        }
        same(f"eager's peak for N = {N}, V = {V}", eager, 12 * unit, words.get(eager, "count arrays of N · V numbers in fp32"))
        if chunked == 4 * rows * V:
            raise Wrong("the chunk's logits become their gradient in place: one array of 2 bytes a number, not two, nor one of 4")
        same(f"the chunks' peak for {rows} rows", chunked, 2 * rows * V, "one chunk of logits in bf16; the gradient takes its memory")
    return f"{12 * 8192 * 128256 / 2**30:.2f} GiB against {2 * 1024 * 128256 / 2**30:.2f} GiB for 1024 rows of 8192."


@exercise(
    "8.2",
    "a chunk's losses and gradient in one launch",
    hint="first a_y, then m and s in one walk, then store scale · (p − [j = y]) in a second",
)
def turn(answer: Answer) -> str | None:
    for r, v, count, dtype in (
        (3, 8, 3, torch.float32),
        (4, 129, 10, torch.float32),
        (5, 70, 1000, torch.float32),
        (3, 100, 3, torch.bfloat16),
    ):
        logits = (3 * torch.randn(r, v, device=DEVICE)).to(dtype)
        logits[:, -1] += 9.0  # the maximum comes last
        target = torch.tensor([v - 1, 0, IGNORED, 5, v - 1][:r], device=DEVICE)
        a, counted = logits.double(), target != IGNORED
        lse = a.logsumexp(1)
        one_hot = torch.zeros_like(a)
        one_hot[torch.arange(r, device=DEVICE), target.clamp(min=0)] = 1.0
        p = torch.exp(a - lse[:, None])
        want = torch.where(counted, lse - (a * one_hot).sum(1), 0.0)
        grad = torch.where(counted[:, None], p - one_hot, 0.0) / count
        loss = answer(logits, target, torch.tensor(count, device=DEVICE))
        what = f"{r} rows of {v} columns, {count} targets in all"
        if isinstance(loss, Tensor) and loss.shape == want.shape and bool((loss[~counted] != 0).any()):
            raise Wrong(f"the losses of {what}: that of an ignored row must be 0, got {loss[~counted].tolist()}")
        if _is(loss, want / count, want):
            raise Wrong(f"the losses of {what} are divided by count: they are plain losses, the gradient alone is divided")
        if isinstance(loss, Tensor) and loss.shape == want.shape and _is(loss, torch.where(counted, lse, 0.0) - logits.double().gather(
            1, target.clamp(min=0)[:, None]
        ).squeeze(1) * counted, want):  # fmt: skip
            raise Wrong(f"the losses of {what} use what was written over the target's logit: load a_y before the first store")
        # a loss is a difference of two numbers of up to 25, each rounded to fp32
        near(f"the losses of {what}", loss, want, rounding=80, why="loss = lse − a_y, and a_y must be read before it is overwritten.")
        for other, words in (
            (grad * count, "It is not divided by count."),
            (grad * count / r, "It is divided by the rows of the chunk: count is that of all chunks."),
            (grad * count / max(1, int(counted.sum())), "It is divided by the targets of this chunk: count is that of all chunks."),
            (torch.where(counted[:, None], p / count - one_hot, 0.0), "count divides the −1 at the target, too."),
        ):
            if count > r and _is(logits, other, grad):
                raise Wrong(f"the gradient of {what}: {words}")
        # p is off by |a − lse| roundings of fp32, at most 30; bf16 rounds once
        near(f"the gradient of {what}", logits, grad, rounding=1.1 if dtype is torch.bfloat16 else 60)
    return "Right: losses from the first walk, the gradient in place from the second."


@exercise(
    "8.3", "a head in chunks", hint="count of all targets first; for each chunk: logits, turn, dx of its rows, and its share added to dw"
)
def head(answer: Answer) -> str | None:
    def ask(what: str, n: int, rows: int, ignored: slice) -> None:
        h, v = 6, 40
        x, w = torch.randn(n, h, device=DEVICE), torch.randn(v, h, device=DEVICE)
        target = torch.randint(v, (n,), device=DEVICE)
        target[ignored] = IGNORED
        truth = _truth(x, w, target)
        with Largest() as seen:
            made = answer(x, w, target, rows)
        if not isinstance(made, tuple) or len(made) != 3:
            raise Wrong("the answer must return (loss, dx, dw)")
        loss, dx, dw = made
        if bool((target == IGNORED).all()) and isinstance(loss, Tensor) and bool(loss.isnan()):
            raise Wrong("with no target that counts, the loss is NaN, 0/0: a mean over nothing is 0 here, so divide by 1 at the least")
        near(f"the loss of {what}", loss, truth[0], rounding=100, why=_which_mean(loss, x, w, target, rows, truth[0]))
        why = "Is each chunk's part written to its own rows, the last chunk's too?"
        near(f"dx of {what}", dx, truth[1], rounding=100, why=why)
        a = dw.double() if isinstance(dw, Tensor) else dw
        last = _truth(x[(n - 1) // rows * rows :], w, target[(n - 1) // rows * rows :])[2]
        if n > rows and isinstance(a, Tensor) and a.shape == w.shape and not _is(a, truth[2], truth[2] + 1):
            share = last * max(1, int((target[(n - 1) // rows * rows :] != IGNORED).sum())) / max(1, int((target != IGNORED).sum()))
            if _is(a, share, truth[2]):
                raise Wrong(f"dw of {what} is the last chunk's share alone: add each chunk's")
        near(f"dw of {what}", dw, truth[2], rounding=100, why="Every chunk adds its share: dw += gᵀ x.")
        if seen.numbers > max(rows * v, v * h, n * h):
            raise Wrong(
                f"it is right, but a tensor of {seen.numbers} numbers was made: a chunk's logits have {rows * v}, all logits {n * v}. "
                "Only a chunk of them may exist"
            )

    ask("12 rows in chunks of 4", 12, 4, slice(0, 0))
    ask("13 rows in chunks of 4", 13, 4, slice(0, 0))
    ask("16 rows in chunks of 8, 7 of the first ignored", 16, 8, slice(0, 7))
    ask("8 rows in chunks of 4, all ignored", 8, 4, slice(0, 8))
    return "Right for uneven chunks and uneven masks, and no more logits than a chunk's were made."


def _which_mean(loss: object, x: Tensor, w: Tensor, target: Tensor, rows: int, truth: Tensor) -> str:
    parts = [_truth(x[i : i + rows], w, target[i : i + rows])[0] for i in range(0, len(x), rows)]
    counted = int((target != IGNORED).sum())
    if _is(loss, torch.stack(parts).mean(), truth):
        return "It is the mean of the chunks' means: a chunk with few targets weighs as much as a full one. Sum all, divide once."
    if _is(loss, truth * counted / len(x), truth):
        return "It is divided by all rows, also those whose target is ignored."
    if _is(loss, truth * counted, truth):
        return "It is the sum of the losses: divide by the number of targets that count."
    return "The loss is the sum of all losses over the number of targets that count, in all chunks."


@exercise(
    "8.4",
    "dw, slice by slice of the vocabulary",
    hint="logits of some classes for all rows; g = exp(a − lse), −1 where target − first is the column; one product",
)
def dw_by_classes(answer: Answer) -> str | None:
    for n, h, v, width, dtype in ((9, 5, 24, 8, torch.float32), (16, 6, 43, 10, torch.float32), (64, 8, 40, 16, torch.bfloat16)):
        x, w = (torch.randn(s, h, device=DEVICE).to(dtype) for s in (n, v))
        target = torch.randint(v, (n,), device=DEVICE)
        target[::4], target[1] = IGNORED, v - 1
        count = (target != IGNORED).sum()
        truth = _truth(x, w, target)[2]
        lse = (x.double() @ w.double().T).logsumexp(1).float()
        with Largest() as seen:
            dw = answer(x, w, target, lse, count, width)
        what = f"dw of {v} classes by {width}, in {str(dtype)[6:]}"
        if isinstance(dw, Tensor) and dw.shape == truth.shape:
            logits = x.double() @ w.double().T
            p = torch.exp(logits - lse.double()[:, None]) * (target != IGNORED)[:, None] / count
            if _is(dw, p.T @ x.double(), truth):
                raise Wrong(f"{what} lacks the −1 at the target")
            wrong = p.clone()
            for first in range(0, v, width):
                for i in range(n):
                    if 0 <= int(target[i]) < min(width, v - first):
                        wrong[i, first + int(target[i])] -= 1 / count
            if _is(dw, wrong.T @ x.double(), truth):
                raise Wrong(f"{what}: the target's column within a slice is target − first, and it is in one slice only")
            if not bool(dw[-(v % width or width) :].any()):
                raise Wrong(f"the last {v % width or width} classes of {what} are zero: the vocabulary need not be a multiple of width")
        # in bf16 the logits and their gradient are rounded before the product
        near(what, dw, truth, rounding=8 if dtype is torch.bfloat16 else 60, why="Do rows that are ignored have a gradient of 0?")
        if seen.numbers > max(n * width, v * h, n * h):
            raise Wrong(f"it is right, but {seen.numbers} numbers were made at once; all rows have {n * width} logits of {width} classes")
    return "Right for a vocabulary that the width does not divide, with each class rounded once."
