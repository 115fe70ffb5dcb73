"""TRL's trainers: SFT, DPO and GRPO train a patched model as they train the stock one, and with our log-probabilities as with TRL's.

Patch before the trainer is made, or after: `liger_patch.auto(trainer.model)`. TRL 1.16 gives every model a head of its own, which computes
log-probabilities chunk by chunk and calls no `lm_head`; so norms, rotations, MLPs and the mask are ours there, and the head is TRL's unless
`LinearLogProb` (log_prob.py) takes it.

`use_liger_kernel=True` (tests/trainers/test_provide.py): SFT, DPO, KTO, GRPO and RLOO of TRL 1.16 warn that it is deprecated, set
`fused_linear_cross_entropy` to False, and leave the rest to transformers' Trainer: `liger_patch.provide_liger_kernel()` is all that they
need. Earlier releases imported losses from `liger_kernel.chunked_loss`, which the stand-in refuses by name.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import liger_patch

trl = pytest.importorskip("trl")

from .log_prob import LinearLogProb, log_probs  # noqa: E402
from .runs import same  # noqa: E402
from .texts import PREFERENCES, PROMPTS, QUESTIONS, model_for, options, tokenizer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # what TRL sets is renamed in transformers
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

# What a step says of itself, beside its loss.
SAID = ("grad_norm", "entropy", "mean_token_accuracy", "kl", "reward", "rewards/chosen", "logits/chosen", "logps/rejected")


def characters(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between completions."""
    return [float(sum(map(ord, completion)) % 97) for completion in completions]


def sft(cls: type, model: nn.Module, folder: Path, **settings: Any) -> Any:
    return cls(model, trl.SFTConfig(**options(folder, **settings)), train_dataset=QUESTIONS, processing_class=tokenizer())


def dpo(cls: type, model: nn.Module, folder: Path, **settings: Any) -> Any:
    arguments = trl.DPOConfig(**options(folder, **settings))
    return cls(model, ref_model=model_for(), args=arguments, train_dataset=PREFERENCES, processing_class=tokenizer())


def grpo(cls: type, model: nn.Module, folder: Path, **settings: Any) -> Any:
    model_for().save_pretrained(folder / "reference")  # this trainer loads its reference from where the model came
    model.config._name_or_path = str(folder / "reference")
    asked = {"num_generations": 2, "max_completion_length": 8, "beta": 0.1, "num_iterations": 2, "temperature": 0.9}
    arguments = trl.GRPOConfig(**options(folder, **asked, **settings))
    return cls(model, reward_funcs=characters, args=arguments, train_dataset=PROMPTS, processing_class=tokenizer())


MAKE = {trl.SFTTrainer: sft, trl.DPOTrainer: dpo, trl.GRPOTrainer: grpo}
KINDS = pytest.mark.parametrize("kind", MAKE, ids=lambda kind: kind.__name__)


def logged(trainer: Any) -> list[float]:
    """Every loss, then all else that every step has said."""
    transformers.set_seed(0)  # what GRPO samples
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 3
    return [entry[key] for key in ("loss", *SAID) for entry in steps if key in entry]


def agree(got: list[float], expected: list[float]) -> None:
    same(got[:3], expected[:3], rel=2e-5)  # GRPO's is a difference of log-probabilities, of which digits cancel
    # Ratios and rewards too are differences of log-probabilities of some hundred nats, in which a rounding is 1e-5.
    assert got == pytest.approx(expected, rel=2e-5, abs=2e-5)
    assert len(got) >= 9


@functools.cache
def stock(kind: type, folder: Path) -> list[float]:
    return logged(MAKE[kind](kind, model_for(), folder))


@KINDS
def test_a_patched_model(kind, tmp_path, tmp_path_factory):
    expected = stock(kind, tmp_path_factory.getbasetemp())
    before, after = model_for(), model_for()
    liger_patch.auto(before)
    first = MAKE[kind](kind, before, tmp_path)
    second = MAKE[kind](kind, after, tmp_path)
    report = liger_patch.auto(second.model)
    assert {row.op for row in report.where("patched")} > {"rms_norm", "swiglu", "rope"}
    for trainer in (first, second):
        agree(logged(trainer), expected)


@KINDS
def test_our_log_probabilities(kind, tmp_path, tmp_path_factory):
    expected = stock(kind, tmp_path_factory.getbasetemp())
    model = model_for()
    liger_patch.auto(model)
    trainer = MAKE[kind](type(f"Ours{kind.__name__}", (LinearLogProb, kind), {}), model, tmp_path)
    agree(logged(trainer), expected)
    assert trainer.calls >= 3


def test_they_are_those_of_the_logits():
    stock, ours = model_for(), model_for()
    liger_patch.auto(ours)
    ids = torch.randint(2, 300, (2, 12))
    labels = ids.masked_fill(torch.arange(12) < 5, -100)
    got, entropy, _ = log_probs(ours, labels, 0.7, input_ids=ids)
    expected = torch.log_softmax(stock(ids).logits[:, :-1] / 0.7, -1)
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(got, expected.gather(-1, ids[:, 1:, None]).squeeze(-1) * counted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1) * counted, rtol=1e-5, atol=1e-6)
    got.sum().backward()
    (expected.gather(-1, ids[:, 1:, None]).squeeze(-1) * counted).sum().backward()
    torch.testing.assert_close(ours.lm_head.weight.grad, stock.lm_head.weight.grad, rtol=1e-4, atol=1e-5)
