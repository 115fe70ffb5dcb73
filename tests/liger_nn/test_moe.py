"""The modules of mixtures: transformers' weights load into them, and give what transformers gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import liger_fn
from liger_nn import Experts, MoEMLP

H, I, E, K = 16, 24, 6, 3


def drawn(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for t in (*module.parameters(), *module.buffers()):
        t.data.copy_(torch.randn(t.shape, generator=generator) * 0.3)
    return module


@pytest.fixture(autouse=True)
def on_the_reference() -> Any:
    with liger_fn.use_backend("reference"):
        yield


def test_is_the_mlp_of_qwen3_moe() -> None:
    config = Qwen3MoeConfig(
        hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K, norm_topk_prob=True, experts_implementation="eager"
    )
    theirs, ours = drawn(Qwen3MoeSparseMoeBlock(config)), MoEMLP(H, I, E, K)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, H)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    (y, logits), want = ours(xs[0]), theirs(xs[1])
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert logits.shape == (2, 5, E)
    got, wanted = (torch.autograd.grad(v.square().sum(), [t, *m.parameters()]) for v, t, m in ((y, xs[0], ours), (want, xs[1], theirs)))
    by_name = [dict(zip(["x", *dict(m.named_parameters())], g, strict=True)) for m, g in ((ours, got), (theirs, wanted))]
    for name, gradient in by_name[1].items():
        torch.testing.assert_close(by_name[0][name], gradient, rtol=1e-4, atol=1e-4)


def test_chooses_as_deepseek_v3_does() -> None:
    config = DeepseekV3Config(
        hidden_size=H, moe_intermediate_size=I, n_routed_experts=8, num_experts_per_tok=K, n_group=4, topk_group=2, n_shared_experts=1,
        routed_scaling_factor=2.5, norm_topk_prob=True, experts_implementation="eager",
    )  # fmt: skip
    theirs: Any = drawn(DeepseekV3MoE(config))
    ours = MoEMLP(H, I, 8, K, score="sigmoid", groups=(4, 2), scale=2.5, correction_bias=True)
    state = {name.replace("gate.e_score", "e_score"): t for name, t in theirs.state_dict().items() if not name.startswith("shared")}
    ours.load_state_dict(state)
    x = torch.randn(2, 7, H)
    torch.testing.assert_close(ours(x)[0] + theirs.shared_experts(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("theirs", "options"),
    [
        (
            lambda: GptOssExperts(GptOssConfig(hidden_size=H, intermediate_size=I, num_local_experts=E, experts_implementation="eager")),
            {"bias": True, "activation": "clamped_swiglu", "packed": "interleaved", "limit": 7.0},
        ),
        (
            lambda: NemotronHExperts(
                NemotronHConfig(hidden_size=H, moe_intermediate_size=I, n_routed_experts=E, experts_implementation="eager")
            ),
            {"activation": "relu2"},
        ),
    ],
    ids=["gpt_oss", "nemotron_h"],
)
def test_experts_of_other_kinds(theirs: Any, options: dict[str, Any]) -> None:
    stock, ours = drawn(theirs()), Experts(H, I, E, **options)
    of = stock.state_dict()
    ours.load_state_dict({n: t.transpose(1, 2) if t.shape != ours.state_dict()[n].shape else t for n, t in of.items()})
    x, index, weight = torch.randn(9, H), torch.rand(9, E).topk(K).indices, torch.rand(9, K)
    torch.testing.assert_close(ours(x, index, weight), stock(x, index, weight), rtol=1e-4, atol=1e-4)


def test_begins_as_linear_layers_do() -> None:
    torch.manual_seed(0)
    module = Experts(64, 16, 4, bias=True)
    for name, bound in (("gate_up_proj", 1 / 8), ("gate_up_proj_bias", 1 / 8), ("down_proj", 1 / 4), ("down_proj_bias", 1 / 4)):
        largest = float(getattr(module, name).abs().max().detach())
        assert 0.9 * bound < largest <= bound, name
    assert {p.device.type for p in MoEMLP(4, 4, 2, 1, device="meta", correction_bias=True).state_dict().values()} == {"meta"}
