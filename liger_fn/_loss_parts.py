r"""The loss of whole rows of logits from what parts of their columns tell: the shards of a process group.

Part r has n_r of the V columns. From them come m_r, s_r (as in `_loss_rows`), the entropy H_r of their own softmax, Σ_j w_j (a_j − m_r),
and a_y − m_r, −∞ where y is elsewhere. Together they make the whole row's:

    m = max_r m_r        l_r = m_r − m + s_r        s = log Σ_r exp(l_r)        P_r = exp(l_r − s)        entropy = Σ_r P_r (H_r − log P_r)
    a_y − m = max_r (a_y − m_r) + (m_r − m)         Σ_j w_j (a_j − m) = Σ_r Σ_j w_j (a_j − m_r) + W_r (m_r − m)        W_r = Σ_{j in r} w_j

Where the target has the maximum, s = log1p(expm1(s_h) + Σ_{r≠h} exp(l_r)), h the part that has it: no digit of a small loss is lost.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._check import wide_dtype
from ._kept_rows import Chunk
from ._launch import has_fp64
from ._loss_rows import Part, Rows, Terms, valid


class Whole(NamedTuple):
    """Of each row, over all classes, in fp64 where the device has it."""

    stats: Tensor  # [n, 2], m and s
    nll: Tensor
    spread: Tensor  # Σ_j w_j (lse − a_j), under label smoothing
    aux: Tensor | None  # [4, n], as `Rows` writes them


def look(a: Tensor, target: Tensor, ignore_index: int, terms: Terms, part: Part, rows: Rows, *, aux: bool) -> Tensor:
    """What `joined` needs of n rows, from some of their columns: numbers in one piece, to be sent as they are. `target`: `[n]`."""
    n = len(target)
    made = a.new_empty((8 if aux else 4) * n, dtype=wide_dtype(a))
    rows(
        a, target, ignore_index, terms, stats=made[: 2 * n].view(n, 2), loss=made[2 * n : 4 * n].view(2, n),
        aux=made[4 * n :].view(4, n) if aux else None, part=part,
    )  # fmt: skip
    return made


def joined(parts: Tensor, weights: Tensor, target: Tensor, ignore_index: int, classes: int, sound: Tensor | None = None) -> Whole:
    """Of all parts, `[parts, numbers]` as `look` made them; `weights` are the W_r. Where it is not `sound`, all is NaN."""
    n, none = len(target), -torch.inf
    if has_fp64(parts.device):
        parts = parts.double()
    tops, rests = parts[:, : 2 * n].unflatten(1, (n, 2)).unbind(-1)
    gaps, spreads = parts[:, 2 * n : 4 * n].unflatten(1, (2, n)).unbind(1)
    top = tops.amax(0)
    fall = torch.where(tops == top, 0.0, tops - top)
    gaps = gaps.masked_fill(tops == none, none)  # a part none of whose classes is possible
    gap = (gaps + fall).amax(0).masked_fill(top == none, torch.nan)
    inside = fall + rests
    e = torch.exp(inside)
    others = torch.where((gaps == 0) & (fall == 0), torch.expm1(rests), e).sum(0)
    rest = torch.where(gap == 0, torch.log1p(others), torch.log(e.sum(0)))
    spread = weights.sum() * rest - (spreads + weights.unsqueeze(-1) * fall).sum(0)
    if sound is not None:
        rest = rest.where(sound, torch.nan)
    counted, wrong, _ = valid(target, ignore_index, classes)
    nll = (rest - gap).masked_fill(wrong, torch.nan)
    if parts.shape[1] == 4 * n:
        return Whole(torch.stack((top, rest), 1), nll, spread, None)
    log_p = inside - rest
    p = torch.exp(log_p)
    entropy = torch.where(p == 0, 0.0, p * (parts[:, 6 * n : 7 * n] - log_p)).sum(0)
    hit = ((gap == 0) & (nll == nll)).to(top.dtype)
    aux = torch.stack((top + rest, -nll, torch.where(nll == nll, entropy, nll), hit))
    aux[0].masked_fill_(wrong, torch.nan)
    return Whole(torch.stack((top, rest), 1), nll, spread, aux.masked_fill_(~counted, 0.0))


def losses(row: Whole, target: Tensor, ignore_index: int, terms: Terms, classes: int) -> Tensor:
    """The loss of each row."""
    each = (1.0 - terms.smoothing) * row.nll
    if terms.weight is not None:
        each *= terms.weight[target.clamp(0, classes - 1)]
    if terms.smoothing:
        each += terms.smoothing / classes * row.spread
    if terms.z:
        each += terms.z * row.stats.sum(-1).square()
    return each.masked_fill(target == ignore_index, 0.0)


def put(t: Tensor, chunk: Chunk, rows: Tensor) -> None:
    """Write the rows of a chunk."""
    if chunk.index is None:
        t[chunk.at] = rows
    else:
        t[chunk.index] = rows.to(t.dtype)
