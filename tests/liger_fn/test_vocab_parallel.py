"""The vocabulary-parallel losses: the contract on a rank alone; and on two ranks and three against the same function of the whole weight.

Each group of ranks is started once, and runs every check of this file. What is compared to fp64 comes back from the ranks as tensors, and
is judged here; the other checks say on each rank whether they hold.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import liger_fn
from tests import cases
from tests.cases import BF16, FP16, FP32, Case, Table
from tests.contract import Contract, wrong
from tests.numerics import assert_near, assert_same_bits
from tests.sample import Sample, Tensors, flat
from tests.shards import LONG, SAYS, Rank, together

SIZES = (2, 3)

shard_errors = (
    wrong("start-alone", ValueError, "vocab_start and vocab_size must come together", "vocab_start=3", vocab_start=3),
    wrong("size-alone", ValueError, "vocab_start and vocab_size must come together", "vocab_size=90", vocab_size=90),
    wrong("beyond", ValueError, "must be classes of the vocabulary", "[10, 73)", "vocab_size=63", vocab_start=10, vocab_size=63),
    wrong("not-all", ValueError, "all of them for a rank alone", "[0, 63)", "vocab_size=64", vocab_start=0, vocab_size=64),
    wrong("negative-start", ValueError, "vocab_start must be an integer of at least 0", "-1", vocab_start=-1, vocab_size=64),
    wrong("group", TypeError, "group must be a torch.distributed.ProcessGroup", "'tp'", "init_process_group", group="tp"),
    wrong("accumulate", ValueError, "accumulate must be one of", "'bf16'", accumulate="bf16"),
    wrong("weight-transposed", ValueError, "weight must be [V, 24]", "[24, 63]", weight=lambda w: w.T),
)


def on_cpu(*calls: Any) -> tuple[Any, ...]:
    """Wrong calls that a GPU answers with NaN."""
    return () if torch.cuda.is_available() else calls


class TestLossAlone(Contract):
    table = cases.VOCAB_PARALLEL_LINEAR_CROSS_ENTROPY
    wrong_calls = (
        *shard_errors,
        wrong("class-weight", ValueError, "class_weight must have shape [63]", "all ranks", class_weight=lambda w: w[1:]),
        *on_cpu(wrong("target", ValueError, "every target must be in [0, 63)", "got 63", target=lambda t: t.clone().fill_(63))),
    )


class TestLogProbAlone(Contract):
    table = cases.VOCAB_PARALLEL_LINEAR_LOG_PROB
    wrong_calls = (
        *shard_errors,
        *on_cpu(wrong("target", ValueError, "every target must be in [0, 63)", "got -1", target=lambda t: t.clone().fill_(-1))),
    )


@pytest.mark.parametrize("table", [cases.LINEAR_CROSS_ENTROPY, cases.LINEAR_LOG_PROB], ids=lambda t: t.op)
def test_a_rank_alone_is_the_function_of_the_whole(backend: str, table: Table, device: torch.device) -> None:
    s = Sample(table, table.typical, BF16, device)
    (values, grads), op = s.ours(), getattr(liger_fn, f"vocab_parallel_{table.op}")
    leaves = [t.detach().requires_grad_() for t in s.tensors]
    ys = s.f(op)(*leaves)
    assert_same_bits(ys, values, "value")
    assert_same_bits(torch.autograd.grad(ys, leaves, s.cots), grads, "gradient")


# --- cases, judged here -----------------------------------------------------------------------------------------------------------------


def chosen(
    table: Table, *names: str, draws: int = 8, dtypes: tuple[torch.dtype, ...] = (FP32, BF16)
) -> list[tuple[Table, Case, torch.dtype]]:
    """Some cases of a table."""
    found = [replace(c, draws=min(c.draws, draws)) for c in table.cases if c.name in names]
    assert len(found) == len(names)
    return [(table, c, dtype) for c in found for dtype in dtypes]


JUDGED = {
    f"{table.op}-{case.name}-{str(dtype)[6:]}": (table, case, dtype)
    for table, case, dtype in (
        *((t, replace(t.typical, draws=2), d) for t in (cases.LINEAR_CROSS_ENTROPY, cases.LINEAR_LOG_PROB) for d in (FP32, BF16)),
        *chosen(cases.LINEAR_CROSS_ENTROPY, "chunks-mean", "shift", dtypes=(FP32,)),
        *chosen(cases.LINEAR_CROSS_ENTROPY, "exact-sum"),
        *chosen(cases.LINEAR_CROSS_ENTROPY, "chunks-none", "exact-none", "recompute-fp32", dtypes=(BF16,)),
        *chosen(cases.LINEAR_CROSS_ENTROPY, "weight-mean", "recompute-exact", dtypes=(FP16,)),
        *chosen(cases.LINEAR_LOG_PROB, "weight"),
        *chosen(cases.LINEAR_LOG_PROB, "9x63", "exact", dtypes=(FP16,)),
    )
}


def backends(kind: str) -> tuple[str, ...]:
    """That ranks on this kind of device have."""
    if kind == "cuda":
        return "triton", "reference"
    return ("interpreter", "reference") if liger_fn.backend(torch.empty(0)) == "interpreter" else ("reference",)


def judged(backend: str) -> list[str]:
    """The cases that run on it: in the interpreter, those that are short."""
    return [name for name in JUDGED if backend != "interpreter" or "typical" in name]


def said(backend: str, size: int) -> list[Callable[[Rank], None]]:
    """The checks that run on so many ranks of it."""
    return [check for check in SAYS if backend != "interpreter" or (check not in LONG and size == 2)]


def names(backend: str, size: int) -> list[str]:
    return [check.__name__ for check in said(backend, size)]


def run(on: Rank, table: Table, case: Case, dtype: torch.dtype) -> list[tuple[Tensors, Tensors]]:
    """Values, and gradients of x and of this rank's rows, of each draw."""
    op, made = getattr(liger_fn, f"vocab_parallel_{table.op}"), []
    for seed in range(case.draws):
        s = Sample(table, case, dtype, on.device, seed)
        leaves = {k: t.detach().requires_grad_() for k, t in s.inputs.items() if k in s.wrt and t is not None}
        own = {k: t if k == "x" else on.shard(t) for k, t in leaves.items()}
        ys = flat(op(**{**s.inputs, **own}, **case.options, **on.where(s.inputs["weight"].shape[0])))  # type: ignore[union-attr]
        grads = torch.autograd.grad(ys, [leaves[k] for k in s.wrt], s.cots)
        on.agree(*(y.detach() for y in ys), grads[0])
        rows = [g if k == "x" else on.shard(g) for k, g in zip(s.wrt, grads, strict=True)]
        made.append((tuple(y.detach().cpu() for y in ys), tuple(g.cpu() for g in rows if g is not None)))
    return made


def work(rank: int, size: int, where: str, kind: str) -> None:
    """One rank: every check on every backend, what came of it in a file."""
    from tests import conftest

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    on, found = Rank(rank, size, device), {}
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=f"file://{where}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    assert conftest.BACKENDS  # imported for what it does to the interpreter
    for backend in backends(kind):
        with liger_fn.use_backend("reference") if backend == "reference" else nullcontext():
            for name in judged(backend):
                found[name, backend] = attempt(lambda name=name: run(on, *JUDGED[name]))
            for check in said(backend, size):
                found[check.__name__, backend] = attempt(lambda check=check: check(on))
    torch.save(found, f"{where}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def attempt(check: Callable[[], Any]) -> Any:
    """What it returns, or what went wrong."""
    try:
        return check()
    except Exception:
        return traceback.format_exc()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[tuple[str, str], Any]]]:
    """What so many ranks found; they are started once."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")

    @cache
    def once(size: int) -> Any:
        try:
            return together(work, size, tmp_path_factory.mktemp("ranks"), "cpu")
        except Exception as error:
            return error

    def of(size: int) -> list[dict[tuple[str, str], Any]]:
        made = once(size)
        if isinstance(made, Exception):
            raise made
        return made

    return of


def judge(found: list[dict[tuple[str, str], Any]], name: str, backend: str) -> None:
    """The numerics rule over all draws of a case, the ranks' rows put together."""
    for rank, every in enumerate(found):
        assert not isinstance(every[name, backend], str), f"rank {rank}: {every[name, backend]}"
    table, case, dtype = JUDGED[name]
    samples = [Sample(table, case, dtype, torch.device("cpu"), seed) for seed in range(case.draws)]
    wanted, plain = [s.truth() for s in samples], [s.naive() for s in samples]
    draws = [[every[name, backend][i] for every in found] for i in range(case.draws)]
    for i in range(len(samples[0].cots)):
        ours = torch.stack([ranks[0][0][i] for ranks in draws])
        assert_near(ours, *(torch.stack([v[i] for v, _ in of]) for of in (plain, wanted)), f"{name}, value {i}")
    for i, k in enumerate(samples[0].wrt):
        ours = torch.stack([ranks[0][1][i] if k == "x" else torch.cat([grads[i] for _, grads in ranks]) for ranks in draws])
        assert_near(ours, *(torch.stack([g[i] for _, g in of]) for of in (plain, wanted)), f"{name}, gradient of {k}")


Found = Callable[[int], list[dict[tuple[str, str], Any]]]


@pytest.mark.parametrize(("size", "kind", "name"), [(n, b, name) for n in SIZES for b in backends("cpu") for name in judged(b)])
def test_shards_are_the_whole(found: Found, size: int, kind: str, name: str) -> None:
    judge(found(size), name, kind)


@pytest.mark.parametrize(("size", "kind", "check"), [(n, b, check) for n in SIZES for b in backends("cpu") for check in names(b, n)])
def test_holds_on_every_rank(found: Found, size: int, kind: str, check: str) -> None:
    for rank, every in enumerate(found(size)):
        assert every[check, kind] is None, f"rank {rank}: {every[check, kind]}"


@pytest.mark.multi_gpu
def test_on_two_gpus(tmp_path: Path) -> None:
    """Everything above with NCCL and compiled kernels. (The draws of a GPU are its own: values are judged on each rank only.)"""
    for rank, every in enumerate(together(work, 2, tmp_path, "cuda")):
        for (name, backend), said in every.items():
            assert not isinstance(said, str), f"{name}, {backend}, rank {rank}: {said}"
