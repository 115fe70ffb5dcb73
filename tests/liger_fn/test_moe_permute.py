"""moe_permute and moe_unpermute: the contract, a mixture made of them, and what their docstrings say."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import liger_fn
from liger_fn.moe_permute import Permutation
from tests import cases
from tests.cases.moe_experts import experts
from tests.contract import Contract, wrong
from tests.numerics import assert_near, assert_same_bits
from tests.sample import Sample, gradients


class TestMoePermute(Contract):
    table = cases.MOE_PERMUTE
    wrong_calls = (
        wrong("int-x", TypeError, "x must be float32", "torch.int64", ".to(", x=torch.Tensor.long),
        wrong("0-d", ValueError, "x must have at least 1 axes", "[]", x=lambda x: x.sum()),
        wrong("no-columns", ValueError, "the last axis of x must have at least 1", x=lambda x: x[..., :0]),
        wrong("index-list", TypeError, "topk_index must be a torch.Tensor", "list", topk_index=[0]),
        wrong("index-float", TypeError, "topk_index must be of an integer dtype", "float32", ".long()", topk_index=torch.Tensor.float),
        wrong("index-bool", TypeError, "topk_index must be of an integer dtype", "torch.bool", topk_index=torch.Tensor.bool),
        wrong("index-0-d", ValueError, "topk_index must have at least 1 axes", topk_index=lambda i: i.sum()),
        wrong("index-shape", ValueError, "topk_index must have shape [2, 3, 2]", "[1, 3, 2]", topk_index=lambda i: i[1:]),
        wrong("no-choice", ValueError, "the last axis of topk_index must have at least 1", topk_index=lambda i: i[..., :0]),
        wrong("device", ValueError, "topk_index must be on", "meta", ".to(", topk_index=lambda i: i.to("meta")),
        wrong(
            "too-many",
            ValueError,
            "fewer than 2^31 - 2^16",
            "[2, 3, 536870912]",
            "split",
            topk_index=lambda i: i[..., :1].expand(2, 3, 2**29),
        ),
        wrong("no-experts", ValueError, "num_experts must be an integer of at least 1", "0", num_experts=0),
        wrong("experts-float", ValueError, "num_experts must be an integer", "3.0", num_experts=3.0),
    )


class TestMoeUnpermute(Contract):
    table = cases.MOE_UNPERMUTE
    wrong_calls = (
        wrong("int-rows", TypeError, "rows must be float32", "torch.int64", ".to(", rows=torch.Tensor.long),
        wrong("rows", ValueError, "rows must have shape [12, H]", "[11, 20]", "rows of no expert", rows=lambda x: x[1:]),
        wrong("rows-3d", ValueError, "rows must have shape [12, H]", "[3, 4, 20]", rows=lambda x: x.view(3, 4, 20)),
        wrong("no-columns", ValueError, "the last axis of rows must have at least 1", rows=lambda x: x[:, :0]),
        wrong("plan-none", TypeError, "plan must be a torch.Tensor", "NoneType", plan=None),
        wrong("plan-float", TypeError, "plan must be of an integer dtype", "float32", plan=torch.Tensor.float),
        wrong("no-choice", ValueError, "the last axis of plan must have at least 1", plan=lambda p: p[..., :0]),
        wrong("plan-device", ValueError, "plan must be on", "meta", ".to(", plan=lambda p: p.to("meta")),
        wrong("weight-int", TypeError, "topk_weight must be float32", "torch.int64", topk_weight=torch.Tensor.long),
        wrong("weight-shape", ValueError, "topk_weight must have shape [2, 3, 2]", "[2, 3, 1]", topk_weight=lambda w: w[..., 1:]),
        wrong("weight-device", ValueError, "topk_weight must be on", "meta", topk_weight=lambda w: w.to("meta")),
    )

    @pytest.mark.large
    def test_more_than_2_31_elements(self, backend: str, device: torch.device) -> None:
        """A row's place is not its token's, so the last two of both are asked for: everything backwards, and doubled."""
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(device)[0] < 48 * 2**30:
            pytest.skip("needs 48 GiB of free device memory")
        if backend == "reference":
            pytest.skip("its offsets are torch's own")
        n = 2**31 // 4096 + 3
        rows = torch.arange(n, device=device).remainder(251).bfloat16().unsqueeze(1).expand(-1, 4096).contiguous()
        place, weight = torch.arange(n, device=device).flip(0).unsqueeze(1), torch.full((n, 1), 2.0, device=device)
        y, residuals = liger_fn.moe_unpermute.fwd(rows, place, weight)
        for part in (slice(2), slice(-2, None)):
            assert_same_bits([y[part]], [2 * rows.flip(0)[part]], "value")
        drows, dw = liger_fn.moe_unpermute.bwd(residuals, rows)
        for part in (slice(2), slice(-2, None)):
            assert_same_bits([drows[part]], [2 * rows.flip(0)[part]], "gradient")
            assert_same_bits([dw[part]], [4096 * (rows[:, :1] * rows.flip(0)[:, :1].float())[part]], "gradient of the weight")


# --- the two together -------------------------------------------------------------------------------------------------------------------


def by_expert(rows: Tensor, plan: Permutation, gate_up: Tensor, down: Tensor) -> Tensor:
    """Experts as somebody would write them between the two."""
    out = []
    for e, (start, end) in enumerate(pairwise(plan.offsets.tolist())):
        gate, up = (rows[start:end] @ gate_up[e].T).chunk(2, -1)
        out.append((torch.nn.functional.silu(gate) * up) @ down[e].T)
    return torch.cat([*out, rows.new_full((len(rows) - plan.offsets.tolist()[-1], down.shape[1]), torch.nan)])


@pytest.mark.parametrize("every", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_is_a_mixture(backend: str, dtype: torch.dtype, every: int, device: torch.device) -> None:
    """`moe_experts`, its value and every gradient; what stands in the rows of no expert is not read."""
    s = Sample(cases.MOE_EXPERTS, cases.Case("", experts(3, 4, e=4, k=2, h=24, i=20, every=every)), dtype, device)
    index: Any = s.inputs["topk_index"]

    def ours(x: Tensor, gate_up: Tensor, down: Tensor, topk_weight: Tensor) -> tuple[Tensor]:
        rows, plan = liger_fn.moe_permute(x, index, len(down))
        return (liger_fn.moe_unpermute(by_expert(rows, plan, gate_up, down), plan, topk_weight),)

    got, truth = gradients(ours, s.tensors, s.cots), s.truth()
    naive = s.naive()
    if dtype is torch.float64:
        torch.testing.assert_close(got, truth)
    else:
        for part in (0, 1):
            for values in zip(got[part], naive[part], truth[part], strict=True):
                assert_near(*values, "a mixture")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_there_and_back_is_the_identity(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Of one choice, to the bit, in both directions; of k times the same token, k times it."""
    x = torch.randn(3, 5, 33, device=device, dtype=dtype)
    for k, index in ((1, torch.randint(4, (3, 5, 1), device=device)), (2, torch.randint(4, (3, 5, 2), device=device))):

        def f(x: Tensor, index: Tensor = index) -> tuple[Tensor]:
            return (liger_fn.moe_unpermute(*liger_fn.moe_permute(x, index, 4)),)

        (y,), (dx,) = gradients(f, [x], [x])
        assert_same_bits([y, dx], [k * x, k * x], f"k = {k}")


# --- the plan ---------------------------------------------------------------------------------------------------------------------------

SHAPES = [((37,), 5, 2, True), ((1,), 4, 1, False), ((7, 3), 3, 3, True), ((9,), 130, 4, True), ((0,), 3, 2, False), ((130,), 2, 9, True)]


@pytest.mark.parametrize(("tokens", "e", "k", "absent"), SHAPES)
def test_plan_is_a_loop(backend: str, tokens: tuple[int, ...], e: int, k: int, absent: bool, device: torch.device) -> None:
    """Of choices every third is no expert, by each of four ways to say so."""
    index = torch.randint(e, (*tokens, k), device=device)
    if absent:
        third = index.view(-1)[::3]
        third.copy_(torch.tensor([-1, e, -(2**31), 2**31 - 1], device=device).repeat(len(third))[: len(third)])
    x = torch.randn(*tokens, 3, device=device, requires_grad=True)
    rows, plan = liger_fn.moe_permute(x, index, e)
    chosen = index.view(-1).tolist()
    slots = [[s for s, one in enumerate(chosen) if one == each] for each in range(e)]
    kept, gone = [s for each in slots for s in each], [s for s, one in enumerate(chosen) if not 0 <= one < e]
    order, ends = kept + gone, [sum(map(len, slots[:i])) for i in range(e + 1)]
    row = {s: p for p, s in enumerate(order)}
    assert isinstance(plan, Permutation)
    assert [t.dtype for t in plan] == [torch.int32] * 4
    assert not any(t.requires_grad for t in plan)
    assert not any(t.data_ptr() % 16 for t in plan), "kernels would be compiled anew"
    assert plan.order.tolist() == order
    assert plan.token.tolist() == [s // k for s in order]
    assert plan.place.view(-1).tolist() == [row[s] if 0 <= one < e else -1 - row[s] for s, one in enumerate(chosen)]
    assert plan.place.shape == index.shape
    assert plan.offsets.tolist() == ends
    assert plan.counts.tolist() == [len(s) for s in slots]
    assert plan.k == k
    want = x.detach().view(-1, 3)[[s // k for s in order]]
    want[len(kept) :] = 0
    assert_same_bits([rows.detach()], [want], "rows")
    assert_same_bits([rows.detach(), *plan], [*flat_plan(liger_fn.moe_permute.reference(x.detach(), index, e))], "of the reference")


def flat_plan(out: Any) -> tuple[Tensor, ...]:
    return (out[0], *out[1])


def test_integers_of_any_kind(backend: str, device: torch.device) -> None:
    """More experts than the narrowest kind can count, and one that is none."""
    x, index = torch.randn(6, 8, device=device), torch.randint(-1, 100, (6, 2), device=device)
    index[2] = -1
    rows, plan = liger_fn.moe_permute(x, index, 200)
    for dtype in (torch.int32, torch.int16, torch.int8):
        for f in (liger_fn.moe_permute, liger_fn.moe_permute.reference):
            assert_same_bits(flat_plan(f(x, index.to(dtype), 200)), [rows, *plan], str(dtype))
    y = liger_fn.moe_unpermute(rows, plan)
    for place in (plan.place, plan.place.long(), plan.place.short()):
        assert_same_bits([liger_fn.moe_unpermute(rows, place)], [y], str(place.dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_expert_has_no_gradient(backend: str, value: float, device: torch.device) -> None:
    """Whatever comes back, from the rows' side and from the tokens', and whatever the weight."""
    x, index = torch.randn(4, 8, device=device), torch.tensor([[0, -1], [2, 1], [-1, -1], [5, 0]], device=device)
    weight, absent = torch.rand(4, 2, device=device).masked_fill(index == -1, value), (index < 0) | (index > 2)
    rows, plan = liger_fn.moe_permute(x, index, 3)
    gone = torch.where(plan.place < 0, -1 - plan.place, 0)[absent].long()
    for f in (liger_fn.moe_unpermute, liger_fn.moe_unpermute.reference):
        (y,), (drows, dw) = gradients(lambda r, w, f=f: (f(r, plan, w),), [rows, weight], [torch.full_like(x, value)])
        assert y.isfinite().all()
        assert not dw[absent].any()
        assert not drows[gone].any()
        assert not dw[~absent].isfinite().any()
        assert not drows[: len(rows) - len(gone)].isfinite().any()
    drows = torch.ones_like(rows).index_fill(0, gone, value)
    for f in (liger_fn.moe_permute, liger_fn.moe_permute.reference):
        _, (dx,) = gradients(lambda x, f=f: (f(x, index, 3)[0],), [x], [drows])
        assert_same_bits([dx], [(~absent).sum(-1, keepdim=True).float().expand(4, 8)], "gradient of x")


def test_plan_through_transforms(backend: str, device: torch.device) -> None:
    """It comes out of vmap and goes into it, and out of a compiled function that uses it."""
    x, index = torch.randn(3, 5, 8, device=device), torch.randint(4, (3, 5, 2), device=device)
    weight = torch.rand(3, 5, 2, device=device)

    def f(x: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        rows, plan = liger_fn.moe_permute(x, index, 4)
        return liger_fn.moe_unpermute(3 * rows, plan, weight), plan.counts, plan.place

    want = [torch.stack(t) for t in zip(*(f(*each) for each in zip(x, index, weight, strict=True)), strict=True)]
    assert_same_bits(vmap(f)(x, index, weight), want, "vmap")
    rows, plan = vmap(lambda x, i: liger_fn.moe_permute(x, i, 4))(x, index)
    assert_same_bits([vmap(liger_fn.moe_unpermute)(3 * rows, plan, weight)], want[:1], "vmap of each")
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x[0], index[0], weight[0]), [t[0] for t in want], "compiled")


def test_what_is_kept(backend: str, device: torch.device) -> None:
    """Where choices went, and of what is large the rows alone, where a weight asks for its gradient."""
    x = torch.randn(6, 40, device=device, requires_grad=True)
    index, weight = torch.randint(3, (6, 2), device=device), torch.rand(6, 2, device=device)

    def kept(f: Any) -> int:
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
            f()
        return sum(t.numel() == 12 * 40 or t.numel() == 6 * 40 for t in saved)

    rows, plan = liger_fn.moe_permute(x, index, 3)
    assert kept(lambda: liger_fn.moe_permute(x, index, 3)) == 0
    assert kept(lambda: liger_fn.moe_unpermute(rows, plan)) == 0
    assert kept(lambda: liger_fn.moe_unpermute(rows, plan, weight)) == 0
    assert kept(lambda: liger_fn.moe_unpermute(rows, plan, weight.requires_grad_())) == 1


def test_backward_alone_in_float64(device: torch.device) -> None:
    """No residual has the dtype that the kernels must not round."""
    x, index = torch.randn(4, 8, device=device, dtype=torch.float64), torch.randint(3, (4, 2), device=device)
    (rows, plan), residuals = liger_fn.moe_permute.fwd(x, index, 3)
    assert_same_bits(liger_fn.moe_permute.bwd(residuals, rows), [2 * x], "gradient of x")
    y, residuals = liger_fn.moe_unpermute.fwd(rows, plan)
    assert_same_bits(liger_fn.moe_unpermute.bwd(residuals, x), [rows, None], "gradient of rows")
    assert_same_bits([y], [2 * x], "value")
