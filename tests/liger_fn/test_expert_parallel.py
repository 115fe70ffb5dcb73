"""The experts of a mixture divided over ranks: the contract on a rank alone; its steps; and on two ranks and three what must hold there.

That is in `tests.shards_experts`. Each group of ranks is started once, and runs every check.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import liger_fn
from liger_fn._expert_parallel import packed, ranks_of, unpacked
from tests import cases
from tests.cases import BF16, FP16, FP32, FP64
from tests.contract import Contract, wrong
from tests.numerics import assert_same_bits
from tests.sample import Sample
from tests.shards import Rank, together
from tests.shards_distill import backends
from tests.shards_experts import IN_INTERPRETER, NUMBERS, ON_THREE, SAYS

SIZES = (2, 3)


class TestAlone(Contract):
    """Whose kernels are those of `moe_experts`: that function's contract runs them in the interpreter."""

    @classmethod
    def parametrize(cls, metafunc: pytest.Metafunc, backends: Sequence[str]) -> None:
        super().parametrize(metafunc, [b for b in backends if b != "interpreter"])

    table = cases.EXPERT_PARALLEL_MOE_EXPERTS
    wrong_calls = (
        wrong("x-of-ints", TypeError, "x must be float32", "int64", x=lambda t: t.long()),
        wrong("activation", ValueError, "activation must be one of", "'tanh'", activation="tanh"),
        wrong("packed", ValueError, "packed must be one of", "'rows'", packed="rows"),
        wrong("save", ValueError, "save must be one of", "'all'", save="all"),
        wrong("exchange", ValueError, "exchange must be one of ('all_to_all', 'all_gather')", "'ring'", exchange="ring"),
        wrong("limit", ValueError, "limit must be above 0", "-1", limit=-1.0),
        wrong("gate_up", ValueError, "gate_up must be [E, 2I, 10]", "[2, 10, 26]", gate_up=lambda t: t.mT),
        wrong("index-of-floats", TypeError, "topk_index must be of an integer dtype", topk_index=lambda t: t.float()),
        wrong("tokens", ValueError, "topk_weight must have shape [2, 1, 2]", "[1, 1, 2]", topk_weight=lambda t: t[:1]),
        wrong("dtypes", TypeError, "down must be torch.float32", "bfloat16", down=lambda t: t.to(BF16)),
        wrong("devices", ValueError, "gate_up_bias must be on", "meta", gate_up_bias=lambda t: t.to("meta")),
        wrong("group", TypeError, "group must be a torch.distributed.ProcessGroup", "'ep'", "init_process_group", group="ep"),
    )


@pytest.mark.parametrize("exchange", ["all_to_all", "all_gather"])
def test_a_rank_alone_is_the_function_of_the_whole(backend: str, exchange: str, device: torch.device) -> None:
    s = Sample(cases.MOE_EXPERTS, cases.MOE_EXPERTS.typical, BF16, device)
    (values, grads), op = s.ours(), liger_fn.expert_parallel_moe_experts
    leaves = [t.detach().requires_grad_() for t in s.tensors]
    ys = s.f(op, exchange=exchange)(*leaves)
    assert_same_bits(ys, values, "value")
    assert_same_bits(torch.autograd.grad(ys, leaves, s.cots), grads, "gradient")


# --- steps, without ranks ---------------------------------------------------------------------------------------------------------------


def test_a_token_goes_to_each_rank_once_in_their_order() -> None:
    index = torch.tensor([[5, 0, 1], [-1, -1, -1], [7, -1, 6], [2, 4, 1], [3, 2, 3]], dtype=torch.int32)
    assert ranks_of(index, 2, 4).tolist() == [[0, 2, 4], [4, 4, 4], [3, 4, 4], [0, 1, 2], [1, 4, 4]]
    assert ranks_of(index, 4, 2).tolist() == [[0, 1], [2, 2], [1, 2], [0, 1], [0, 2]]
    assert ranks_of(index[:, :1], 4, 2).tolist() == [[1], [2], [1], [0], [0]]
    assert ranks_of(index[:0], 4, 2).shape == (0, 2)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=lambda d: str(d)[6:])
def test_choices_travel_as_bytes(dtype: torch.dtype) -> None:
    """And say how many experts their sender has: where that is another number, nothing that comes of them is a number."""
    index, weight = torch.tensor([[5, 0, -1], [3, 2, 8]], dtype=torch.int32), torch.randn(2, 3).to(dtype)
    rows = torch.cat((packed(index, weight, 2), packed(index, weight, 3)))
    got = unpacked(rows, 3, dtype, 3, 3)
    assert got[0].tolist() == [[0] * 3, [0] * 3, [2, -3, -4], [0, -1, 5]]
    assert bool(got[1][:2].isnan().all())
    assert_same_bits([got[1][2:]], [weight], "weight")


@pytest.mark.parametrize("dtype", [BF16, FP64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("tokens", [0, 1])
def test_choices_of_no_token_and_of_one(tokens: int, dtype: torch.dtype) -> None:
    """Whose bytes, however they are cut, count as contiguous."""
    index, weight = torch.zeros(tokens, 2, dtype=torch.int32), torch.randn(tokens, 2).to(dtype)
    got = unpacked(packed(index, weight, 3), 2, dtype, 3, 0)
    assert_same_bits(got, [index, weight], "choices")


# --- ranks ------------------------------------------------------------------------------------------------------------------------------


def checks(backend: str, size: int) -> dict[str, Callable[[Rank], None]]:
    """That run on so many ranks of it."""
    if size == 3:
        return {} if backend == "interpreter" else ON_THREE
    return IN_INTERPRETER if backend == "interpreter" else {**NUMBERS, **SAYS}


def work(rank: int, size: int, where: str, kind: str) -> None:
    """One rank: every check on every backend, and what went wrong with it in a file."""
    from tests import conftest

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=f"file://{where}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    assert conftest.BACKENDS  # imported for what it does to the interpreter
    found: dict[tuple[str, str], str | None] = {}
    for backend in backends(kind):
        with liger_fn.use_backend("reference") if backend == "reference" else nullcontext():
            for name, check in checks(backend, size).items():
                found[name, backend] = None
                try:
                    check(Rank(rank, size, device))
                except (Exception, pytest.fail.Exception):
                    found[name, backend] = traceback.format_exc()
    torch.save(found, f"{where}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


Found = Callable[[int], list[dict[tuple[str, str], Any]]]


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

    def of(size: int) -> list[dict[tuple[str, str], Any]]:
        made = once(size)
        if isinstance(made, Exception):
            raise made
        return made

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
