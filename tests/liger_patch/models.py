"""Small models, and what is compared between them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import liger_patch
from tests.liger_patch.tiny import config_of

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


# --- one model of each kind -------------------------------------------------------------------------------------------------------------

# Llama; a cap on logits, a router's loss, a scale of logits, LayerNorm with biases, packed projections, a model of several.
FAMILIES = ("llama", "gemma2", "qwen3_moe", "cohere", "gpt_neox", "phi3", "gemma3")
LOUDER = {"gemma4_text": 1}  # it scales no scores of attention down: of large ones, the stock model's own rounding errors are large


def family(model_type: str, *, tied: bool | None = None, **sizes: int) -> PreTrainedModel:
    """A model in training mode whose norms do not all scale by 1, and whose layers have something to say."""
    config = config_of(model_type)
    for name, size in sizes.items():
        setattr(config, name, size)
    if tied is not None:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = tied
    torch.manual_seed(0)
    auto = transformers.AutoModelForImageTextToText if hasattr(config, "text_config") else transformers.AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.mul_(LOUDER.get(model_type, 5))
    return model


@functools.cache
def pair(model_type: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A stock and a patched model, equal otherwise. Whoever changes a model makes one of their own."""
    stock = family(model_type)
    ours = copy.deepcopy(stock)
    liger_patch.auto(ours)
    return stock, ours


def family_tokens(*, seed: int = 1) -> Tensor:
    return torch.randint(7, VOCAB, (2, 9), generator=torch.Generator().manual_seed(seed))  # past the ids of images and padding


def some_ignored(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[0, :2] = labels[1, -1] = -100
    return labels


def one_step(model: nn.Module, **call: Any) -> dict[str, Tensor]:
    """The loss of a call, and the gradients of all parameters that have one."""
    ids = family_tokens().to(next(model.parameters()).device)
    loss = model(**{"input_ids": ids, "labels": some_ignored(ids), "use_cache": False} | call)[0]
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {"loss": loss.detach()} | {name: g for name, g in zip(named, grads, strict=True) if g is not None}


def agree(ours: Mapping[str, Tensor], stock: Mapping[str, Tensor], rel: float = 2e-5) -> None:
    """Two steps gave the same."""
    assert ours.keys() == stock.keys()
    torch.testing.assert_close(ours["loss"], stock["loss"], rtol=2e-6, atol=0)
    for name, value in stock.items():
        distance = torch.linalg.vector_norm(ours[name] - value)
        assert distance <= rel * torch.linalg.vector_norm(value) + 1e-7, f"{name}: {float(distance):.3g}"


def is_fused(model: nn.Module) -> bool:
    """Whether a step in training makes no logits."""
    ids = family_tokens()
    logits = model(input_ids=ids, labels=ids).logits
    return not isinstance(logits, Tensor) and not logits.source.touched
