"""A small model whose norm and MLP no entry of liger_patch knows, built like Llama with other names; and what lesson 9 does with models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from .picture import PALETTE, Figure, Rectangle, figure


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
    """Two small layers, with random weights and norms that scale by 1."""
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


# --- what the lesson does with models ---------------------------------------------------------------------------------------------------


def train(model: Any, text: Tensor, steps: int = 60) -> list[float]:
    """The losses of some steps on windows of a text, the same for each model."""
    chosen, losses = torch.Generator().manual_seed(1), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(steps):
        batch = torch.stack([text[i : i + 32] for i in torch.randint(len(text) - 32, (8,), generator=chosen).tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def kept(model: Any, ids: Tensor) -> tuple[Any, dict[str, float]]:
    """What a forward returns, and the MiB that autograd keeps of it: [tokens, V], and the rest."""
    found = dict.fromkeys(("logits", "rest"), 0.0)

    def count(t: Tensor) -> Tensor:
        found["logits" if t.dim() > 1 and t.shape[-1] == model.config.vocab_size else "rest"] += t.nbytes / 2**20
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        return model(input_ids=ids, labels=ids), found


# --- its pictures -----------------------------------------------------------------------------------------------------------------------


def draw_answers(answers: Mapping[str, Mapping[str, bool]]) -> Figure:
    """A table of way by question: yes on a good ground, no on a bad one."""
    ways, questions = list(answers), list(next(iter(answers.values())))
    fig, ax = figure(6.6, 2.9)
    for i, way in enumerate(ways):
        for j, question in enumerate(questions):
            good = answers[way][question]
            ax.text(i, j, "yes" if good else "no", ha="center", va="center", fontsize=9, color="white")
            ax.add_patch(Rectangle((i - 0.47, j - 0.44), 0.94, 0.88, color=PALETTE[2 if good else 0], zorder=-1))
    ax.set(xlim=(-0.5, len(ways) - 0.5), ylim=(len(questions) - 0.5, -0.5), title="after A was patched; red: not what you want")
    ax.set_xticks(range(len(ways)), [f"by {way}" for way in ways])
    ax.set_yticks(range(len(questions)), questions)
    return fig


def draw_kept(**models: Mapping[str, float]) -> Figure:
    """A bar for each model: what it keeps for the backward."""
    names = list(models)[::-1]
    logits, rest = ([models[name][what] for name in names] for what in ("logits", "rest"))
    fig, ax = figure(7.5, 1.7)
    ax.barh(names, logits, color=PALETTE[0], label="[tokens, V]: logits and their like")
    ax.barh(names, rest, left=logits, color=PALETTE[7], label="all else")
    ax.set(xlabel="MiB kept for the backward, 128 tokens", xlim=(0, 11))
    ax.legend(fontsize=8, loc="center right")
    return fig
