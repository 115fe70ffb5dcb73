"""What the registry says of itself, and what it suggests for models that it does not know."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import liger_patch
from liger_patch import GLU, Arch, Head, Norm, PatchError, Rope, _registry
from liger_patch.__main__ import as_markdown, main
from liger_patch.archs import ARCHS
from tests.liger_patch.models import llama
from tests.liger_patch.tiny import build

ROOT = Path(__file__).parents[2]
# What liger-kernel 0.8.5 has an entry for.
KEYS = {
    "deepseek_v4", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "glm4", "glm4v", "glm4v_moe", "gpt_oss",
    "internvl", "llama", "llama4", "llama4_text", "llava", "granite", "mllama", "mllama_text_model", "ministral", "mistral", "mixtral",
    "nemotron", "olmo2", "olmo3", "paligemma", "pixtral", "phi3", "qwen2", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text",
    "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_vl", "qwen3_vl_text",
    "qwen3_vl_moe", "qwen3_vl_moe_text", "smollm3", "smolvlm", "falcon_h1", "hunyuan_v1_dense", "hunyuan_v1_moe", "exaone4",
}  # fmt: skip


@pytest.fixture
def alone() -> Iterator[None]:
    """A registry that this test may change."""
    kept = dict(_registry._entries)
    yield
    _registry._entries.clear()
    _registry._entries.update(kept)


def test_every_type_of_liger_kernel_has_an_entry() -> None:
    assert not KEYS - set(liger_patch.supported())


def test_no_type_has_two_entries() -> None:
    types = [arch.model_type for arch in ARCHS]
    assert len(types) == len(set(types))


@pytest.mark.parametrize(
    ("model_type", "arch"),
    [
        ("llama", Arch("llama", norm=Norm("LlamaRMSNorm"), mlp=GLU("LlamaMLP"), rope=Rope(), head=Head())),
        (
            "gemma2",
            Arch(
                "gemma2",
                norm=Norm("Gemma2RMSNorm", offset=1.0, cast="gemma"),
                mlp=GLU("Gemma2MLP", "gelu_tanh"),
                rope=Rope(),
                head=Head(softcap="config.final_logit_softcapping"),
            ),
        ),
        ("phi3", _registry.known("phi3")),
        ("cohere", _registry.known("cohere")),
        ("falcon_h1", _registry.known("falcon_h1")),
        ("nemotron", _registry.known("nemotron")),
        ("gpt_oss", _registry.known("gpt_oss")),
        ("qwen3_moe", _registry.known("qwen3_moe")),
        ("deepseek_v4", _registry.known("deepseek_v4")),
        ("modernbert", _registry.known("modernbert")),
    ],
)
def test_suggests_what_is_registered(model_type: str, arch: Arch, alone: None) -> None:
    """From the model alone: its entry is taken out first."""
    model = build(model_type)
    _registry._entries.pop(model_type)
    assert liger_patch.suggest(model).arch == arch


def test_a_suggestion_prints_the_code_that_registers_it(alone: None) -> None:
    model = llama()
    _registry._entries.pop("llama")
    text = str(liger_patch.suggest(model))
    exec(text, {"liger_patch": liger_patch, **vars(liger_patch)})
    assert liger_patch.supported()["llama"] == ("rms_norm", "swiglu", "rope", "linear_cross_entropy", "cross_entropy")


class Strange(nn.Module):
    """Like an RMSNorm, but for a factor."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return 1.001 * self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def test_suggests_nothing_that_it_could_not_prove(alone: None) -> None:
    model = llama()
    model.model.norm = Strange(32)
    _registry._entries.pop("llama")
    suggestion = liger_patch.suggest(model)
    assert suggestion.arch.norms == (Norm("LlamaRMSNorm"),)
    assert suggestion.left == ("Strange",)
    assert "# stock: Strange" in str(suggestion)


def test_the_page_of_architectures_is_up_to_date(alone: None) -> None:
    _registry._entries.clear()  # other tests have added theirs
    _registry._entries.update({arch.model_type: arch for arch in ARCHS})
    assert (ROOT / "docs" / "architectures.md").read_text() == as_markdown() + "\n"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert f"{len(liger_patch.supported())} types" in capsys.readouterr().out
    assert main(["explain", "gpt_oss"]) == 0
    out = capsys.readouterr().out
    assert "liger_fn.rope" in out
    assert "liger_fn.moe_experts" in out
    assert main(["explain", "lama"]) == 1
    assert "Near to it: llama" in capsys.readouterr().err
    assert main(["explain", "qwen2_vl_vision"]) == 0
    assert "a part of other models" in capsys.readouterr().out


def test_an_entry_for_a_class_that_the_code_has_not_fails(alone: None) -> None:
    """And one that this configuration has none of is left."""
    model = llama()
    liger_patch.register(Arch("llama", norm=(Norm("LlamaRMSNorm"), Norm("LlamaSecondNorm"))), replace=True)
    with pytest.raises(PatchError, match="no module of class LlamaSecondNorm"):
        liger_patch.auto(model)
    liger_patch.register(Arch("llama", norm=Norm("LlamaRMSNorm"), mlp=GLU("LlamaPreTrainedModel")), replace=True)
    report = liger_patch.auto(model)
    assert [row.why for row in report.where("left")] == ["no module of class LlamaPreTrainedModel in LlamaForCausalLM"]


def test_dropout_in_an_mlp_is_the_models(alone: None) -> None:
    """Of the same elements; and an entry that says nothing of it is refused."""
    model = build("seed_oss")
    x = torch.randn(2, 3, 32)
    mlp = model.model.layers[0].mlp
    torch.manual_seed(0)
    want = mlp(x)
    liger_patch.auto(model)
    torch.manual_seed(0)
    torch.testing.assert_close(mlp(x), want)
    assert not want.all()
    liger_patch.revert(model)
    liger_patch.register(Arch("seed_oss", mlp=GLU("SeedOssMLP")), replace=True)
    with pytest.raises(PatchError, match="it drops elements at random"):
        liger_patch.auto(model)


def test_what_a_model_does_to_its_logits_must_be_what_the_entry_says(alone: None) -> None:
    model = build("granite")
    liger_patch.register(Arch("granite", head=Head()), replace=True)
    with pytest.raises(PatchError, match="between its output layer and its loss is not what the entry says"):
        liger_patch.auto(model)
    liger_patch.register(Arch("granite", head=Head(scale="config.logits_scaling")), replace=True)
    with pytest.raises(PatchError, match="between its output layer and its loss is not what the entry says"):
        liger_patch.auto(model)


@pytest.mark.parametrize("model_type", ["granite", "gemma2", "cohere", "falcon_h1"])
def test_logits_that_nobody_made_are_the_models(model_type: str) -> None:
    """Scaled, divided or capped as it does, when somebody asks for them in training."""
    model = build(model_type)
    ids = torch.arange(8, 16)[None]
    want = model(input_ids=ids).logits
    liger_patch.auto(model)
    logits = model(input_ids=ids, labels=ids).logits
    assert not isinstance(logits, Tensor)
    torch.testing.assert_close(logits + 0, want)


def test_a_scale_that_no_loss_can_take_needs_logits() -> None:
    """One that has become negative since the patch."""
    model = build("granite")
    liger_patch.auto(model)
    ids = torch.arange(8, 16)[None]
    assert not isinstance(model(input_ids=ids, labels=ids).logits, Tensor)
    model.config.logits_scaling = -2.0
    output = model(input_ids=ids, labels=ids)
    assert isinstance(output.logits, Tensor)
    liger_patch.revert(model)
    torch.testing.assert_close(output.loss, model(input_ids=ids, labels=ids).loss)
