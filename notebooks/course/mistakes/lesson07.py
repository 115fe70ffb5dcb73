"""Likely wrong answers of lesson 7. Where a kernel is not the point, plain PyTorch stands for it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from course import mistake
from course.solutions.lesson07 import IGNORED, NONE, Donated, turn_


@mistake("7.1", "different units")
def sums_as_they_are(m1, s1, m2, s2):
    return torch.maximum(m1, m2), s1 + s2


@mistake("7.1", "Which of the two sums")
def the_other_factor(m1, s1, m2, s2):
    m = torch.maximum(m1, m2)
    return m, s1 * torch.exp(m2 - m) + s2 * torch.exp(m1 - m)


@mistake("7.1", "exp(300) is inf")
def without_a_maximum(m1, s1, m2, s2):
    m = torch.maximum(m1, m2)
    return m, (s1 * torch.exp(m1) + s2 * torch.exp(m2)) / torch.exp(m)


@mistake("7.1", "NaN", "subtract 0 instead")
def no_care_for_empty_parts(m1, s1, m2, s2):
    m = torch.maximum(m1, m2)
    return m, s1 * torch.exp(m1 - m) + s2 * torch.exp(m2 - m)


def _walk(logits, target, ignore_index, *, rescale=True, guard=True, edge=-torch.inf, branch=True):
    """The loop of the kernel, block by block, with one thing wrong."""
    m = torch.full((len(logits),), -torch.inf, device=logits.device)
    s = torch.zeros_like(m)
    for start in range(0, logits.shape[1], 64):
        a = logits[:, start : start + 64].float()
        a = torch.nn.functional.pad(a, (0, 64 - a.shape[1]), value=edge)
        new = torch.maximum(m, a.amax(1))
        shift = torch.where(new == -torch.inf, 0.0, new) if guard else new
        s = (s * torch.exp(m - shift) if rescale else s) + torch.exp(a - shift[:, None]).sum(1)
        m = new
    lse = m + torch.log(s)
    loss = lse - logits.gather(1, target.clamp(min=0)[:, None]).squeeze(1).float()
    counted = target != ignore_index
    return (loss.where(counted, 0.0), lse.where(counted, 0.0)) if branch else (loss * counted, lse * counted)


@mistake("7.2", "load them as −inf")
def zeros_beyond_the_row(logits, target, ignore_index):
    return _walk(logits, target, ignore_index, edge=0.0)


@mistake("7.2", "running sum carried")
def without_the_rescale(logits, target, ignore_index):
    return _walk(logits, target, ignore_index, rescale=False)


@mistake("7.2", "subtract 0 there")
def an_impossible_block(logits, target, ignore_index):
    return _walk(logits, target, ignore_index, guard=False)


@mistake("7.2", "whatever its logits")
def times_zero(logits, target, ignore_index):
    return _walk(logits, target, ignore_index, branch=False)


@triton.jit
def packed_rows_kernel(a_ptr, y_ptr, loss_ptr, lse_ptr, V, ignore_index, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    y = tl.load(y_ptr + n)
    loss = 0.0
    lse = 0.0
    if y != ignore_index:
        m = NONE
        s = 0.0
        for start in range(0, V, BLOCK):
            j = start + tl.arange(0, BLOCK)
            a = tl.load(a_ptr + n * V + j, mask=j < V, other=NONE).to(tl.float32)
            new = tl.maximum(m, tl.max(a, 0))
            shift = tl.where(new == NONE, 0.0, new)
            s = s * tl.exp(m - shift) + tl.sum(tl.exp(a - shift), 0)
            m = new
        lse = m + tl.log(s)
        loss = lse - tl.load(a_ptr + n * V + y).to(tl.float32)
    tl.store(loss_ptr + n, loss)
    tl.store(lse_ptr + n, lse)


@mistake("7.2", "n · stride, not at n · V")
def rows_without_a_stride(logits, target, ignore_index):
    loss, lse = torch.empty(2, len(logits), device=logits.device)
    packed_rows_kernel[(len(logits),)](logits, target, loss, lse, logits.shape[1], ignore_index, BLOCK=64)
    return loss, lse


def _one_hot(logits, target):
    return torch.nn.functional.one_hot(target.clamp(min=0), logits.shape[1])


def _p(logits, lse):
    return torch.exp(logits.float() - lse[:, None])


@mistake("7.3", "multiplied by its dloss")
def without_dloss(logits, target, lse, dloss, ignore_index):
    return logits.copy_((_p(logits, lse) - _one_hot(logits, target)).where((target != ignore_index)[:, None], 0.0))


@mistake("7.3", "multiplies the −1 at the target, too")
def dloss_of_p_alone(logits, target, lse, dloss, ignore_index):
    g = dloss[:, None] * _p(logits, lse) - _one_hot(logits, target)
    return logits.copy_(g.where((target != ignore_index)[:, None], 0.0))


@mistake("7.3", "0 · NaN is NaN")
def ignored_by_a_product(logits, target, lse, dloss, ignore_index):
    g = (dloss * (target != ignore_index))[:, None] * (_p(logits, lse) - _one_hot(logits, target))
    return logits.copy_(g)


@mistake("7.3", "in new memory")
def not_in_place(logits, target, lse, dloss, ignore_index):
    g = dloss[:, None] * (_p(logits, lse) - _one_hot(logits, target))
    return g.where((target != ignore_index)[:, None], 0.0).to(logits.dtype)


@triton.jit
def unmasked_kernel(a_ptr, y_ptr, lse_ptr, dloss_ptr, stride, V, ignore_index, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    y = tl.load(y_ptr + n)
    for start in range(0, V, BLOCK):
        j = start + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + n * stride + j, mask=j < V, other=0.0).to(tl.float32)
        da = tl.load(dloss_ptr + n) * (tl.exp(a - tl.load(lse_ptr + n)) - tl.where(j == y, 1.0, 0.0))
        da = tl.where(y == ignore_index, 0.0, da)
        tl.store(a_ptr + n * stride + j, da.to(a_ptr.dtype.element_ty), mask=j < stride)


@mistake("7.3", "a neighbour's", "mask=j < V")
def writes_beyond_the_row(logits, target, lse, dloss, ignore_index):
    N, V = logits.shape
    unmasked_kernel[(N,)](logits, target, lse, dloss, logits.stride(0), V, ignore_index, BLOCK=128)
    return logits


class InSilence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        count = (target != IGNORED).sum().clamp(min=1)
        loss = turn_(logits, target, count)
        ctx.save_for_backward(logits)
        return loss.sum() / count

    @staticmethod
    def backward(ctx, dloss):
        return ctx.saved_tensors[0] * dloss, None


@mistake("7.4", "in silence", "increment_version")
def tells_nobody(logits, target):
    return InSilence.apply(logits, target)


class ScaledTwice(Donated):
    @staticmethod
    def backward(ctx, dloss):
        return ctx.saved_tensors[0].mul_(dloss).clone(), None


@mistake("7.4", "modified by an inplace operation")
def scaled_in_place(logits, target):
    return ScaledTwice.apply(logits, target)


class ScaledByAKernel(Donated):
    @staticmethod
    def backward(ctx, dloss):
        made = ctx.saved_tensors[0]
        made.data.mul_(dloss)  # as a kernel writes: past the version counter
        return made.clone(), None


@mistake("7.4", "scaled twice")
def scaled_by_a_kernel(logits, target):
    return ScaledByAKernel.apply(logits, target)


class IgnoresUpstream(Donated):
    @staticmethod
    def backward(ctx, dloss):
        return ctx.saved_tensors[0].clone(), None


@mistake("7.4", "0.125 there")
def upstream_is_one(logits, target):
    return IgnoresUpstream.apply(logits, target)


class OnACopy(Donated):
    @staticmethod
    def forward(ctx, logits, target):
        count = (target != IGNORED).sum().clamp(min=1)
        made = logits.clone()
        loss = turn_(made, target, count)
        ctx.save_for_backward(made)
        return loss.sum() / count


@mistake("7.4", "in their own memory")
def of_a_copy(logits, target):
    return OnACopy.apply(logits, target)
