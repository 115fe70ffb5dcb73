"""The models that are trained: one for each way in which the entries of `liger_patch` differ. A size is the preset's unless a row says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

import liger_patch
from _presets import Preset
from liger_patch import Report

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Model:
    """One row.

    Attributes:
        model_type: `config.model_type`.
        shows: what it has that the others do not.
        options: what its configuration says beside the sizes that all have.
        text: the part of the configuration that holds those sizes, of a model of several.
    """

    model_type: str
    shows: str
    options: Callable[[Preset], dict[str, Any]] = lambda preset: {}
    text: str | None = None


def _mixture(preset: Preset) -> dict[str, Any]:
    return {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": preset.mlp // 4}


def _sections(preset: Preset) -> dict[str, Any]:
    half = preset.hidden // preset.heads // 2
    sections = [half // 4, half // 8 * 3, half // 8 * 3]
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}}


def _scaled(preset: Preset) -> dict[str, Any]:
    return {"logit_scale": 0.25}  # the default is one of wide models: narrow ones learn slowly with it


VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 8, "out_hidden_size": 32}

# The slowest first, so that none is left alone at the end of a pool.
MODELS = {
    model.model_type: model
    for model in (
        Model("qwen3_moe", "a mixture of experts, norms of q and k", _mixture),
        Model("qwen2_5_vl", "a model of several, RoPE in sections, biases of q, k and v", _sections, text="text_config"),
        Model("gemma2", "RMSNorm of weight + 1, GeGLU, soft cap of the logits"),
        Model("cohere", "LayerNorm without bias, RoPE of neighbours, scaled logits", _scaled),
        Model("gpt_neox", "LayerNorm with bias, partial RoPE, no gated unit"),
        Model("nemotron", "LayerNorm of weight + 1, squared ReLU, partial RoPE"),
        Model("phi3", "one projection for gate and up"),
        Model("qwen3", "norms of q and k"),
        Model("llama", "RMSNorm, SwiGLU, RoPE"),
    )
}


def sizes(preset: Preset) -> dict[str, Any]:
    """The names that most configurations give to what a preset says."""
    return {
        "vocab_size": preset.head,
        "hidden_size": preset.hidden,
        "intermediate_size": preset.mlp,
        "num_hidden_layers": preset.layers,
        "num_attention_heads": preset.heads,
        "num_key_value_heads": preset.kv_heads,
        "head_dim": preset.hidden // preset.heads,
        "max_position_embeddings": preset.seq,
        "tie_word_embeddings": preset.tied,
        "pad_token_id": None,  # the defaults lie outside of a small vocabulary
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
    }


def config(model: Model, preset: Preset) -> PreTrainedConfig:
    """The configuration, without dropout anywhere."""
    given = sizes(preset) | model.options(preset)
    if model.text:
        given = {model.text: given, "vision_config": VISION | {"out_hidden_size": preset.hidden}, "tie_word_embeddings": preset.tied}
    made = CONFIG_MAPPING[model.model_type](**given)
    for part in (made, *(value for value in vars(made).values() if isinstance(value, PreTrainedConfig))):
        for name, value in list(vars(part).items()):
            if isinstance(value, float) and ("drop" in name or name == "router_jitter_noise"):
                setattr(part, name, 0.0)
    return made


def build(model: Model, preset: Preset, dtype: str, device: str, seed: int) -> PreTrainedModel:
    """Random weights that the seed alone chooses, in training mode."""
    torch.manual_seed(seed)
    auto = transformers.AutoModelForImageTextToText if model.text else transformers.AutoModelForCausalLM
    with torch.device(device):
        made: PreTrainedModel = auto.from_config(config(model, preset), dtype=DTYPES[dtype])
    return made.train()


def patch(model: PreTrainedModel) -> Report:
    """`liger_patch.auto`, and an error where it left anything of what the entries promise."""
    report = liger_patch.auto(model)
    known = liger_patch.supported()
    parts = {m.config.model_type for m in model.modules() if isinstance(m, PreTrainedModel)}
    promised = {op for part in parts & known.keys() for op in known[part]}
    absent = {row.op for row in report.where("left") if row.why.startswith("no module of class")}
    missing = promised - {row.op for row in report.where("patched")} - absent
    if missing:
        raise RuntimeError(f"{model.config.model_type}: {', '.join(sorted(missing))} stayed stock\n{report}")
    return report
