"""Small models, and what is compared between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 128


def config(**changes: object) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**{**sizes, "vocab_size": VOCAB, "max_position_embeddings": 64, **changes})


def llama(*, seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A model in training mode, whose norms have weights that are not all ones."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config(**changes)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def tokens(*, seed: int = 1, batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def labels_of(ids: Tensor) -> Tensor:
    """Labels of which some are ignored, the last one of a row among them."""
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, -1] = -100
    return labels


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(ours: nn.Module, stock: nn.Module, rel: float = 1e-5) -> None:
    mine, theirs = gradients(ours), gradients(stock)
    assert mine.keys() == theirs.keys()
    for name, grad in theirs.items():
        distance = torch.linalg.vector_norm(mine[name] - grad) / torch.linalg.vector_norm(grad).clamp_min(1e-12)
        assert distance <= rel, f"{name}: {distance:.3g}"


def dicts(model: nn.Module) -> list[tuple[int, dict[str, object]]]:
    """Every module's `__dict__`, in order and by identity of its values."""
    return [(id(module), {name: id(value) for name, value in module.__dict__.items()}) for module in model.modules()]
