"""Likely wrong answers of lesson 7. Where a kernel is not the point, plain PyTorch stands for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from course import mistake


@mistake("7.1", "brought to the new maximum")
def sums_added(a, b):
    return torch.maximum(a[0], b[0]), a[1] + b[1]


@mistake("7.1", "gives NaN")
def no_care_for_infinity(a, b):
    m = torch.maximum(a[0], b[0])
    return m, a[1] * torch.exp(a[0] - m) + b[1] * torch.exp(b[0] - m)


def _by_blocks(z, target, shrink=True, other=-torch.inf, shift=True):
    m, s = torch.full((len(z),), -torch.inf if shift else 0.0, device=z.device), torch.zeros(len(z), device=z.device)
    padded = F.pad(z, (0, -z.shape[1] % 16), value=other)
    for block in padded.split(16, 1):
        new = torch.maximum(m, block.max(1).values) if shift else m
        s = s * (torch.exp(m - new) if shrink else 1.0) + torch.exp(block - new[:, None]).sum(1)
        m = new
    lse = m + s.log()
    at = z.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return torch.where(target == -100, 0.0, lse - at), lse


@mistake("7.2", "s must be shrunk")
def never_shrunk(z, target):
    return _by_blocks(z, target, shrink=False)


@mistake("7.2", "beyond the row must be −inf")
def zeros_beyond(z, target):
    return _by_blocks(z, target, other=0.0)


@mistake("7.2", "overflows")
def no_maximum(z, target):
    return _by_blocks(z, target, shift=False)


@mistake("7.2", "ignored rows", "no column")
def ignores_nothing(z, target):
    lse = z.logsumexp(1)
    return lse - z.gather(1, target.clamp(min=0)[:, None])[:, 0], lse


def _gradient(z, target, lse, g, up=True, hot=True, choose=True):
    p = (z - lse[:, None]).exp()
    one = F.one_hot(target.clamp(min=0), z.shape[1])
    dz = (g[:, None] if up else 1.0) * (p - (one if hot else 0))
    counts = (target != -100)[:, None]
    return torch.where(counts, dz, 0.0) if choose else dz * counts


@mistake("7.3", "g is missing")
def upstream_of_one(z, target, lse, g):
    return _gradient(z, target, lse, g, up=False)


@mistake("7.3", "at the target is missing")
def softmax_alone(z, target, lse, g):
    return _gradient(z, target, lse, g, hot=False)


@mistake("7.3", "0 · NaN")
def multiplied_by_zero(z, target, lse, g):
    return _gradient(z, target, lse, g, choose=False)
