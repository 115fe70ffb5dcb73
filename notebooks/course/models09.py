"""A small model whose norm and MLP no entry of liger_patch knows: built like Llama, with other names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class CourseNorm(nn.Module):
    """RMSNorm whose weight is stored around 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(width))
        self.epsilon = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        h = x.float() if x.dtype is not torch.float64 else x
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.epsilon)
        return (h * (1 + self.scale.to(h.dtype))).to(x.dtype)


class CourseMLP(nn.Module):
    """A gated MLP: w2(silu(w1 x) · w3 x)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


def course_model(model_type: str) -> LlamaForCausalLM:
    """Two small layers, with weights that are not where they start."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=64
    )
    config.model_type = model_type  # on the instance: the registry looks there
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = CourseNorm(32), CourseNorm(32)
        layer.mlp = CourseMLP(32, 64)
    model.model.norm = CourseNorm(32)
    return model.train()
