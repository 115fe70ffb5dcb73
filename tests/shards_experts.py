"""What must hold on every rank that has some of a mixture's experts: checks that each rank runs.

`tests/liger_fn/test_expert_parallel.py` starts the ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import liger_fn
import liger_nn
from tests import cases
from tests.cases import BF16, FP16, FP32, FP64, Case, Inputs, Maker
from tests.cases.moe_experts import GPT_OSS, experts
from tests.numerics import assert_near, assert_same_bits, untouched
from tests.sample import Sample, Tensors, gradients
from tests.shards import Rank

op, base = liger_fn.expert_parallel_moe_experts, liger_fn.moe_experts
NAMES = ("x", "gate_up", "down", "topk_weight", "gate_up_bias", "down_bias")
BY_TOKEN = ("x", "topk_weight", "topk_index")
EXCHANGES = ("all_to_all", "all_gather")


def split(on: Rank, name: str, t: Tensor, ends: Sequence[int] | None = None) -> Tensor:
    """This rank's part of a tensor of all: equal shares, but of tokens those between `ends`."""
    each = len(t) // on.size
    first, end = (on.rank * each, (on.rank + 1) * each) if ends is None or name not in BY_TOKEN else ends[on.rank : on.rank + 2]
    return t[first:end]


def own(on: Rank, whole: Inputs, ends: Sequence[int] | None = None) -> Inputs:
    """The arguments of this rank."""
    return {k: t if t is None else split(on, k, t, ends) for k, t in whole.items()}


def run(fn: Any, inputs: Inputs, cot: Tensor, wrt: Sequence[str] = NAMES, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The value, and the gradients of those of `wrt` that are there."""
    wrt = [k for k in wrt if inputs[k] is not None]
    (y,), grads = gradients(lambda *ts: (fn(**{**inputs, **dict(zip(wrt, ts, strict=True))}, **options),), [inputs[k] for k in wrt], [cot])  # type: ignore[misc]
    return y, dict(zip(wrt, grads, strict=True))


# --- numbers ----------------------------------------------------------------------------------------------------------------------------


def near(on: Rank, case: Case, dtype: torch.dtype, exchange: str, ends: Sequence[int] | None) -> None:
    """Value and every gradient, by the numerics rule against `moe_experts` of all experts and tokens, over all draws together."""
    found: list[list[Tensors]] = []
    for seed in range(case.draws):
        s = Sample(cases.MOE_EXPERTS, case, dtype, on.device, seed)
        cot = split(on, "x", s.cots[0], ends)
        cot = cot if len(cot) else cot.new_ones(()).expand_as(cot)  # what .sum().backward() sends
        y, grads = run(op, own(on, s.inputs, ends), cot, exchange=exchange, **case.options)
        mine = tuple(on.joined(t) for t in (y, *grads.values()))
        found.append([mine, *((*values, *gs) for values, gs in (s.naive(), s.truth()))])
    for i, name in enumerate(("value", *(f"gradient of {k}" for k in s.wrt))):
        ours, naive, truth = (torch.stack([draw[who][i] for draw in found]) for who in range(3))
        if dtype is FP64:  # is the definition, in another order
            torch.testing.assert_close(ours, truth)
        else:
            assert_near(ours, naive, truth, f"{case.name}, {exchange}, {name}")


def busy(make: Callable[[Maker], Inputs], low: int, high: int) -> Callable[[Maker], Inputs]:
    """Every choice is an expert from `low` to `high`."""

    def made(m: Maker) -> Inputs:
        inputs = make(m)
        return {**inputs, "topk_index": inputs["topk_index"] % (high - low) + low}  # type: ignore[operator]

    return made


def numbers() -> dict[str, Callable[[Rank], None]]:
    """Cases of six experts, each with the ends of the tokens of two ranks; for three, and without ends, of equal shares."""
    several = partial(experts, e=6, k=3, h=20, i=13)
    table: tuple[tuple[Case, tuple[int, ...], tuple[torch.dtype, ...]], ...] = (
        (Case("all", experts(12, e=6, k=3, h=20, i=13, bias=True, stored=True, weight=FP32), GPT_OSS, draws=3), (0, 5, 12), (FP32, BF16)),
        (Case("top-1", several(12, k=1), draws=3), (0, 7, 12), (FP32, FP16)),
        (Case("absent", several(12, every=2, weight=FP32), draws=3), (0, 7, 12), (BF16,)),
        (Case("recompute", several(12, bias=True), {"save": "recompute"}, draws=3), (0, 7, 12), (BF16,)),
        (Case("relu2", several(12, halves=1), {"activation": "relu2"}, draws=3), (0, 7, 12), (BF16,)),
        (Case("wide", several(12)), (0, 7, 12), (FP64,)),
        (Case("first-rank-has-no-tokens", several(7, bias=True), draws=3), (0, 0, 7), (FP32,)),
        (Case("last-rank-has-no-tokens", several(7), draws=3), (0, 7, 7), (BF16,)),
        (Case("no-rank-has-tokens", several(0, bias=True)), (0, 0, 0), (BF16,)),
        (Case("last-rank-gets-none", busy(several(12, bias=True), 0, 3), draws=3), (0, 5, 12), (FP32,)),
        (Case("first-rank-gets-none", busy(several(12), 3, 6), draws=3), (0, 5, 12), (BF16,)),
        (Case("no-rank-gets-any", experts(12, e=6, k=3, h=20, i=13, only=-1)), (0, 5, 12), (BF16,)),
        (Case("one-expert", experts(12, e=6, k=3, h=20, i=13, only=4), draws=3), (0, 5, 12), (FP32,)),
        (Case("nan", lambda m: {**several(12)(m), "x": m.full(12, 20, value=float("nan"))}), (0, 5, 12), (BF16,)),
    )
    found: dict[str, Callable[[Rank], None]] = {}
    for case, ends, dtypes in table:
        for dtype in dtypes:
            name = f"{case.name}-{str(dtype)[6:]}"
            found[name] = partial(near, case=case, dtype=dtype, exchange="all_to_all", ends=ends)
            if "rank-has" not in case.name or ends[-1] == 0:
                found[f"{name}-equal"] = partial(near, case=case, dtype=dtype, exchange="all_to_all", ends=None)
                found[f"{name}-all_gather"] = partial(near, case=case, dtype=dtype, exchange="all_gather", ends=None)
    return found


# --- what else holds --------------------------------------------------------------------------------------------------------------------


def inputs(on: Rank, rows: int = 12, **options: Any) -> Inputs:
    """Of the whole."""
    return experts(rows, **{"e": 6, "k": 3, "h": 16, "i": 10, "bias": True, "every": 5, **options})(Maker(on.device, FP32))


def cotangent(on: Rank, y: Tensor) -> Tensor:
    return torch.linspace(-1, 2, y.numel(), device=on.device).view_as(y)


class Sent:
    """Counts what goes to the ranks, in place of torch's collectives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        stock = dist.all_to_all_single

        def counted(out: Tensor, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.rows.append(len(rows))
            return stock(out, rows, *args, **kwargs)

        monkeypatch.setattr(dist, "all_to_all_single", counted)


def a_token_goes_once_to_each_rank(on: Rank) -> None:
    """Whatever it chose there; and one without a choice goes nowhere."""
    whole = inputs(on)
    index = torch.tensor([[0, 1, 2], [0, 0, 0], [-1, 9, 2**32 + 1], [5, 1, 4], [3, 3, -7]], device=on.device)
    whole = {k: t if k not in BY_TOKEN or t is None else t[:5] for k, t in whole.items()} | {"topk_index": index}
    with pytest.MonkeyPatch.context() as patch:
        sent = Sent(patch)
        y = op(**{**own(on, whole, (0, *(5,) * on.size)), "group": dist.group.WORLD})  # all tokens are the first rank's
    per = 6 // on.size
    goes = sum(len({int(e) // per for e in row if 0 <= e < 6}) for row in index.cpu())
    assert sent.rows[:2] == [goes if on.rank == 0 else 0] * 2  # of x and of the choices
    got = sum(any(e // per == on.rank for e in row) for row in index.tolist())
    assert sent.rows[2:] == [got]  # and back
    assert len(y) == (5 if on.rank == 0 else 0)


def only_wanted_gradients(on: Rank) -> None:
    """Each alone is the same bits, and what nobody asked for does not travel."""
    for exchange in EXCHANGES:
        mine = own(on, inputs(on))
        cot = cotangent(on, mine["x"])  # type: ignore[arg-type]
        _, want = run(op, mine, cot, exchange=exchange)
        forward = 3 if exchange == "all_to_all" else 1
        for name, more in {**dict.fromkeys(NAMES, 0), "x": 1, "topk_weight": 1}.items():
            with pytest.MonkeyPatch.context() as patch:
                sent = Sent(patch)
                _, alone = run(op, mine, cot, (name,), exchange=exchange)
            assert_same_bits([alone[name]], [want[name]], f"gradient of {name} alone")
            assert len(sent.rows) == forward + (exchange == "all_to_all") + more, name
        with pytest.MonkeyPatch.context() as patch:
            sent = Sent(patch)
            assert not op(**mine, exchange=exchange).requires_grad
        assert len(sent.rows) == forward


def same_bits_every_time(on: Rank) -> None:
    """By eager autograd, by fwd and bwd, again, and with less kept; nobody's tensor is written to."""
    for exchange in EXCHANGES:
        mine = own(on, inputs(on))
        cot = cotangent(on, mine["x"])  # type: ignore[arg-type]
        with untouched([*mine.values(), cot]):
            y, grads = run(op, mine, cot, exchange=exchange)
            again, others = run(op, mine, cot, exchange=exchange)
            value, residuals = op.fwd(**mine, exchange=exchange)
            with untouched([t for t in residuals if isinstance(t, Tensor)]):
                pairs = [op.bwd(residuals, cot) for _ in range(2)]
            _, less = op.fwd(**mine, exchange=exchange, save="recompute")
            pairs.append(op.bwd(less, cot))
        assert (residuals.rows is None, less.rows is None) == (False, True)
        assert_same_bits([again, value], [y, y], "value")
        for other in (tuple(others.values()), *pairs):
            assert_same_bits(other, tuple(grads.values()), "gradient")


def strides_and_axes_do_not_matter(on: Rank) -> None:
    """x of more axes and other strides, choices of other dtypes, an expanded cotangent: the same bits."""
    for exchange in EXCHANGES:
        mine = own(on, inputs(on, every=0))
        cot = torch.ones_like(mine["x"])  # type: ignore[arg-type]
        y, grads = run(op, mine, cot, exchange=exchange)
        folded: Inputs = {k: t if t is None or k not in BY_TOKEN else t.unflatten(0, (-1, 2)) for k, t in mine.items()}
        strided = {**folded, "x": folded["x"].mT.contiguous().mT, "topk_index": folded["topk_index"].to(torch.int16)}  # type: ignore[union-attr]
        other, others = run(op, strided, cot.new_ones(()).expand_as(folded["x"]), exchange=exchange)  # type: ignore[arg-type]
        assert_same_bits([other], [y.unflatten(0, (-1, 2))], "value")
        assert_same_bits([others[k].reshape(g.shape) for k, g in grads.items()], list(grads.values()), "gradient")


def compiled_and_transformed(on: Rank) -> None:
    """The same bits as eager autograd's. What no graph holds is left out of it, or refused by those who insist."""
    for exchange in EXCHANGES:
        mine = own(on, inputs(on))
        names = [k for k in NAMES if mine[k] is not None]

        def total(*tensors: Tensor, mine: Any = mine, exchange: Any = exchange, names: Any = names) -> Tensor:
            y = op(**{**mine, **dict(zip(names, tensors, strict=True))}, exchange=exchange, group=dist.group.WORLD)
            return (y * cotangent(on, y)).sum()

        leaves = [mine[k].detach().requires_grad_() for k in names]  # type: ignore[union-attr]
        grads = torch.autograd.grad(total(*leaves), leaves)
        assert_same_bits(torch.func.grad(total, argnums=tuple(range(len(names))))(*leaves), grads, f"func.grad, {exchange}")
        torch._dynamo.reset()
        whole = exchange == "all_gather"
        got = torch.compile(total, backend="aot_eager", fullgraph=whole)(*leaves)
        assert_same_bits(torch.autograd.grad(got, leaves), grads, f"gradient, compiled, {exchange}")
        torch._dynamo.reset()
        if not whole:
            with pytest.raises(Exception, match='no graph holds exchange="all_to_all"; pass exchange="all_gather"'):
                torch.compile(total, backend="aot_eager", fullgraph=True)(*leaves)
            with pytest.raises(Exception, match='how many rows each rank gets, which no traced graph can; pass exchange="all_gather"'):
                torch.compile(lambda: op.fwd(**mine, exchange=exchange)[0], backend="aot_eager", fullgraph=True)()  # noqa: B023
        torch._dynamo.reset()


def the_definition_gathers(on: Rank) -> None:
    """The weights, not the tokens; and gradients come home, first and second ones."""
    whole = inputs(on)
    cot = cotangent(on, whole["x"])  # type: ignore[arg-type]
    y, grads = run(base.reference, whole, cot)
    value, mine = run(op.reference, own(on, whole, (0, *(5,) * (on.size - 1), 12)), split(on, "x", cot, (0, *(5,) * (on.size - 1), 12)))
    torch.testing.assert_close(on.joined(value), y)
    for name, g in mine.items():
        torch.testing.assert_close(on.joined(g), grads[name])

    def twice(fn: Any, inputs: Inputs) -> Tensor:
        leaf = inputs["down"].detach().requires_grad_()  # type: ignore[union-attr]
        (first,) = torch.autograd.grad(fn(**{**inputs, "down": leaf}).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    torch.testing.assert_close(on.joined(twice(op.reference, own(on, whole))), twice(base.reference, whole), rtol=1e-4, atol=1e-4)


def sums_are_wide_and_in_the_order_of_the_ranks(on: Rank) -> None:
    """Whatever the order of the choices. Experts give powers of two: of what is lost to rounding, the order decides."""
    for dtype, values, want in ((BF16, (256, 1, -256), 1), (FP32, (2**25, 1, -(2**25)), 0), (FP32, (2**25, -(2**25), 1), 1)):
        x, weight = torch.ones(4, 1, dtype=dtype, device=on.device).requires_grad_(), torch.ones(4, 3, device=on.device)
        gate_up, down = x.new_ones(1, 1, 1), x.new_full((1, 1, 1), values[on.rank])
        for exchange in EXCHANGES:
            for choices in ((0, 1, 2), (2, 0, 1)):
                index = torch.tensor(choices, device=on.device).expand(4, 3)
                y = op(x, gate_up, down, index, weight, activation="relu2", exchange=exchange)
                (dx,) = torch.autograd.grad(y.sum(), x)
                assert y.flatten().tolist() == [want] * 4
                assert dx.flatten().tolist() == [2 * want] * 4


def ranks_that_do_not_agree(on: Rank) -> None:
    """An error that says what each has, on every rank alike; afterwards they go on."""
    mine, last = own(on, inputs(on)), on.rank == on.size - 1

    def changed(**how: Callable[[Tensor], Any]) -> Any:
        return {**mine, **{k: f(mine[k]) for k, f in how.items() if last}}  # type: ignore[arg-type]

    per = 6 // on.size
    every = {k: lambda t: t[1:] for k in ("gate_up", "down", "gate_up_bias", "down_bias")}
    narrow: Any = {"x": lambda t: t[:, 1:], "gate_up": lambda t: t[..., 1:], "down": lambda t: t[:, 1:], "down_bias": lambda t: t[:, 1:]}
    half: Any = {k: lambda t: t.bfloat16() for k in ("x", "gate_up", "down", "gate_up_bias", "down_bias")}
    shorter: Any = {k: lambda t: t[1:] for k in BY_TOKEN}
    asks: Any = {"x": lambda t: t.detach().requires_grad_()}
    calls: tuple[tuple[Any, dict[str, Any], str, Any, Any], ...] = (
        (changed(**every), {}, "number of experts", per, per - 1),
        (changed(**narrow), {}, "last axis of x", 16, 15),
        (changed(topk_index=lambda t: t[:, 1:], topk_weight=lambda t: t[:, 1:]), {}, "number of choices", 3, 2),
        (changed(**half), {}, "dtype of x", "torch.float32", "torch.bfloat16"),
        (changed(topk_weight=lambda t: t.bfloat16()), {}, "dtype of topk_weight", "torch.float32", "torch.bfloat16"),
        (mine, {"exchange": EXCHANGES[last]}, "exchange", *EXCHANGES),
        (changed(**asks), {}, "gradient of x", "not wanted", "wanted"),
        (changed(topk_weight=asks["x"]), {}, "gradient of topk_weight", "not wanted", "wanted"),
        (changed(down=asks["x"]), {}, "backward", "not wanted", "wanted"),
        (changed(**shorter), {"exchange": "all_gather"}, "number of tokens", 12 // on.size, 12 // on.size - 1),
    )
    if on.device.type == "cuda":  # by all_gather, nobody asks it
        assert bool(op(**changed(**every), exchange="all_gather").isnan().all())
        calls = tuple(call for call in calls if not call[1])
    for arguments, options, name, first, other in calls:
        got = str([first] * (on.size - 1) + [other])
        with pytest.raises(ValueError, match=f"^expert_parallel_moe_experts: all ranks must have the same {name}") as raised:
            op(**arguments, **options)
        assert got in str(raised.value)
        assert "; " in str(raised.value)
    run(op, mine, cotangent(on, mine["x"]))  # type: ignore[arg-type]


def errors_on_many_ranks(on: Rank) -> None:
    mine = own(on, inputs(on))
    for group in ("ep", dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(
            TypeError, match=r"^expert_parallel_moe_experts: group must be a torch.distributed.ProcessGroup .*get_group\(\)"
        ):
            op(**mine, group=group)
    with pytest.raises(ValueError, match=rf"^Experts: num_experts must be a multiple of the group's {on.size} ranks, got 7; "):
        liger_nn.Experts(16, 10, 7, group=dist.group.WORLD)


def a_group_of_some_ranks(on: Rank) -> None:
    """The others have no part in it; a group of one rank is a rank alone."""
    pair, single = dist.new_group([0, 1]), [dist.new_group([r]) for r in range(on.size)][on.rank]
    whole = inputs(on)
    cot = cotangent(on, whole["x"])  # type: ignore[arg-type]
    want, grads = run(base, whole, cot)
    for exchange in EXCHANGES:
        value, mine = run(op, whole, cot, group=single, exchange=exchange)
        assert_same_bits([value, *mine.values()], [want, *grads.values()], "of a rank alone:")
    if on.rank < 2:
        half = on._replace(size=2)
        value, mine = run(op, own(half, whole), split(half, "x", cot), group=pair)
        torch.testing.assert_close(value, split(half, "x", want))
        for name, g in mine.items():
            torch.testing.assert_close(g, split(half, name, grads[name]))
    dist.barrier()


def the_module_is_the_function(on: Rank) -> None:
    """A mixture whose experts are divided is the mixture that has them all."""
    torch.manual_seed(0)
    whole = liger_nn.MoEMLP(16, 10, 6, 3, bias=True, device=on.device)
    mine = liger_nn.MoEMLP(16, 10, 6, 3, bias=True, device=on.device, group=dist.group.WORLD, exchange="all_gather")
    mine.load_state_dict({k: split(on, k, t) if "experts" in k else t for k, t in whole.state_dict().items()})
    x = inputs(on)["x"]
    assert x is not None
    y = mine(split(on, "x", x))[0]
    torch.testing.assert_close(y, split(on, "x", whole(x)[0]))
    assert torch.equal(copy.deepcopy(mine)(split(on, "x", x))[0], y)  # as averages of weights are made


def the_host_waits_once(on: Rank) -> None:
    """On a GPU: in forward by all_to_all, and nowhere else; a CUDA graph holds all_gather."""
    if on.device.type != "cuda":
        return
    mine = own(on, inputs(on))
    cot = cotangent(on, mine["x"])  # type: ignore[arg-type]
    for exchange in EXCHANGES:
        y, grads = run(op, mine, cot, exchange=exchange)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if exchange == "all_gather" else "default")
        try:
            value, residuals = op.fwd(**mine, exchange=exchange)
            torch.cuda.set_sync_debug_mode("error")
            got = op.bwd(residuals, cot)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same_bits([value, *got], [y, *grads.values()], f"of {exchange}:")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads that look at events
        value, residuals = op.fwd(**mine, exchange="all_gather")
        got = op.bwd(residuals, cot)
    graph.replay()
    assert_same_bits([value, *got], [y, *grads.values()], "of a CUDA graph:")


SAYS: dict[str, Callable[[Rank], None]] = {
    check.__name__: check
    for check in (
        a_token_goes_once_to_each_rank,
        only_wanted_gradients,
        same_bits_every_time,
        strides_and_axes_do_not_matter,
        compiled_and_transformed,
        the_definition_gathers,
        ranks_that_do_not_agree,
        errors_on_many_ranks,
        a_group_of_some_ranks,
        the_module_is_the_function,
        the_host_waits_once,
    )
}
NUMBERS = numbers()
IN_INTERPRETER = {k: NUMBERS[k] for k in ("last-rank-gets-none-float32", "absent-bfloat16-all_gather", "last-rank-has-no-tokens-bfloat16")}
ON_THREE = {
    **{k: v for k, v in NUMBERS.items() if k.endswith(("equal", "all_gather"))},
    **{k: v for k, v in SAYS.items() if k != "compiled_and_transformed"},
    "sums_are_wide_and_in_the_order_of_the_ranks": sums_are_wide_and_in_the_order_of_the_ranks,
}
