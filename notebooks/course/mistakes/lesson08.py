"""Likely wrong answers of lesson 8."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from course import mistake
from course.solutions.lesson08 import cost, head


@mistake("8.1", "rows of logits existed at once")
def all_logits(x, W, target, chunk):
    leaves = [x.clone().requires_grad_(), W.clone().requires_grad_()]
    loss = F.cross_entropy(leaves[0] @ leaves[1].T, target)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


@mistake("8.1", "mean of the chunks' means")
def mean_of_means(x, W, target, chunk):
    parts = [head(a, W, t, chunk) for a, t in zip(x.split(chunk), target.split(chunk), strict=True)]
    return torch.stack([p[0] for p in parts]).mean(), torch.cat([p[1] for p in parts]) / len(parts), sum(p[2] for p in parts) / len(parts)


@mistake("8.1", "do not count")
def divides_by_all(x, W, target, chunk):
    share = (target != -100).sum() / len(target)
    return tuple(part * share for part in head(x, W, target, chunk))


@mistake("8.1", "with every target ignored", "0/0")
def nothing_counts(x, W, target, chunk):
    n = (target != -100).sum()
    return tuple(part * n.clamp(min=1) / n for part in head(x, W, target, chunk))


@mistake("8.1", "dW", "Every chunk adds")
def last_chunk_alone(x, W, target, chunk):
    loss, dx, dW = head(x, W, target, chunk)
    rest = torch.full_like(target, -100)
    last = (len(x) - 1) // chunk * chunk
    rest[last:] = target[last:]
    return loss, dx, head(x, W, rest, chunk)[2] * (rest != -100).sum() / (target != -100).sum()


@mistake("8.2", "a multiply and an add")
def multiplies_alone(N, H, V, C):
    return 3 * N * H * V, cost(N, H, V, C)[1]


@mistake("8.2", "dW is read again")
def writes_dw_once(N, H, V, C):
    return 6 * N * H * V, N // C * 6 * (C * H + V * H + C * V)


@mistake("8.2", "2 bytes")
def numbers_not_bytes(N, H, V, C):
    flops, moved = cost(N, H, V, C)
    return flops, moved // 2


@mistake("8.3", "adds to the gradient itself")
def a_copy_more(accumulate, V, H):
    return {"weight": 2 * V * H, "fp32": 4 * V * H}[accumulate]


@mistake("8.3", "4 bytes a number")
def in_bf16(accumulate, V, H):
    return {"weight": 0, "fp32": 2 * V * H}[accumulate]
