"""The models that the examples train, from a row of _presets.py: random weights, where yours would come from `from_pretrained`."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from _presets import Preset


def config_of(preset: Preset, model_type: str = "llama") -> PretrainedConfig:
    """The configuration of that size."""
    return AutoConfig.for_model(
        model_type,
        vocab_size=preset.head,
        hidden_size=preset.hidden,
        intermediate_size=preset.mlp,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        head_dim=preset.hidden // preset.heads,
        max_position_embeddings=preset.seq,
        tie_word_embeddings=preset.tied,
        attention_dropout=0.0,
        use_cache=False,
    )


def causal_lm(preset: Preset, device: str | torch.device, model_type: str = "llama") -> PreTrainedModel:
    """A causal LM of that size."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config_of(preset, model_type), dtype=preset.dtype)
