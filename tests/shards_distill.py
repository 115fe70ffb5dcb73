"""What must hold of a distillation on every rank of a sharded vocabulary: checks that each rank runs, and says whether they hold.

`tests/liger_fn/test_vocab_parallel_distill.py` starts the ranks.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

import liger_fn
from tests import cases
from tests.cases import BF16, FP16, FP32, IGNORED, Case
from tests.numerics import assert_near, assert_same_bits, untouched
from tests.sample import Sample, Tensors
from tests.shards import Rank

H, V = 24, 100
DIVERGENCES = ("kl", "reverse_kl", "jsd", "tvd")
SHARDED = ("weight", "bias", "weight_teacher", "bias_teacher")
op, base = liger_fn.vocab_parallel_linear_distill, liger_fn.linear_distill


def inputs(on: Rank, rows: int = 9, seed: int = 0) -> dict[str, Any]:
    """Of the whole, of so few bits that no logit is rounded; some targets are ignored."""
    g = torch.Generator(on.device).manual_seed(seed)
    own, theirs = ({"x": (rows, h), "weight": (V, h), "bias": (V,)} for h in (H, H + 8))
    shapes = own | {f"{k}_teacher": shape for k, shape in theirs.items()}
    whole: dict[str, Any] = {k: torch.randn(*s, device=on.device, generator=g).mul_(8).round_().div_(16) for k, s in shapes.items()}
    target = torch.arange(rows, device=on.device)
    target[2::5] = IGNORED
    return {**whole, "target": target}


def sharded(on: Rank, whole: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The arguments of this rank."""
    return {**whole, **{k: on.shard(whole[k]) for k in SHARDED}, **on.where(len(whole["weight"])), **options}


def gradients(fn: Callable[..., Any], arguments: dict[str, Any], cot: Tensor | None = None) -> tuple[Tensor, Tensors]:
    """The value, and its gradients for a cotangent, by default the value itself."""
    leaves = {k: arguments[k].detach().requires_grad_() for k in ("x", "weight", "bias") if arguments[k] is not None}
    y = fn(**{**arguments, **leaves})
    return y.detach(), torch.autograd.grad(y, tuple(leaves.values()), y.detach() if cot is None else cot.to(y.dtype))


def near(on: Rank, wholes: list[tuple[dict[str, Any], Tensor | None]], what: str, **options: Any) -> None:
    """Value and gradients over shards, by the numerics rule against `linear_distill` of the whole, over all draws together."""
    found = []
    for whole, cot in wholes:
        value, grads = gradients(op, sharded(on, whole, **options), cot)
        on.agree(value, grads[0])
        wide = {k: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for k, t in whole.items()}
        naive, truth = (gradients(base.reference, {**arguments, **options}, cot) for arguments in (whole, wide))
        found.append([(v, *g) for v, g in ((value, (grads[0], *map(on.joined, grads[1:]))), naive, truth)])
    for i, name in enumerate(("value", "gradient of x", "gradient of weight", "gradient of bias")[: len(found[0][0])]):
        assert_near(*(torch.stack([draw[who][i] for draw in found]) for who in range(3)), f"{what}, {name}")


# --- cases ------------------------------------------------------------------------------------------------------------------------------


def case(on: Rank, which: Case, dtype: torch.dtype) -> None:
    samples = [Sample(cases.LINEAR_DISTILL, which, dtype, on.device, seed) for seed in range(which.draws)]
    near(on, [(s.inputs, s.cots[0]) for s in samples], which.name, **which.options)


def chosen(*names: str, draws: int = 8, dtypes: tuple[torch.dtype, ...] = (FP32,)) -> dict[str, Callable[[Rank], None]]:
    """Checks of some cases of `linear_distill`."""
    table = cases.LINEAR_DISTILL
    found = [replace(c, draws=min(c.draws, draws)) for c in (table.typical, *table.cases, *table.hostile) if c.name in names]
    assert len(found) == len(names)
    return {f"{c.name}-{str(dtype)[6:]}": partial(case, which=c, dtype=dtype) for c in found for dtype in dtypes}


SHORT = chosen("typical", dtypes=(FP32, BF16))
CASES = {
    **SHORT,
    **chosen(*(f"chunks-{d}" for d in DIVERGENCES), "9x63-kl-none", "no-target-mean", "everything"),
    **chosen("9x63-reverse_kl", "9x63-tvd", "large-cotangent-mean", dtypes=(BF16,)),
    **chosen("weights-fp16", "9x63-jsd", dtypes=(FP16,)),
    **chosen("alike-reverse_kl", "alike-jsd", draws=48),
    **chosen(*(f"large-{d}" for d in DIVERGENCES), *(f"nan-{d}" for d in DIVERGENCES), "many-chunks-fp32", "no-rows-mean"),
}


# --- what else holds --------------------------------------------------------------------------------------------------------------------


def classes_that_are_impossible(on: Rank) -> None:
    """All of the last rank, as where the vocabulary was padded to be cut, or of the first; for the student, the teacher or both."""
    for columns in (slice(on._replace(rank=on.size - 1).cut(V)[0], V), slice(0, V // 2)):
        for names in (("bias",), ("bias_teacher",), ("bias", "bias_teacher")):
            wholes = [inputs(on, seed=seed) for seed in range(4)]
            for whole, name in product(wholes, names):
                whole[name][columns] = -torch.inf
            for divergence in DIVERGENCES:
                near(on, [(whole, torch.ones(9, device=on.device)) for whole in wholes], f"{divergence}, {names} of {columns}",
                     divergence=divergence, reduction="none", temperature=1.5)  # fmt: skip


def a_teacher_like_the_student(on: Rank) -> None:
    """No loss and no gradient, exactly."""
    whole = inputs(on)
    whole |= {f"{k}_teacher": whole[k] for k in ("x", "weight", "bias")}
    for divergence in DIVERGENCES:
        value, grads = gradients(op, sharded(on, whole, divergence=divergence), torch.ones((), device=on.device))
        assert not any(bool(t.any()) for t in (value, *grads))


def rows_that_do_not_count(on: Rank) -> None:
    """None does; or one does not, which holds NaN."""
    whole = inputs(on)
    whole["target"].fill_(IGNORED)
    for reduction in cases.REDUCTIONS:
        cot = torch.ones(9 if reduction == "none" else (), device=on.device)
        value, grads = gradients(op, sharded(on, whole, reduction=reduction), cot)
        assert not any(bool(t.any()) for t in (value, *grads))
    whole = inputs(on)
    chunks: dict[str, Any] = {"reduction": "none", "divergence": "jsd", "memory_budget": 1800}  # in one, a GPU's products take every row
    want = gradients(op, sharded(on, whole, **chunks))
    whole["x"][2], whole["x_teacher"][7] = torch.nan, torch.inf
    value, grads = gradients(op, sharded(on, whole, **chunks))
    assert_same_bits((value, *grads), (want[0], *want[1]), "with NaN in ignored rows:")


def only_wanted_gradients(on: Rank) -> None:
    """A frozen head, frozen states: the others' gradients are the same bits, and nobody sums what nobody asked for."""
    for options in ({}, {"divergence": "tvd", "save": "recompute", "memory_budget": 1800}):
        arguments = sharded(on, inputs(on), **options)
        one = torch.ones((), device=on.device)
        _, (dx, dw, db) = gradients(op, arguments, one)
        stock, sums = dist.all_reduce, 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal sums
            sums += 1
            return stock(*args, **kwargs)  # noqa: B023

        dist.all_reduce = counted
        try:
            leaves = [arguments[k].clone().requires_grad_() for k in ("weight", "bias")]
            frozen_x = torch.autograd.grad(op(**{**arguments, "weight": leaves[0], "bias": leaves[1]}), leaves)
            op(**arguments)
            assert sums == 0
            x = arguments["x"].clone().requires_grad_()
            frozen_head = torch.autograd.grad(op(**{**arguments, "x": x}), x)
            assert sums > 0
        finally:
            dist.all_reduce = stock
        assert_same_bits(frozen_x, (dw, db), "gradient with frozen x")
        assert_same_bits(frozen_head, (dx,), "gradient with a frozen head")


def same_bits_every_time(on: Rank) -> None:
    arguments = sharded(on, inputs(on), memory_budget=1800, divergence="reverse_kl")
    with untouched([t for t in arguments.values() if torch.is_tensor(t)]):
        found = [gradients(op, arguments) for _ in range(2)]
    assert_same_bits((found[0][0], *found[0][1]), (found[1][0], *found[1][1]), "value or gradient")


def compiled_and_transformed(on: Rank) -> None:
    """The same bits as eager autograd's, the group given by the caller."""
    for options in ({}, {"reduction": "none", "divergence": "jsd"}):
        arguments = sharded(on, inputs(on), **options)

        def total(x: Tensor, weight: Tensor, arguments: dict[str, Any] = arguments) -> Tensor:
            return op(**{**arguments, "x": x, "weight": weight, "group": dist.group.WORLD}).sum()

        leaves = [arguments[k].clone().requires_grad_() for k in ("x", "weight")]
        want = total(*leaves)
        grads = torch.autograd.grad(want, leaves)
        got = torch.compile(total, backend="aot_eager", fullgraph=True)(*leaves)
        assert_same_bits([got.detach(), *torch.autograd.grad(got, leaves)], [want.detach(), *grads], "compiled")
        assert_same_bits(torch.func.grad(total, argnums=(0, 1))(*leaves), grads, "func.grad")


def the_definition_gathers(on: Rank) -> None:
    whole = inputs(on)
    value, grads = gradients(op.reference, sharded(on, whole))
    want, (dx, dw, db) = gradients(base.reference, whole)
    for a, b in zip((value, *grads), (want, dx, on.shard(dw), on.shard(db)), strict=True):
        torch.testing.assert_close(a, b)


def shards_that_do_not_fit(on: Rank) -> None:
    """A vocabulary cut unevenly, and nobody said so: an overlap for some ranks, a gap for others."""
    arguments = {k: v for k, v in sharded(on, inputs(on)).items() if not k.startswith("vocab")}
    if on.size == 2:
        arguments |= {k: arguments[k][: len(arguments[k]) - on.rank] for k in SHARDED}
    if on.device.type == "cpu":
        with pytest.raises(ValueError, match=rf"^{op.name}: the ranks' rows of weight .* got \[0, 50\) of .* need vocab_start"):
            op(**arguments)
    else:
        for divergence in DIVERGENCES:
            value, grads = gradients(op, {**arguments, "divergence": divergence}, torch.ones((), device=on.device))
            assert bool(value.isnan())
            assert bool(grads[0][arguments["target"] != IGNORED].isnan().all())
            assert all(bool(g.isnan().all()) for g in grads[1:])


def errors_on_many_ranks(on: Rank) -> None:
    arguments = sharded(on, inputs(on))
    with pytest.raises(ValueError, match=rf"^{op.name}: weight_teacher must have the \d+ rows of weight, one for each class, got {V};"):
        op(**{**arguments, "weight_teacher": inputs(on)["weight_teacher"], "bias_teacher": None})
    with pytest.raises(TypeError, match=rf"^{op.name}: group must be a torch.distributed.ProcessGroup .*get_group\(\)"):
        op(**{**arguments, "group": "tp"})


def a_group_of_some_ranks(on: Rank) -> None:
    """The others have no part in it; a group of one rank is a rank alone."""
    pair, single = dist.new_group([0, 1]), [dist.new_group([r]) for r in range(on.size)][on.rank]
    whole = inputs(on)
    want = base(**whole)
    assert_same_bits([op(**whole, group=single)], [want], "value of a rank alone")
    if on.rank < 2:
        half = slice(V // 2 * on.rank, V // 2 * (on.rank + 1))
        torch.testing.assert_close(op(**{**whole, **{k: whole[k][half] for k in SHARDED}}, group=pair), want)
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
    narrow = {**whole, **{k: whole[k][:, :4].contiguous() for k in ("x", "x_teacher", "weight", "weight_teacher")}}
    for reduction in ("mean", "none"):
        with Watch():
            _, residuals = op.fwd(**sharded(on, narrow, reduction=reduction, memory_budget=2 * 16 * V * 4))
            op.bwd(residuals, torch.ones(200 if reduction == "none" else (), device=on.device))
    assert 1200 <= largest < 200 * V // 3  # no less than the statistics


SAYS: dict[str, Callable[[Rank], None]] = {
    check.__name__: check
    for check in (
        classes_that_are_impossible,
        a_teacher_like_the_student,
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
}
IN_INTERPRETER = {**SHORT, **{k: SAYS[k] for k in ("a_teacher_like_the_student", "rows_that_do_not_count")}}
ON_THREE = {
    **SHORT,
    **{k: CASES[k] for k in ("chunks-kl-float32", "chunks-reverse_kl-float32", "everything-float32", "9x63-jsd-float16")},
    **{k: v for k, v in SAYS.items() if k != "compiled_and_transformed"},
}


# --- the ranks --------------------------------------------------------------------------------------------------------------------------


def backends(kind: str) -> tuple[str, ...]:
    """That ranks on this kind of device have."""
    if kind == "cuda":
        return "triton", "reference"
    return ("interpreter", "reference") if liger_fn.backend(torch.empty(0)) == "interpreter" else ("reference",)


def checks(backend: str, size: int) -> dict[str, Callable[[Rank], None]]:
    """That run on so many ranks of it."""
    if size == 3:  # on two cores
        return {} if backend == "interpreter" else ON_THREE
    return IN_INTERPRETER if backend == "interpreter" else {**CASES, **SAYS}


def work(rank: int, size: int, where: str, kind: str) -> None:
    """One rank: every check on every backend, and what went wrong with it in a file."""
    from tests import conftest

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
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
                except Exception:
                    found[name, backend] = traceback.format_exc()
    torch.save(found, f"{where}/{rank}")
    dist.barrier()
    dist.destroy_process_group()
