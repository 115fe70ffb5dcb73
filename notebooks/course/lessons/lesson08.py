"""Checks of lesson 8: a head in chunks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from course import Wrong, exercise, near, same
from course.exercises import Answer


class _Largest(TorchDispatchMode):
    """The most rows of any array of V columns that was made, but for Wᵀ, of H rows."""

    def __init__(self, columns: int, hidden: int) -> None:
        super().__init__()
        self.columns, self.hidden, self.rows = columns, hidden, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.dim() == 2 and t.shape[1] == self.columns and t.shape[0] != self.hidden:
                self.rows = max(self.rows, t.shape[0])
        return out


@exercise(
    "8.1",
    "loss and gradients, chunk by chunk",
    hint="n = (target != -100).sum(); for each chunk: z = xc @ W.T, p = softmax, p[t] -= 1, rows of -100 zero; dx = p @ W / n, dW += p.T @ xc / n",
)
def head(answer: Answer) -> str | None:
    for n, chunk in ((12, 4), (13, 5), (6, 6)):
        x, W = torch.randn(n, 8, dtype=torch.float64), torch.randn(17, 8, dtype=torch.float64)
        target = torch.randint(17, (n,))
        target[: n // 3 + 1] = -100
        leaves = [x.clone().requires_grad_(), W.clone().requires_grad_()]
        truth = F.cross_entropy(leaves[0] @ leaves[1].T, target)
        dx, dW = torch.autograd.grad(truth, leaves)
        watch = _Largest(17, 8)
        with watch:
            got = answer(x, W, target, chunk)
        if not (isinstance(got, tuple | list) and len(got) == 3):
            raise Wrong("return (loss, dx, dW)")
        if watch.rows > chunk:
            raise Wrong(f"{watch.rows} rows of logits existed at once, where a chunk is {chunk}")
        each = F.cross_entropy(x @ W.T, target, reduction="none", ignore_index=-100)
        means = torch.stack([c.sum() / max(1, int((t != -100).sum())) for c, t in zip(each.split(chunk), target.split(chunk), strict=True)])
        loss = torch.as_tensor(got[0], dtype=torch.float64)
        if n > chunk and torch.allclose(loss, means.mean()) and not torch.allclose(loss, truth):
            raise Wrong(
                "that is a mean of the chunks' means: tokens in chunks with few targets weigh more. Divide by the targets of all tokens"
            )
        if torch.allclose(loss, each.sum() / n) and not torch.allclose(loss, truth):
            raise Wrong("the mean divides by all tokens: those with a target of −100 do not count")
        near(f"the loss of {n} tokens", loss, truth.detach(), rounding=64)
        near("dx", got[1], dx, rounding=256, why="Is it divided by the number of targets, and zero for ignored tokens?")
        near("dW", got[2], dW, rounding=256, why="Every chunk adds its dzᵀ x.")
    none = answer(torch.randn(4, 8), torch.randn(17, 8), torch.full((4,), -100), 2)
    for what, value in zip(("loss", "dx", "dW"), none, strict=True):
        if bool(torch.as_tensor(value).isnan().any()) or bool((torch.as_tensor(value) != 0).any()):
            raise Wrong(f"with every target ignored {what} must be 0, got {torch.as_tensor(value).flatten()[:3].tolist()}: 0/0?")
    return "As with all the logits, and never more than a chunk of them."


@exercise(
    "8.2",
    "FLOPs and bytes of a chunked head",
    hint="a product [a, b] × [b, c]: 2abc FLOPs and 2(ab + bc + ac) bytes; N / C chunks of three; dW read N / C − 1 times more",
)
def cost(answer: Answer) -> str | None:
    for n, h, v, c in ((8, 4, 16, 8), (8192, 4096, 128256, 1024), (64, 2, 10, 16)):
        chunks = n // c
        flops, moved = answer(n, h, v, c)
        same(f"FLOPs for N={n}, H={h}, V={v}, C={c}", flops, 6 * n * h * v, "three products of 2 N H V: a multiply and an add each")
        right = chunks * 2 * 3 * (c * h + v * h + c * v) + (chunks - 1) * 2 * v * h
        if moved == chunks * 2 * 3 * (c * h + v * h + c * v) and chunks > 1:
            raise Wrong("dW is read again in every chunk but the first, since the product adds to it")
        if moved * 2 == right:
            raise Wrong("a number in bf16 is 2 bytes")
        same(f"bytes for N={n}, H={h}, V={v}, C={c}", moved, right, "each of the three products reads two factors and writes one result")
    return None


@exercise("8.3", "what a sum needs", hint='"weight" adds in place; "fp32" holds 4 bytes for each number of W')
def kept_bytes(answer: Answer) -> str | None:
    for v, h in ((128256, 4096), (10, 3)):
        same('bytes for "weight"', answer("weight", v, h), 0, "the product adds to the gradient itself")
        same('bytes for "fp32"', answer("fp32", v, h), 4 * v * h, "a buffer of W's shape, 4 bytes a number")
    return f"For V = 128256, H = 4096: {4 * 128256 * 4096 / 2**30:.2f} GiB for the fp32 sum."
