"""A tiny random model of any type: the configuration's own defaults, with every size that is known made small."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCAB = 128
SIZES: dict[str, int] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "sliding_window": 16, "max_window_layers": 2, "image_token_id": 5, "video_token_id": 6, "image_token_index": 5,
    # the names of older models
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "ffn_dim": 64,
    "ffn_hidden_size": 64, "d_ff": 64, "word_embed_proj_dim": 32, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64,
    # mixtures of experts
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "moe_k": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention, state spaces, linear attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "mamba_n_heads": 4,
    "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB, "linear_head_dim": 8,
    "linear_num_heads": 4, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8,
    "n_groups": 1, "chunk_size": 4,
    "moe_shared_expert_intermediate_size": 16, "shared_experts_intermediate_size": 16, "index_head_dim": 8, "index_n_heads": 2,
    # towers
    "image_size": 16, "patch_size": 8, "num_channels": 3, "depth": 2, "num_heads": 4, "embed_dim": 32, "out_hidden_size": 32,
    "projection_dim": 32,
    # what one type alone has
    "encoder_hash_byte_group_vocab": 64, "hidden_size_global": 32, "pronunciation_embed_dim": 16, "pronunciation_vocab_size": VOCAB,
    "shape_embed_dim": 16, "shape_vocab_size": VOCAB, "projector_input_dim": 32, "projector_output_dim": 32, "nemo_conv_channels": 32,
    "ext_pw_out_channel": 32, "num_blocks": 2, "mlp_dim": 64, "dim_ff": 64, "dim_head": 8, "dff": 64, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "swa_head_dim": 8, "o_lora_rank": 16, "shared_intermediate_size": 64, "dense_intermediate_size": 64,
    "input_embedding_size": 48, "output_embedding_size": 40, "router_hidden_size": 32, "zero_expert_num": 4,
}  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "depth")
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
SPECIAL: dict[str, dict[str, Any]] = {
    **{name: {"rope_parameters": ROPE} for name in ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text")},
    "glm4v_moe_text": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "num_experts": 4},
    "dots3_note_text": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "head_dim")},
        **{f"swa_{name}": 8 for name in ("qk_nope_head_dim", "v_head_dim")},
    },
    "distilbert": {"hidden_dim": 64},
    "deepseek_v2": {"num_experts_per_tok": 2},
    # numbers that multiply by 1 unless a configuration says otherwise
    **{name: {"logits_scaling": 3.0} for name in ("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared")},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "logits_scaling": 3.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "falcon_h1": {"lm_head_multiplier": 0.5, "mlp_multipliers": [0.7, 0.6]},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "reformer": {"is_decoder": True},
    "ministral": {"head_dim": 8},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
}
ONE_OF_TWO = {"mlp_layer_types": ["dense", "sparse"]}
FEW = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
# Mixtures: some are dense, or are so in their first layers, unless a configuration says otherwise.
SPECIAL |= {
    "beam": ONE_OF_TWO,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": ONE_OF_TWO | {"num_experts_per_tok": 2},
    "diffusion_gemma": {"canvas_length": 4, "vision_config": {
        "model_type": "gemma4_vision", "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    }},
    # Scores of these and of gemma4_text are divided by nothing: with the default width of global heads, 512, they magnify rounding.
    "diffusion_gemma_text": FEW | {"head_dim": 8, "global_head_dim": 8},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 16},
    "dots3_note_vision_encoder": ONE_OF_TWO | {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 8], "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": FEW | {"enable_moe_block": True, "head_dim": 8, "global_head_dim": 8},
    "glm5_next_text": ONE_OF_TWO | {"qk_rope_head_dim": 0},
    "inkling2_vision": {"text_hidden_size": 32},
    "mistral4": {"head_dim": 16},
    "muse_spark": {"projector_hidden_size": 32},
    "muse_spark_audio": {"hidden_sizes": (8, 16), "patch_sizes": (4, 4), "depths": (1, 1), "out_hidden_size": 32},
    "muse_spark_text": {"moe_hidden_size": 32},
    "muse_spark_vision": {"layer_types": ["window_attention", "full_attention"]},
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "qwen3_omni_moe_text": {"mlp_only_layers": [0]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "step3p5": ONE_OF_TWO | {"sliding_window": 16},
    "vitpose_backbone": {"num_experts": 2, "part_features": 8},
    # configurations of no type, by their classes
    "Qwen3OmniMoeCode2WavConfig": {"decoder_dim": 32, "upsample_rates": (2,), "codebook_size": 64},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
}  # fmt: skip


def config_of(model_type: str, *, layers: int = 2) -> PreTrainedConfig:
    """The tiny configuration of a type."""
    return _small(CONFIG_MAPPING[model_type](), SPECIAL.get(model_type, {}), layers)


def _small(config: PreTrainedConfig, special: dict[str, Any], least: int) -> PreTrainedConfig:
    sizes: dict[str, Any] = {}
    for name, value in (SIZES | dict.fromkeys(LAYERS, least)).items():
        try:
            now = getattr(config, name)
        except Exception:
            continue
        if isinstance(now, int):
            sizes[name] = value
    inner = {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}
    small = {name: _small(value, SPECIAL.get(value.model_type or type(value).__name__, {}), least) for name, value in inner.items()}
    sizes |= small if config.model_type else {name: value.to_dict() for name, value in small.items()}
    layers = vars(config).get("layer_types")
    if isinstance(layers, (list, tuple)) and layers:
        kinds = list(dict.fromkeys(layers))
        sizes["num_hidden_layers"] = max(least, len(kinds))
        sizes["layer_types"] = (2 * kinds)[: sizes["num_hidden_layers"]]
    if "kv_lora_rank" in sizes:  # every head has keys of its own
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    sizes |= special
    for _ in range(4):
        try:
            return type(config)(**sizes)
        except AttributeError as error:  # a size that follows from others
            named = re.search(r"property '(\w+)'", str(error))
            if named is None:
                raise
            sizes.pop(named[1])
        except Exception:
            if sizes.pop("layer_types", None) is None:
                raise
    raise RuntimeError(f"no tiny {config.model_type}")


# The release that all types were written for: there, nothing is skipped.
PINNED = re.findall(r"^transformers==(\S+)$", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.M)[0]

# Parts of others: no model can be made of their configuration alone.
WITHIN = {
    "blt_local_decoder": "blt", "blt_patcher": "blt", "deepseek_ocr2_text": "deepseek_ocr2", "diffusion_gemma_text": "diffusion_gemma",
    "emu3_text_model": "emu3", "ernie4_5_vl_moe_text": "ernie4_5_vl_moe", "git_vision_model": "git", "got_ocr2_vision": "got_ocr2",
    "llama4_vision_model": "llama4", "mllama_text_model": "mllama", "mllama_vision_model": "mllama",
    "phi4_multimodal_audio": "phi4_multimodal", "phi4_multimodal_vision": "phi4_multimodal", "qwen2_vl_vision": "qwen2_vl",
    "qwen2_5_vl_vision": "qwen2_5_vl", "qwen3_omni_moe_text": "qwen3_omni_moe_thinker", "step3p5": "step3p7",
    "unlimited_ocr_text": "unlimited_ocr",
}  # fmt: skip

# In no mapping below, or trained as another class than that says.
CLASSES = {
    "nllb-moe": "NllbMoeForConditionalGeneration", "qwen3_omni_moe_talker_text": "Qwen3OmniMoeTalkerModel",
    "switch_transformers": "SwitchTransformersForConditionalGeneration", "vitpose_backbone": "VitPoseBackbone",
}  # fmt: skip


def build(model_type: str, *, seed: int = 0, layers: int = 2) -> PreTrainedModel:
    """The causal LM of a type, its model of images and text, or its base model, whichever there is first; in training mode.

    It has so many layers, or more where they are of more kinds.
    A release of transformers that has no such type skips the test that wants one.
    """
    if WITHIN.get(model_type, model_type) not in CONFIG_MAPPING and transformers.__version__ != PINNED:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    if model_type in WITHIN:
        whole = build(WITHIN[model_type], seed=seed, layers=layers)
        found = [m for m in whole.modules() if isinstance(m, PreTrainedModel) and m.config.model_type == model_type]
        if not found and transformers.__version__ != PINNED:
            pytest.skip(f"transformers {transformers.__version__} has no {model_type} in {WITHIN[model_type]}")
        return found[0]
    config = config_of(model_type, layers=layers)
    torch.manual_seed(seed)
    if model_type in CLASSES:
        alone: PreTrainedModel = getattr(transformers, CLASSES[model_type])(config)
        for weight in alone.parameters():
            if weight.dim() == 3:  # transformers leaves the talker's experts as the memory was
                torch.nn.init.normal_(weight, std=0.02)
        return alone.train()
    causal = ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    names = (
        *([causal] if model_type == "emu3" else []),  # its other model wants a tower of sizes of its own
        ("AutoModelForImageTextToText", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        causal,
        ("AutoModel", modeling_auto.MODEL_MAPPING_NAMES),
        ("AutoModelForMultimodalLM", modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
    )
    auto = next(name for name, mapping in names if model_type in mapping)
    model: PreTrainedModel = getattr(transformers, auto).from_config(config)
    return model.train()
