"""TRL's losses from `liger_fn.linear_log_prob`: a class to put before a trainer, `class DPO(LinearLogProb, trl.DPOTrainer)`.

A preference or policy loss needs one number of each token: the log-probability of the token that is there. Taken from logits, that number
costs a row of the vocabulary's length, three times over: the logits, their log-softmax in fp32 and the gradient. For 8 rows of 2048 tokens
and 128256 words in bf16 these are 4 + 8 + 4 GiB, and a reference model takes the first two again. `linear_log_prob` reads the hidden states
and the head's weight, a chunk of tokens at a time, and keeps two fp32 numbers a token; backward computes the chunks again.

TRL 1.16 asks its models for `model(..., labels=labels, fused_lm_head=True)` and reads `log_probs` and `entropy` of what comes back, so its
trainers take these in the place of TRL's own, which are made chunk by chunk too. A trainer that reads `outputs.logits` is served alike: the
four lines of `log_probs` are what to put where it calls `selective_log_softmax(logits, ids)`.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

import liger_fn


def log_probs(model: Any, labels: Tensor, temperature: float = 1.0, **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The log-probability of each next token, the entropy of its distribution, and the hidden states that they were made of."""
    hidden = model.base_model(**inputs | {"use_cache": False}).last_hidden_state[:, :-1]
    head = model.get_output_embeddings()
    log_prob, aux = liger_fn.linear_log_prob(hidden, head.weight, labels[:, 1:], head.bias, temperature=temperature)
    return log_prob, aux.entropy, hidden


class LinearLogProb:
    """Takes the head of TRL's trainer for its policy and its reference. For a whole weight: one device, or DDP."""

    calls = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for model in (self.model, getattr(self, "ref_model", None)):  # type: ignore[attr-defined]
            if model is not None:
                self.serve(model.get_base_model() if hasattr(model, "get_base_model") else model)

    def serve(self, model: nn.Module) -> None:
        theirs, temperature = model.forward, getattr(self, "temperature", 1.0)

        @functools.wraps(type(model).forward)
        def forward(model: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            if not fused_lm_head:
                return theirs(*args, **kwargs)
            self.calls += 1
            labels, items = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
            mask = labels[:, 1:] != -100
            log_prob, entropy, hidden = log_probs(model, labels, temperature, **kwargs)
            with torch.no_grad():  # for the trainer's metrics alone
                weight = model.get_output_embeddings().weight
                mean_logits = (hidden @ weight.mean(0) / temperature).masked_fill(~mask, 0)
                _, aux = liger_fn.linear_cross_entropy(hidden, weight, labels[:, 1:], reduction="none", return_aux=True)
            return FusedCausalLMOutput(
                loss=-log_prob.sum() / (mask.sum() if items is None else items),
                log_probs=log_prob, entropy=entropy, mean_logits=mean_logits, is_top1=aux.correct, label_mask=mask,
            )  # fmt: skip

        model.forward = MethodType(forward, model)
