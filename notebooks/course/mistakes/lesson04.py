"""Likely wrong answers of lesson 4. Where a kernel is not the point, plain PyTorch stands for it."""

from __future__ import annotations

import torch

from course import mistake


@mistake("4.1", "Is it the mean of the squares")
def sum_for_mean(x, w, eps):
    r = torch.rsqrt(x.square().sum(1) + eps)
    return x * r[:, None] * w, r


@mistake("4.1", "r of 3 x 13", "by H, not by the block")
def mean_over_the_block(x, w, eps):
    block = 1 << (x.shape[1] - 1).bit_length()
    r = torch.rsqrt(x.float().square().sum(1) / block + eps)
    return (x * r[:, None] * w).to(x.dtype), r


@mistake("4.1", "inside of the root")
def eps_outside(x, w, eps):
    r = 1 / (x.float().square().mean(1).sqrt() + eps)
    return (x * r[:, None] * w).to(x.dtype), r


@mistake("4.1", "Widen x to fp32")
def in_bf16(x, w, eps):
    r = torch.rsqrt(x.square().mean(1) + eps)
    return x * r[:, None] * w, r.float()


@mistake("4.1", "x was overwritten")
def over_its_input(x, w, eps):
    r = torch.rsqrt(x.float().square().mean(1) + eps)
    return x.mul_(r[:, None]).mul_(w), r


@mistake("4.2", "r depends on x too")
def r_as_a_constant(dy, x, w, r):
    return r[:, None] * dy * w


@mistake("4.2", "not its sum")
def sum_of_products(dy, x, w, r):
    g = dy * w
    return r[:, None] * g - x * r[:, None] ** 3 * (g * x).sum(1, keepdim=True)


@mistake("4.2", "without the weight")
def without_weight(dy, x, w, r):
    return r[:, None] * dy - x * r[:, None] ** 3 * (dy * x).mean(1, keepdim=True)


@mistake("4.3", "walk on")
def first_rows(dy, x, r, programs):
    return (dy * x * r[:, None])[:programs].sum(0)


@mistake("4.3", "lacks r")
def without_r(dy, x, r, programs):
    return (dy * x).sum(0)


@mistake("4.3", "NaN", "must write zeros")
def idle_programs_write_nothing(dy, x, r, programs):
    shares = torch.full((programs, x.shape[1]), float("nan"), device=x.device)
    for p in range(min(programs, len(x))):
        shares[p] = (dy * x * r[:, None])[p::programs].sum(0)
    return shares.sum(0)
