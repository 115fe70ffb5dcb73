"""The models whose training steps are timed, as data: shapes of published models with random weights, cut to what one GPU holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

STOCK, STOCK_COMPILE, LIGER, LIGER_COMPILE, OURS, OURS_COMPILE = (
    "stock", "stock + compile", "liger-kernel", "liger-kernel + compile", "liger_fn", "liger_fn + compile"
)  # fmt: skip
PROVIDERS = (STOCK, STOCK_COMPILE, LIGER, LIGER_COMPILE, OURS, OURS_COMPILE)
EAGER = (STOCK, LIGER, OURS)
COMPILED = (STOCK_COMPILE, LIGER_COMPILE, OURS_COMPILE)
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model and the batch that a step of it sees."""

    name: str
    model_type: str
    sizes: dict[str, Any]
    batch: int
    seq: int
    checkpointing: bool = False  # a layer's activations are computed again in backward
    providers: tuple[str, ...] = PROVIDERS
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.seq}"

    @property
    def key(self) -> str:
        """As `--models` names it."""
        return f"{self.name.lower().replace(' ', '-')}-{self.shape}"

    def tiny(self) -> Model:
        """The same kind of model in a few thousand parameters: it proves the harness without a GPU."""
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        if "num_experts" in self.sizes:
            small |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        return replace(self, sizes=self.sizes | small | {"head_dim": 16, "vocab_size": 128}, batch=2, seq=16)

    def build(self, device: torch.device) -> PreTrainedModel:
        """The model with random weights in bf16 (fp32 on a CPU)."""
        settings = self.sizes | self.options | {"attention_dropout": 0.0, "use_cache": False}
        config = AutoConfig.for_model(self.model_type, **settings, max_position_embeddings=131072)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        if self.checkpointing:
            # Earlier releases of transformers know it by its second name alone.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return model.train()

    def tokens(self, device: torch.device, seed: int = 1) -> torch.Tensor:
        """One batch of random tokens."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.sizes["vocab_size"], (self.batch, self.seq), generator=generator).to(device)


def _sizes(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int, *, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab, "tie_word_embeddings": tied,
    }  # fmt: skip


_LLAMA_1B = _sizes(2048, 8192, 16, 32, 8, 64, 128256, tied=True)
_LLAMA_8B = _sizes(4096, 14336, 8, 32, 8, 128, 128256, tied=False)
_QWEN3 = _sizes(1024, 3072, 28, 16, 8, 128, 151936, tied=True)
_GEMMA2 = _sizes(2304, 9216, 10, 8, 4, 256, 256000, tied=True)
_QWEN3_MOE = _sizes(2048, 6144, 4, 32, 4, 128, 151936, tied=False) | {
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
}  # fmt: skip
_ROPE = {"rope_parameters": LLAMA3_ROPE}

MODELS = (
    Model("Llama 1B", "llama", _LLAMA_1B, 4, 4096, options=_ROPE),
    Model("Llama 8B 8 layers", "llama", _LLAMA_8B, 4, 4096, checkpointing=True, options=_ROPE),
    Model("Qwen3 0.6B", "qwen3", _QWEN3, 8, 2048),
    Model("Gemma2 2B 10 layers", "gemma2", _GEMMA2, 4, 2048),
    Model("Qwen3 30B-A3B 4 layers", "qwen3_moe", _QWEN3_MOE, 4, 4096),
    # Contexts at which the stock model's logits alone fill the GPU.
    Model("Llama 1B", "llama", _LLAMA_1B, 2, 16384, providers=EAGER, options=_ROPE),
    Model("Llama 1B", "llama", _LLAMA_1B, 2, 32768, checkpointing=True, providers=EAGER, options=_ROPE),
)
BY_KEY = {model.key: model for model in MODELS}
