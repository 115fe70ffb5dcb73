r"""How near is near enough, and what "untouched" means.

For one op, dtype and input: truth is the reference in fp64 on the same, already rounded, inputs; naive is the reference in the dtype;
ours is the function under test. Then, with u half the spacing of the output dtype at 1,

    ‖ours − truth‖  ≤  ‖naive − truth‖ + u ‖truth‖

for the value and for each gradient: ours may err no more than plain PyTorch does, but for one rounding of its result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: Tensor) -> Tensor:
    """The memory of `t` as integers: NaN equals itself here, and 0 differs from −0."""
    return t.detach().resolve_neg().contiguous().view(_BITS[t.element_size()])


def assert_same_bits(got: Sequence[Tensor | None], want: Sequence[Tensor | None], what: str) -> None:
    """Each tensor of `got` is that of `want`: same dtype, same shape, same bits; None where it is None."""
    assert len(got) == len(want), f"{what}: {len(got)} tensors, expected {len(want)}"
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a is None or b is None:
            assert a is b, f"{what} {i}: {'None' if a is None else 'a tensor'}, expected {'None' if b is None else 'a tensor'}"
            continue
        assert a.dtype == b.dtype, f"{what} {i}: {a.dtype}, expected {b.dtype}"
        assert a.shape == b.shape, f"{what} {i}: {list(a.shape)}, expected {list(b.shape)}"
        same = torch.equal(bits(a), bits(b))
        assert same, f"{what} {i}: {_differ(a, b)}"


def _differ(a: Tensor, b: Tensor) -> str:
    wrong = bits(a) != bits(b)
    gap = (a.double() - b.double()).abs()
    return f"{int(wrong.sum())} of {a.numel()} elements differ, by at most {float(gap.nan_to_num(math.inf).max()):.3g}"


@contextmanager
def untouched(tensors: Iterable[Tensor | None]) -> Iterator[None]:
    """Nothing inside the block writes to any of the tensors, by any route: kernels bypass autograd's version counter, so bytes decide."""
    kept = [(t, t.detach().clone()) for t in tensors if t is not None]
    yield
    for i, (now, before) in enumerate(kept):
        same = torch.equal(bits(now), bits(before))
        assert same, f"input {i} was written to: {_differ(now, before)}"


def assert_near(ours: Tensor, naive: Tensor, truth: Tensor, what: str) -> None:
    """The numerics rule for one tensor. Where truth is not finite, ours must not be in the same way; the rule holds over the rest."""
    assert ours.shape == naive.shape, f"{what}: shape {list(ours.shape)}, the reference has {list(naive.shape)}"
    assert ours.dtype == naive.dtype, f"{what}: {ours.dtype}, the reference has {naive.dtype}"
    rounded = truth.to(ours.dtype)  # what this dtype can say of it: beyond its range, infinity
    for special, found, wanted in (
        ("NaN", ours.isnan(), rounded.isnan()),
        ("inf", ours == math.inf, rounded == math.inf),
        ("-inf", ours == -math.inf, rounded == -math.inf),
    ):
        wrong = int((found != wanted).sum())
        assert not wrong, (
            f"{what}: {special} in {int(found.sum())} elements, in fp64 in {int(wanted.sum())}; {wrong} of {ours.numel()} differ"
        )

    err, naive_err, one_rounding, size = errors(ours, naive, truth)
    allowed = naive_err + one_rounding
    assert err <= allowed, (
        f"{what}: error {err:.4g} over {allowed:.4g} (plain PyTorch's {naive_err:.4g} + one rounding), ‖truth‖ = {size:.4g}"
    )


def errors(ours: Tensor, naive: Tensor, truth: Tensor) -> tuple[float, float, float, float]:
    """‖ours − truth‖, ‖naive − truth‖, one rounding of truth, and ‖truth‖, over what this dtype can say of truth."""
    kind = torch.finfo(ours.dtype)
    finite = truth.to(ours.dtype).isfinite() & naive.isfinite()
    o, n, t = (x[finite].double() for x in (ours, naive, truth))
    one_rounding = kind.eps / 2 * t.norm() + kind.tiny * kind.eps / 2 * math.sqrt(t.numel())  # the second part: of subnormal numbers
    return float((o - t).norm()), float((n - t).norm()), float(one_rounding), float(t.norm())
