"""The vocabulary-parallel distillation: the contract on a rank alone; its steps; and on two ranks and three what must hold there.

That is in `tests.shards_distill`. Each group of ranks is started once, and runs every check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import liger_fn
from liger_fn._distill_kernel import kernel_rows
from liger_fn._distill_rows import STATS, Distance, divergences, plain_rows
from liger_fn.vocab_parallel_distill import _sums, _tops
from tests import cases
from tests.cases import BF16, FP32
from tests.contract import Contract, wrong
from tests.numerics import assert_near, assert_same_bits
from tests.sample import Sample
from tests.shards import together
from tests.shards_distill import DIVERGENCES, backends, checks, work

SIZES = (2, 3)


class TestAlone(Contract):
    """Whose kernels are those of `linear_distill`: that function's contract runs them in the interpreter."""

    @classmethod
    def parametrize(cls, metafunc: pytest.Metafunc, backends: Sequence[str]) -> None:
        super().parametrize(metafunc, [b for b in backends if b != "interpreter"])

    table = cases.VOCAB_PARALLEL_LINEAR_DISTILL
    wrong_calls = (
        wrong("start-alone", ValueError, "vocab_start and vocab_size must come together", "vocab_start=3", vocab_start=3),
        wrong("beyond", ValueError, "must be classes of the vocabulary", "[10, 73)", "vocab_size=63", vocab_start=10, vocab_size=63),
        wrong("not-all", ValueError, "all of them for a rank alone", "[0, 63)", "vocab_size=64", vocab_start=0, vocab_size=64),
        wrong("group", TypeError, "group must be a torch.distributed.ProcessGroup", "'tp'", "init_process_group", group="tp"),
        wrong("other-classes", ValueError, "the 63 rows of weight", "62", weight_teacher=lambda w: w[1:], bias_teacher=None),
        wrong("exact", ValueError, "'auto', 'weight', 'fp32'", "'exact'", accumulate="exact"),
    )


def test_a_rank_alone_is_the_function_of_the_whole(backend: str, device: torch.device) -> None:
    s = Sample(cases.LINEAR_DISTILL, cases.LINEAR_DISTILL.typical, BF16, device)
    (values, grads), op = s.ours(), liger_fn.vocab_parallel_linear_distill
    leaves = [t.detach().requires_grad_() for t in s.tensors]
    ys = s.f(op)(*leaves)
    assert_same_bits(ys, values, "value")
    assert_same_bits(torch.autograd.grad(ys, leaves, s.cots), grads, "gradient")


# --- steps over columns, without ranks --------------------------------------------------------------------------------------------------


class Every:
    """In place of a shard: what all would have sent."""

    def __init__(self, *sent: Tensor) -> None:
        self.sent = torch.stack(sent)

    def gather(self, mine: Tensor) -> Tensor:
        return self.sent


def by_columns(run: Any, a: Tensor, t: Tensor, target: Tensor, ends: tuple[int, ...], distance: Distance) -> tuple[Tensor, Tensor]:
    """The divergences of rows, and their gradients, from shards between `ends`."""
    cuts = list(zip((0, *ends), (*ends, a.shape[1]), strict=True))
    own = [[z[:, i:j].clone(memory_format=torch.contiguous_format) for z in (a, t)] for i, j in cuts]
    wide = torch.promote_types(a.dtype, FP32)
    stats = [a.new_full((len(a), STATS), torch.nan, dtype=wide) for _ in cuts]
    losses = [s.new_full((len(a),), torch.nan) for s in stats]
    for (some, of), s in zip(own, stats, strict=True):
        run(some, of, target, -100, distance, stats=s, step="tops")
    tops, shares = _tops(Every(*(s[:, :4] for s in stats)), stats[0], distance.temperature, None)  # type: ignore[arg-type]
    for (some, of), s, loss in zip(own, stats, losses, strict=True):
        s[:, :4] = tops
        run(some, of, target, -100, distance, stats=s, loss=loss, step="sums")
    sent = Every(*(torch.cat((loss.unsqueeze(1), s[:, 4:]), 1) for s, loss in zip(stats, losses, strict=True)))
    row = _sums(sent, stats[0], shares, distance.name == "tvd")  # type: ignore[arg-type]
    for (some, of), s in zip(own, stats, strict=True):
        s[:, 4:] = row[:, 1:]
        run(some, of, target, -100, distance, stats=s, grad=True)
    return row[:, 0].to(wide), torch.cat([some for some, _ in own], 1)


def of_definition(a: Tensor, t: Tensor, counted: Tensor, distance: Distance) -> Tensor:
    """The gradient of the logits, of the definition."""
    leaf = a.clone().requires_grad_()
    return torch.autograd.grad(divergences(leaf, t, counted, distance).sum(), leaf)[0].nan_to_num(0.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rows_by_columns_are_the_whole(backend: str, divergence: str, dtype: torch.dtype, device: torch.device) -> None:
    """One of the shards a single class, one of them impossible; and a row that does not count."""
    run, distance = plain_rows if backend == "reference" else kernel_rows, Distance(divergence, 0.3, 1.5)
    a, t = (4 * torch.randn(2, 6, 100, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    a[:, 90:], t[:, 90:], a[5, :40], target = -torch.inf, -torch.inf, a[5, :40] - 300, torch.arange(6, device=device)
    target[2] = -100
    got = by_columns(run, a, t, target, (50, 51, 90), distance)
    loss = got[0].new_empty(6)
    run(a.clone(), t, target, -100, distance, stats=loss.new_empty(6, STATS), loss=loss, grad=True)
    torch.testing.assert_close(got[0], loss, rtol=1e-6, atol=0)
    naive, truth = (of_definition(a.to(wide), t.to(wide), target != -100, distance) for wide in (FP32, torch.float64))
    # What shards tell of p is rounded once more than what a row has at hand: by as much as plain PyTorch rounds it.
    assert_near(got[1], naive.to(dtype), truth, "gradient of the logits")
    assert not got[1][2].any()


# --- ranks ------------------------------------------------------------------------------------------------------------------------------

Found = Callable[[int], list[dict[tuple[str, str], str | None]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What so many ranks found; they are started once."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")

    @cache
    def once(size: int) -> Any:
        try:
            return together(work, size, tmp_path_factory.mktemp("ranks"), "cpu")
        except Exception as error:
            return error

    def of(size: int) -> list[dict[tuple[str, str], str | None]]:
        made = once(size)
        if isinstance(made, Exception):
            raise made
        return made  # type: ignore[no-any-return]

    return of


@pytest.mark.parametrize(("size", "kind", "check"), [(n, b, check) for n in SIZES for b in backends("cpu") for check in checks(b, n)])
def test_holds_on_every_rank(found: Found, size: int, kind: str, check: str) -> None:
    for rank, every in enumerate(found(size)):
        assert every[check, kind] is None, f"rank {rank}: {every[check, kind]}"


@pytest.mark.multi_gpu
def test_on_two_gpus(tmp_path: Path) -> None:
    """Everything above with NCCL and compiled kernels."""
    for rank, every in enumerate(together(work, 2, tmp_path, "cuda")):
        for (name, backend), said in every.items():
            assert said is None, f"{name}, {backend}, rank {rank}: {said}"
