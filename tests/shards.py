"""What must hold on every rank of a sharded vocabulary: checks that each rank runs, and says whether they hold.

`tests/liger_fn/test_vocab_parallel.py` starts the ranks.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.overrides import TorchFunctionMode

import liger_fn
from tests import cases
from tests.cases import IGNORED
from tests.numerics import assert_near, assert_same_bits, untouched
from tests.sample import Tensors, flat

H, V = 24, 100
loss_of, log_prob_of = liger_fn.vocab_parallel_linear_cross_entropy, liger_fn.vocab_parallel_linear_log_prob


class Rank(NamedTuple):
    """Where a check runs: each rank has the classes [start, stop) of V."""

    rank: int
    size: int
    device: torch.device

    def cut(self, v: int) -> tuple[int, int]:
        """Even shards for two ranks; a half, a single class and what is left for three."""
        ends = [0, v // 2, v] if self.size == 2 else [0, v // 2, v // 2 + 1, v]
        return ends[self.rank], ends[self.rank + 1]

    def where(self, v: int) -> dict[str, int]:
        """The options that say so; none for even shards."""
        return {} if self.size == 2 and v % 2 == 0 else {"vocab_start": self.cut(v)[0], "vocab_size": v}

    def shard(self, t: Tensor | None) -> Tensor | None:
        return t if t is None else t[slice(*self.cut(len(t)))]

    def joined(self, t: Tensor) -> Tensor:
        """The rows of all ranks. Every rank judges the same numbers, so that none goes on without the others."""
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, t.cpu())
        return torch.cat(every).to(self.device)

    def agree(self, *tensors: Tensor) -> None:
        """Every rank has the same bits."""
        for t in tensors:
            every = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(self.size)]
            dist.all_gather(every, t.contiguous())
            for other in every:
                assert_same_bits([t.contiguous()], [other], "what another rank has")


SECONDS = 240  # after which ranks that have not come back are given up


def together(work: Callable[[int, int, str, str], None], size: int, where: Path, kind: str) -> list[dict[tuple[str, str], Any]]:
    """What each rank found, in files called by their numbers. Ranks are forked from a process that has imported all there is to import.

    Each by itself would spend most of its time on that. Whoever has asked for a GPU must not fork: where there is one, they do.
    """
    start = "spawn" if torch.cuda.is_available() else "forkserver"
    if start == "forkserver":
        multiprocessing.get_context(start).set_forkserver_preload(
            [
                "tests.conftest",
                "tests.liger_fn.test_vocab_parallel",
                "tests.shards_distill",
                "tests.liger_fn.test_expert_parallel",
                "torch._dynamo",
            ]
        )
    ranks = mp.start_processes(work, (size, str(where), kind), size, join=False, start_method=start)
    end = time.monotonic() + SECONDS
    try:
        while not ranks.join(timeout=5):
            assert time.monotonic() < end, f"{size} ranks are not done after {SECONDS} s"
    finally:
        for process in ranks.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(where / str(rank)) for rank in range(size)]


def inputs(on: Rank, rows: int = 9, bias: bool = True) -> dict[str, Any]:
    """Of the whole; the targets are the first and the last class of every shard, and some ignored."""
    g = torch.Generator(on.device).manual_seed(0)
    x, w, b = (torch.randn(*shape, device=on.device, generator=g) for shape in ((rows, H), (V, H), (V,)))
    edges = sorted({n for r in range(on.size) for n in (on._replace(rank=r).cut(V)[0], on._replace(rank=r).cut(V)[1] - 1)})
    target = torch.tensor((edges * rows)[:rows], device=on.device)
    target[2::5] = IGNORED
    return {"x": x, "weight": w * 0.4, "target": target, "bias": b if bias else None}


def sharded(on: Rank, whole: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {**whole, "weight": on.shard(whole["weight"]), "bias": on.shard(whole["bias"]), **on.where(V), **options}


def gradients(fn: Callable[..., Any], arguments: dict[str, Any], wanted: tuple[str, ...]) -> tuple[Tensors, Tensors]:
    """Values, and the gradients of the sum of their squares."""
    leaves = {k: arguments[k].detach().requires_grad_() for k in wanted}
    ys = [y for y in flat(fn(**{**arguments, **leaves})) if y.is_floating_point()]
    total = sum((y.square().sum() for y in ys if y.requires_grad), torch.zeros((), dtype=ys[0].dtype, device=ys[0].device))
    return tuple(y.detach() for y in ys), torch.autograd.grad(total, tuple(leaves.values()))


def near(on: Rank, whole: dict[str, Any], op: Any, base: Any, **options: Any) -> None:
    """Values and gradients of `op` over shards, by the numerics rule against `base` of the whole."""
    names = tuple(k for k in ("x", "weight", "bias") if whole[k] is not None)
    values, grads = gradients(op, sharded(on, whole, **options), names)
    on.agree(*values, grads[0])
    every = {**whole, **options}
    wide = {k: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for k, t in every.items()}
    truth, naive = (gradients(base.reference, arguments, names) for arguments in (wide, every))
    for i, y in enumerate(values):
        assert_near(y, naive[0][i], truth[0][i], f"value {i}")
    for name, g, n, t in zip(names, grads, naive[1], truth[1], strict=True):
        assert_near(g if name == "x" else on.joined(g), n, t, f"gradient of {name}")


def aux_is_that_of_the_whole(on: Rank) -> None:
    for options in ({"z_loss": 0.01, "softcap": 3.0}, {"reduction": "none", "label_smoothing": 0.1, "memory_budget": 1}):
        whole = inputs(on)
        near(on, whole, loss_of, liger_fn.linear_cross_entropy, return_aux=True, **options)
        got = loss_of(**sharded(on, whole, return_aux=True, **options))[1]
        want = liger_fn.linear_cross_entropy.reference(**whole, return_aux=True, **options)[1]
        assert torch.equal(got.correct, want.correct)
        assert torch.equal(got.num_valid, want.num_valid)


def a_certain_model_keeps_the_digits_of_its_small_loss(on: Rank) -> None:
    """p_y rounds to 1 on the target's rank; what is left is on others, and on the same."""
    whole = inputs(on, bias=False)
    whole["weight"] = torch.nn.functional.normalize(whole["weight"], dim=1)
    whole["x"] = 48.0 * whole["weight"][whole["target"].clamp(0)]
    for reduction in cases.REDUCTIONS:
        near(on, whole, loss_of, liger_fn.linear_cross_entropy, reduction=reduction)
    near(on, whole, log_prob_of, liger_fn.linear_log_prob)
    loss = loss_of(**sharded(on, whole, reduction="none"))
    assert 0 < float(loss[loss > 0].min()) < 1e-6


def classes_that_are_impossible(on: Rank) -> None:
    """All classes of the last rank, as where the vocabulary was padded to be cut."""
    whole = inputs(on, rows=63)
    first = on._replace(rank=on.size - 1).cut(V)[0]
    whole["bias"][first:] = -torch.inf
    whole["target"] = whole["target"].clamp(max=first - 1)
    near(on, whole, log_prob_of, liger_fn.linear_log_prob)
    near(on, whole, loss_of, liger_fn.linear_cross_entropy, z_loss=0.01, return_aux=True)


def rows_that_are_nan(on: Rank) -> None:
    whole = inputs(on)
    whole["x"][1] = torch.nan
    near(on, whole, loss_of, liger_fn.linear_cross_entropy, reduction="none", return_aux=True)


def rows_that_do_not_count(on: Rank) -> None:
    whole = inputs(on)
    whole["target"].fill_(IGNORED)
    for reduction in cases.REDUCTIONS:
        values, grads = gradients(loss_of, sharded(on, whole, reduction=reduction), ("x", "weight", "bias"))
        assert not any(bool(t.any()) for t in (*values, *grads))


def only_wanted_gradients(on: Rank) -> None:
    """A frozen head, frozen states: the others' gradients are the same bits, and nobody sums what nobody asked for."""
    for op, options in ((loss_of, {}), (loss_of, {"reduction": "none", "accumulate": "exact", "memory_budget": 900}), (log_prob_of, {})):
        arguments = sharded(on, inputs(on), **options)
        _, (dx, dw, db) = gradients(op, arguments, ("x", "weight", "bias"))
        stock, sums = dist.all_reduce, 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal sums
            sums += 1
            return stock(*args, **kwargs)  # noqa: B023

        dist.all_reduce = counted
        try:
            _, frozen_x = gradients(op, arguments, ("weight", "bias"))
            assert sums == 0
            _, frozen_w = gradients(op, arguments, ("x",))
            assert sums > 0
        finally:
            dist.all_reduce = stock
        assert_same_bits(frozen_x, (dw, db), "gradient with frozen x")
        assert_same_bits(frozen_w, (dx,), "gradient with a frozen head")


def same_bits_every_time(on: Rank) -> None:
    arguments = sharded(on, inputs(on), memory_budget=900, label_smoothing=0.1)
    tensors = [t for t in arguments.values() if torch.is_tensor(t)]
    with untouched(tensors):
        values, grads = gradients(loss_of, arguments, ("x", "weight", "bias"))
        again = gradients(loss_of, arguments, ("x", "weight", "bias"))
    assert_same_bits(again[0], values, "value")
    assert_same_bits(again[1], grads, "gradient")


def compiled_and_transformed(on: Rank) -> None:
    """The same bits as eager autograd's, the group given by the caller."""
    for op, options in ((loss_of, {}), (loss_of, {"reduction": "none"}), (log_prob_of, {})):
        arguments = sharded(on, inputs(on), **options)

        def total(x: Tensor, weight: Tensor, op: Any = op, arguments: dict[str, Any] = arguments) -> Tensor:
            y = op(**{**arguments, "x": x, "weight": weight, "group": dist.group.WORLD})
            return (y[0] + y[1].entropy if isinstance(y, tuple) else y).sum()

        leaves = [arguments[k].clone().requires_grad_() for k in ("x", "weight")]
        want = total(*leaves)
        grads = torch.autograd.grad(want, leaves)
        got = torch.compile(total, backend="aot_eager", fullgraph=True)(*leaves)
        assert_same_bits([got.detach(), *torch.autograd.grad(got, leaves)], [want.detach(), *grads], "compiled")
        assert_same_bits(torch.func.grad(total, argnums=(0, 1))(*leaves), grads, "func.grad")


def the_definition_gathers(on: Rank) -> None:
    whole = inputs(on)
    for op, base in ((loss_of, liger_fn.linear_cross_entropy), (log_prob_of, liger_fn.linear_log_prob)):
        values, grads = gradients(op.reference, sharded(on, whole), ("x", "weight", "bias"))
        want, (dx, dw, db) = gradients(base.reference, whole, ("x", "weight", "bias"))
        for a, b in zip((*values, *grads), (*want, dx, on.shard(dw), on.shard(db)), strict=True):
            torch.testing.assert_close(a, b)


def shards_that_do_not_fit(on: Rank) -> None:
    """A vocabulary cut unevenly, and nobody said so: an overlap for some ranks, a gap for others."""
    whole = inputs(on)
    arguments = {k: v for k, v in sharded(on, whole).items() if not k.startswith("vocab")}
    if on.size == 2:
        arguments["weight"], arguments["bias"] = (t[: len(t) - on.rank] for t in (arguments["weight"], arguments["bias"]))
    arguments["target"] = whole["target"].clamp(max=0)
    for op in (loss_of, log_prob_of):
        if on.device.type == "cpu":
            with pytest.raises(ValueError, match=rf"^{op.name}: the ranks' rows of weight .* got \[0, 50\) of .* need vocab_start"):
                op(**arguments)
        else:
            values, grads = gradients(op, arguments, ("x", "weight", "bias"))
            counted = arguments["target"] != IGNORED
            assert all(bool(v[counted].isnan().all() if v.dim() else v.isnan()) for v in values)
            assert bool(grads[0][counted].isnan().all())
            assert all(bool(g.isnan().all()) for g in grads[1:])


def errors_on_many_ranks(on: Rank) -> None:
    whole = inputs(on)
    v = on.size * V // 2 if on.size == 2 else V
    with pytest.raises(ValueError, match=rf"must be classes of the vocabulary, got classes \[{V - 1}, .* vocab_size={V};"):
        loss_of(**sharded(on, whole, vocab_start=V - 1, vocab_size=V, weight=whole["weight"][:2], bias=None))
    for group in ("tp", dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(
            TypeError, match=r"vocab_parallel_linear_log_prob: group must be a torch.distributed.ProcessGroup .*get_group\(\)"
        ):
            log_prob_of(**sharded(on, whole, group=group))
    if on.device.type == "cpu":
        whole["target"][0] = v
        with pytest.raises(ValueError, match=rf"every target must be in \[0, {V}\) .*, got {V} "):
            loss_of(**sharded(on, whole))


def a_group_of_some_ranks(on: Rank) -> None:
    """The others have no part in it; a group of one rank is a rank alone."""
    pair, single = dist.new_group([0, 1]), [dist.new_group([r]) for r in range(on.size)][on.rank]
    whole = inputs(on)
    want = liger_fn.linear_cross_entropy(**whole)
    assert_same_bits([loss_of(**whole, group=single)], [want], "value of a rank alone")
    if on.rank < 2:
        half = V // 2 * on.rank
        some = {**whole, "weight": whole["weight"][half : half + V // 2], "bias": whole["bias"][half : half + V // 2]}
        torch.testing.assert_close(loss_of(**some, group=pair), want)
    dist.barrier()


def the_logits_never_exist(on: Rank) -> None:
    """Nothing that forward or backward allocates is as large as this rank's logits would be, but x's gradient."""
    largest = 0

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    whole = inputs(on, rows=200)
    arguments = {**whole, "weight": whole["weight"][:, :4].contiguous(), "x": whole["x"][:, :4].contiguous()}
    for reduction in ("mean", "none"):
        with Watch():
            _, residuals = loss_of.fwd(**sharded(on, arguments, reduction=reduction, memory_budget=16 * V * 4))
            loss_of.bwd(residuals, torch.ones(200 if reduction == "none" else (), device=on.device))
    assert 800 <= largest < 200 * V // 3


SAYS = (
    aux_is_that_of_the_whole,
    a_certain_model_keeps_the_digits_of_its_small_loss,
    classes_that_are_impossible,
    rows_that_are_nan,
    rows_that_do_not_count,
    only_wanted_gradients,
    same_bits_every_time,
    compiled_and_transformed,
    the_definition_gathers,
    shards_that_do_not_fit,
    errors_on_many_ranks,
    a_group_of_some_ranks,
    the_logits_never_exist,
)
LONG = (only_wanted_gradients, compiled_and_transformed, the_logits_never_exist)  # in Triton's interpreter
