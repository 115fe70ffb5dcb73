"""moe_router: the contract, its oddities, and the routers of Hugging Face's models."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import liger_fn
from liger_fn.moe_router import Groups
from tests import cases
from tests.contract import Contract, wrong
from tests.numerics import assert_same_bits


class TestMoeRouter(Contract):
    table = cases.MOE_ROUTER
    wrong_calls = (
        wrong("int", TypeError, "logits must be float32", "torch.int64", ".to(", logits=torch.Tensor.long),
        wrong("list", TypeError, "logits must be a torch.Tensor", "list", logits=torch.Tensor.tolist),
        wrong("0-d", ValueError, "logits must have at least 1 axes", "[]", logits=lambda x: x.sum()),
        wrong("no-experts", ValueError, "1 to 1024 experts", "[2, 5, 0]", "reshape", logits=lambda x: x[..., :0]),
        wrong("1025-experts", ValueError, "1 to 1024 experts", "[1025]", logits=lambda x: x.new_zeros(1025)),
        wrong("k-0", ValueError, "k must be an integer of at least 1", "0", k=0),
        wrong("k-beyond", ValueError, "k must be at most 36", "37", "keep more groups", k=37),
        wrong("k-beyond-all", ValueError, "k must be at most 60", "61", k=61, groups=None),
        wrong("score", ValueError, "score must be one of ('softmax', 'sigmoid')", "'relu'", score="relu"),
        wrong("bias-shape", ValueError, "bias must have shape [60]", "[59]", bias=lambda b: b[1:]),
        wrong("bias-int", TypeError, "bias must be float32", "torch.int64", bias=torch.Tensor.long),
        wrong("bias-device", ValueError, "bias must be on", "meta", ".to(", bias=lambda b: b.to("meta")),
        wrong("groups-1", ValueError, "groups must be None or (count, keep, by)", "(5,)", groups=(5,)),
        wrong("groups-7", ValueError, "count must divide the 60 experts", "7", groups=(7, 3)),
        wrong("groups-keep", ValueError, "keep must be at most their count, 5", "6", groups=(5, 6)),
        wrong("groups-by", ValueError, "by must be one of ('top2', 'max')", "'sum'", groups=(5, 3, "sum")),
        wrong("groups-of-one", ValueError, "at least 2 experts", "60 groups", 'by="max"', groups=(60, 30)),
        wrong("normalize", TypeError, "normalize must be True or False", "int", normalize=1),
        wrong("scale", TypeError, "scale must be a Python number", "Tensor", scale=lambda s: torch.tensor(s)),
    )


SIZES = {
    "hidden_size": 16, "num_experts": 12, "num_local_experts": 12, "num_experts_per_tok": 3, "moe_topk": 3, "n_group": 4, "topk_group": 2,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "topk_method": "greedy", "moe_norm_min": 1e-12, "use_expert_bias": True,
}  # fmt: skip
SOFTMAX, SIGMOID = {"k": 3}, {"k": 3, "score": "sigmoid"}
DEEPSEEK_V3 = {**SIGMOID, "groups": Groups(4, 2), "scale": 2.5}
# the class, what its config says beside SIZES, what `moe_router` is called with
ROUTERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("MixtralTopKRouter", {}, SOFTMAX),
    "qwen2_moe": ("Qwen2MoeTopKRouter", {"norm_topk_prob": False}, {**SOFTMAX, "normalize": False}),
    "qwen3_moe": ("Qwen3MoeTopKRouter", {}, SOFTMAX),
    "olmoe": ("OlmoeTopKRouter", {"norm_topk_prob": False}, {**SOFTMAX, "normalize": False}),
    "deepseek_v2": ("DeepseekV2TopkRouter", {}, {**SOFTMAX, "normalize": False, "scale": 2.5}),
    "deepseek_v2-groups": (
        "DeepseekV2TopkRouter",
        {"topk_method": "group_limited_greedy"},
        {**SOFTMAX, "groups": (4, 2, "max"), "normalize": False, "scale": 2.5},
    ),
    "deepseek_v3": ("DeepseekV3TopkRouter", {}, DEEPSEEK_V3),
    "deepseek_v3-as-they-are": ("DeepseekV3TopkRouter", {"norm_topk_prob": False}, {**DEEPSEEK_V3, "normalize": False}),
    "glm4_moe": ("Glm4MoeTopkRouter", {}, DEEPSEEK_V3),
    "dots1": ("Dots1TopkRouter", {"n_group": 1, "topk_group": 1}, {**SIGMOID, "scale": 2.5}),
    "gpt_oss": ("GptOssTopKRouter", {}, SOFTMAX),
    "granitemoe": ("GraniteMoeTopKRouter", {}, SOFTMAX),
    "llama4": ("Llama4Router", {"num_experts_per_tok": 1}, {"k": 1, "score": "sigmoid", "normalize": False}),
    "ernie4_5_moe": ("Ernie4_5_MoeTopKRouter", {}, SOFTMAX),
    "minimax": ("MiniMaxTopKRouter", {}, SOFTMAX),
    "minimax_m2": ("MiniMaxM2TopKRouter", {}, SIGMOID),
    "hunyuan_v1_moe": ("HunYuanMoEV1Gate", {}, SOFTMAX),
    "lfm2_moe": ("Lfm2MoeTopKRouter", {}, {**SIGMOID, "scale": 2.5}),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_is_the_router_of(backend: str, name: str, device: torch.device) -> None:
    """The model's own module, with random weights: the same experts, and the same weights to fp32 rounding, for the logits it returns."""
    kind, changed, options = ROUTERS[name]
    model_type = name.split("-")[0]
    modeling = pytest.importorskip(f"transformers.models.{model_type}.modeling_{model_type}")
    if not hasattr(modeling, kind):
        pytest.skip(f"this transformers has no {kind}")
    config = SimpleNamespace(**SIZES | changed)
    arguments = (config, 0) if model_type == "hunyuan_v1_moe" else (config,)
    router = getattr(modeling, kind)(*arguments).to(device)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter.requires_grad_(False))
    bias = next((b for n, b in (*router.named_buffers(), *router.named_parameters()) if n.endswith("e_score_correction_bias")), None)
    x = 0.3 * torch.randn(64, 16, device=device)
    if bias is not None:
        bias.copy_(torch.randn(bias.shape) / 5)
        logits, weight, index = router(x)
    elif model_type in ("minimax_m2", "lfm2_moe"):
        bias = torch.randn(12, device=device) / 5
        logits, weight, index = router(x, bias)
    else:
        logits, weight, index = of_llama4(*router(x)) if model_type == "llama4" else router(x)
    if not logits.is_floating_point():
        pytest.skip(f"this transformers has another {kind}, which sorts tokens")
    got, chosen = liger_fn.moe_router(logits, bias=bias if bias is None else bias.flatten(), **options)
    near = 1e-5 if model_type == "lfm2_moe" else 1e-6  # which adds 1e-6 to the sum
    want = torch.zeros_like(logits).scatter(-1, index, weight)
    torch.testing.assert_close(torch.zeros_like(logits).scatter(-1, chosen, got), want, rtol=near, atol=1e-9)
    assert torch.equal(chosen.sort(-1).values, index.sort(-1).values)


def of_llama4(scores: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """It returns a weight for each expert, 0 for those not chosen."""
    weight, index = scores.max(-1, keepdim=True)
    return logits, weight, index


def test_every_type_of_the_table_is_there() -> None:
    """An old transformers may lack a type; the one that is developed against has them all."""
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[1]) < 23:
        pytest.skip("an older one")
    for name, (kind, _, _) in ROUTERS.items():
        model_type = name.split("-")[0]
        assert hasattr(importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}"), kind), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [None, (5, 2, "top2"), (5, 2, "max"), (1, 1)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_of_equals_the_first(backend: str, biased: bool, groups: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Few different logits, so that ties are everywhere, among experts and groups; −0 is 0. A sort in plain Python is the judge."""
    logits = (
        torch.randint(-1, 2, (40, 15), device=device).to(dtype) * 0.5 * torch.tensor([1.0, -1.0, 0.0], device=device).repeat(5).to(dtype)
    )
    bias = torch.arange(15, device=device) % 2 * 0.25 if biased else None
    _, index = liger_fn.moe_router(logits, 4, bias=bias, groups=groups, score="sigmoid")
    for row, got in zip(torch.sigmoid(logits.double()).tolist(), index.tolist(), strict=True):
        key = [round(s + (float(bias[e]) if bias is not None else 0.0), 6) for e, s in enumerate(row)]
        among = range(15)
        if groups is not None and groups[0] > 1:
            parts = [sorted(key[3 * g : 3 * g + 3])[::-1] for g in range(5)]
            worth = [round(p[0] + p[1], 6) if groups[2] == "top2" else p[0] for p in parts]
            kept = sorted(range(5), key=lambda g: (-worth[g], g))[:2]
            among = sorted(e for g in kept for e in range(3 * g, 3 * g + 3))
        assert got == sorted(among, key=lambda e: (-key[e], e))[:4]


@pytest.mark.parametrize("how", cases.moe.FOUR_WAYS)
def test_indices_of_a_nan_are_in_range(backend: str, how: str, device: torch.device) -> None:
    """NaN comes first, as in PyTorch's sort; whatever the row is, its experts are k different ones."""
    logits = torch.randn(7, 60, device=device)
    logits[0], logits[1, 50:], logits[2, 33], logits[3], logits[4] = torch.nan, torch.nan, torch.nan, torch.inf, -torch.inf
    options = cases.moe._how(4, **cases.moe.FOUR_WAYS[how])
    for bias in (None, torch.randn(60, device=device)):
        for groups in (None, (5, 2)):
            weight, index = liger_fn.moe_router(logits, bias=bias, groups=groups, **options)
            assert index.min() >= 0
            assert index.max() < 60
            assert all(len(set(row)) == 4 for row in index.tolist())
            assert weight[0].isnan().all()
            assert not weight[5:].isnan().any()
            if bias is None and groups is None:
                assert index[:3, 0].tolist() == [0, 50, 33]
                assert weight[2, 0].isnan()


def test_sums_that_underflow(backend: str, device: torch.device) -> None:
    """Sigmoids that fp32 cannot tell from 0 still divide by their sum."""
    logits = torch.tensor([-1000.0, -1001.0, -1002.0, -2000.0], device=device)
    weight, index = liger_fn.moe_router(logits, 3, score="sigmoid")
    torch.testing.assert_close(weight, torch.softmax(logits[:3], -1))
    assert index.tolist() == [0, 1, 2]
    got, order = liger_fn.moe_router(torch.tensor([20.0, 40.0, 30.0], device=device), 3, score="sigmoid")
    assert order.tolist() == [1, 2, 0], "rounded to 1, they are in order all the same"
    torch.testing.assert_close(got, torch.full((3,), 1 / 3, device=device))


def test_groups_of_minus_infinity(backend: str, device: torch.device) -> None:
    """Of a kept group an expert at −∞ is chosen before any of a group that is not kept."""
    logits = torch.tensor([0.0, 0.5, 3.0, -torch.inf], device=device)
    weight, index = liger_fn.moe_router(logits, 2, groups=(2, 1, "max"))
    assert index.tolist() == [2, 3]
    assert weight.tolist() == [1.0, 0.0]


def test_the_index_is_returned_by_every_path(backend: str, device: torch.device) -> None:
    """The contract judges the weights; the index comes through autograd, the explicit pair, torch.func and a compiler."""
    logits, bias, options = torch.randn(6, 60, device=device), torch.randn(60, device=device) / 5, {"k": 4, "groups": (5, 2)}
    want = liger_fn.moe_router(logits, bias=bias, **options)
    assert want[0].dtype is torch.float32
    assert want[1].dtype is torch.int64
    leaf = logits.clone().requires_grad_()
    weight, index = liger_fn.moe_router(leaf, bias=bias.requires_grad_(), **options)
    assert not index.requires_grad
    weight.square().sum().backward()
    assert bias.grad is None
    compiled = torch.compile(lambda x: liger_fn.moe_router(x, bias=bias, **options), fullgraph=True, backend="aot_eager")
    (explicit, _), mapped = (
        liger_fn.moe_router.fwd(logits, bias=bias, **options),
        torch.func.vmap(lambda x: liger_fn.moe_router(x, bias=bias, **options)),
    )
    for got in ((weight.detach(), index), explicit, mapped(logits), compiled(logits)):
        assert_same_bits(got, want, "weights and indices")
    gradient = torch.func.grad(lambda x: liger_fn.moe_router(x, bias=bias, **options)[0].square().sum())
    assert_same_bits([gradient(logits)], [leaf.grad], "func.grad")
    assert torch.equal(liger_fn.moe_router.reference(logits, bias=bias, **options)[1], want[1])


def test_bf16_logits_give_fp32_weights(backend: str, device: torch.device) -> None:
    logits = torch.randn(9, 60, device=device).bfloat16()
    weight, index = liger_fn.moe_router(logits, 4)
    torch.testing.assert_close(weight, torch.softmax(logits.float().gather(-1, index), -1))
    assert (weight.diff(dim=-1) <= 0).all()
