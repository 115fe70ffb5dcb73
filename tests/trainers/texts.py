"""Text for TRL's trainers, from Python's own sources: a tokenizer learned from it, questions, preferences, prompts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from _corpus import sources
from tests.liger_patch.models import llama

WORDS = 300  # of the vocabulary


@functools.cache
def lines() -> list[str]:
    """Lines of code, of such lengths that a batch of them is padded."""
    text = "".join(sources(60_000)).splitlines()
    return [line.strip() for line in text if 20 < len(line.strip()) < 70][:64]


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learned.train_from_iterator(
        lines(), trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, special_tokens=["<pad>", "<end>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=learned, pad_token="<pad>", eos_token="<end>")


def model_for() -> LlamaForCausalLM:
    """The small model, with this tokenizer's vocabulary."""
    return llama(vocab_size=len(tokenizer()), pad_token_id=0, eos_token_id=1, bos_token_id=None)


def options(folder: Path, **more: Any) -> dict[str, Any]:
    """What TRL's configurations share: three steps in fp32 on a CPU."""
    return {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True,
    } | more  # fmt: skip


QUESTIONS = Dataset.from_list([{"prompt": a, "completion": b} for a, b in zip(lines()[::2], lines()[1::2], strict=True)])
PREFERENCES = Dataset.from_list(
    [{"prompt": a, "chosen": b, "rejected": c} for a, b, c in zip(lines()[:20], lines()[20:40], lines()[40:60], strict=True)]
)
PROMPTS = Dataset.from_list([{"prompt": line[:12]} for line in lines()[:16]])
