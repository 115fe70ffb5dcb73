"""Answers of lesson 8."""

from __future__ import annotations

import torch

from course import solution


@solution("8.1")
def head(x, W, target, chunk):
    n = (target != -100).sum().clamp(min=1)
    loss, dx, dW = torch.zeros((), dtype=x.dtype), torch.empty_like(x), torch.zeros_like(W)
    for start in range(0, len(x), chunk):
        xc, t = x[start : start + chunk], target[start : start + chunk]
        counts = t != -100
        z = xc @ W.T
        lse = torch.logsumexp(z, 1)
        at = t.clamp(min=0)[:, None]
        loss += ((lse - z.gather(1, at)[:, 0]) * counts).sum() / n
        dz = (z - lse[:, None]).exp()
        dz.scatter_add_(1, at, -torch.ones_like(dz[:, :1]))
        dz = dz * counts[:, None] / n
        dx[start : start + chunk] = dz @ W
        dW += dz.T @ xc
    return loss, dx, dW


@solution("8.2")
def cost(N, H, V, C):
    chunks = N // C
    one = 2 * (C * H + V * H + C * V)
    return 6 * N * H * V, chunks * 3 * one + (chunks - 1) * 2 * V * H


@solution("8.3")
def kept_bytes(accumulate, V, H):
    return {"weight": 0, "fp32": 4 * V * H}[accumulate]
