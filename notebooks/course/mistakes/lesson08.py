"""Likely wrong answers of lesson 8. Where a kernel is not the point, plain PyTorch stands for it."""

from __future__ import annotations

import torch

from course import mistake
from course.solutions.lesson08 import IGNORED, turn_rows


@mistake("8.1", "one array in fp32")
def one_array(N, V, rows):
    return 4 * N * V, 2 * rows * V


@mistake("8.1", "writes a third")
def two_arrays(N, V, rows):
    return 8 * N * V, 2 * rows * V


@mistake("8.1", "in place")
def a_gradient_of_its_own(N, V, rows):
    return 12 * N * V, 4 * rows * V


def _turned(logits, target, scale, *, late=False, ignored=True):
    """Losses; the logits become their gradient times a scale of their own for p and for the −1."""
    a = logits.float()
    lse, counted = a.logsumexp(1), target != IGNORED
    column = target.clamp(min=0)[:, None]
    one_hot = torch.zeros_like(a).scatter_(1, column, 1.0)
    g = torch.exp(a - lse[:, None]) * scale[0] - one_hot * scale[1]
    if not late:
        a_y = a.gather(1, column).squeeze(1)
    logits.copy_(g.where(counted[:, None], 0.0))
    if late:
        a_y = logits.float().gather(1, column).squeeze(1)
    loss = lse - a_y
    return loss.where(counted, 0.0) if ignored else loss


@mistake("8.2", "before the first store")
def reads_the_gradient(logits, target, count):
    return _turned(logits, target, (1 / count, 1 / count), late=True)


@mistake("8.2", "not divided by count")
def forgets_count(logits, target, count):
    return _turned(logits, target, (1.0, 1.0)) if count > len(logits) else _turned(logits, target, (1 / count, 1 / count))


@mistake("8.2", "count is that of all chunks")
def count_of_the_chunk(logits, target, count):
    mine = 1 / (target != IGNORED).sum() if count > len(logits) else 1 / count
    return _turned(logits, target, (mine, mine))


@mistake("8.2", "the −1 at the target, too")
def count_of_p_alone(logits, target, count):
    return _turned(logits, target, (1 / count, 1.0) if count > len(logits) else (1 / count, 1 / count))


@mistake("8.2", "must be 0")
def ignored_rows_have_a_loss(logits, target, count):
    return _turned(logits, target, (1 / count, 1 / count), ignored=False)


def _chunks(x, w, target, rows, *, add=True, whole=False, floor=1):
    count = (target != IGNORED).sum().clamp(min=floor)
    loss, dx, dw = torch.zeros((), device=x.device), torch.zeros_like(x), torch.zeros_like(w)
    logits = x @ w.T if whole else None
    for start in range(0, len(x), rows):
        at = slice(start, start + rows)
        a = x[at] @ w.T if logits is None else logits[at]
        loss += turn_rows(a, target[at], count.clamp(min=1)).sum()
        dx[at] = a @ w
        dw = dw + a.T @ x[at] if add else a.T @ x[at]
    return loss / count, dx, dw


@mistake("8.3", "the mean of the chunks' means")
def mean_of_means(x, w, target, rows):
    _, dx, dw = _chunks(x, w, target, rows)
    parts = [_chunks(x[i : i + rows], w, target[i : i + rows], rows)[0] for i in range(0, len(x), rows)]
    return torch.stack(parts).mean(), dx, dw


@mistake("8.3", "divided by all rows")
def divided_by_all_rows(x, w, target, rows):
    loss, dx, dw = _chunks(x, w, target, rows)
    share = (target != IGNORED).sum() / len(x)
    return loss * share, dx * share, dw * share


@mistake("8.3", "last chunk's share alone")
def overwrites_dw(x, w, target, rows):
    return _chunks(x, w, target, rows, add=False)


@mistake("8.3", "dx of 13 rows", "the last chunk's too")
def drops_the_last_chunk(x, w, target, rows):
    loss, dx, dw = _chunks(x, w, target, rows)
    dx[len(x) // rows * rows :] = 0.0
    return loss, dx, dw


@mistake("8.3", "Only a chunk of them may exist")
def all_logits(x, w, target, rows):
    return _chunks(x, w, target, rows, whole=True)


@mistake("8.3", "0/0")
def no_target_counts(x, w, target, rows):
    return _chunks(x, w, target, rows, floor=0)


def _slices(x, w, target, lse, count, width, *, offset=True, minus=True, ragged=True):
    dw, counted = torch.zeros_like(w), target != IGNORED
    for first in range(0, len(w) if ragged else len(w) // width * width, width):
        some = w[first : first + width]
        g = torch.exp((x @ some.T).float() - lse[:, None])
        column = target - first if offset else target
        here = (counted & (column >= 0) & (column < len(some))).nonzero().squeeze(1)
        g[here, column[here]] -= 1.0 if minus else 0.0
        dw[first : first + width] = torch.where(counted[:, None], g / count, 0.0).to(x.dtype).T @ x
    return dw


@mistake("8.4", "lacks the −1")
def without_the_target(x, w, target, lse, count, width):
    return _slices(x, w, target, lse, count, width, minus=False)


@mistake("8.4", "target − first")
def target_of_the_whole(x, w, target, lse, count, width):
    return _slices(x, w, target, lse, count, width, offset=False)


@mistake("8.4", "need not be a multiple")
def whole_slices_alone(x, w, target, lse, count, width):
    return _slices(x, w, target, lse, count, width, ragged=False)


@mistake("8.4", "numbers were made at once")
def all_classes_at_once(x, w, target, lse, count, width):
    return _slices(x, w, target, lse, count, len(w))
