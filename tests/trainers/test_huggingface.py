"""The Trainer of transformers trains and evaluates a patched model as it does the stock one.

Patch before the trainer is made, `liger_patch.auto(model)`, or when it begins, in a callback:

    class Patch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            liger_patch.auto(model)  # under whatever Accelerate has wrapped around it; before a checkpoint's optimizer is loaded or after
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback

import liger_patch
from tests.liger_patch.models import is_fused, llama

from .runs import LOSS, losses, same, trainer

pytest.importorskip("accelerate")


class Patch(TrainerCallback):
    """The other place to patch in: the model comes as Accelerate has prepared it."""

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        liger_patch.auto(model)


def patched(**changes: object) -> nn.Module:
    model = llama(**changes)
    liger_patch.auto(model)
    return model


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every time that a step's logits are computed because someone asks for them."""
    from liger_patch._carrier import Source

    calls: list[object] = []
    original = Source._compute
    monkeypatch.setattr(Source, "_compute", lambda source: calls.append(source) or original(source))
    return calls


@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("before", {"gradient_accumulation_steps": 2}),  # num_items_in_batch is counted over both
        ("callback", {"gradient_accumulation_steps": 2}),
        ("before", {"activation_checkpointing": True}),
        ("callback", {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}),
        ("before", {"bf16": True, "optim": "sgd", "learning_rate": 0.3}),
        ("callback", {"bf16": True, "optim": "sgd", "learning_rate": 0.3}),
    ],
    ids=str,
)
def test_training(tmp_path: Path, options: dict[str, Any], where: str, computed: list[object]) -> None:
    stock = trainer(llama(), tmp_path, options)
    ours = trainer(patched() if where == "before" else llama(), tmp_path, options, callbacks=[Patch()] if where == "callback" else [])
    assert ours.model_accepts_loss_kwargs is stock.model_accepts_loss_kwargs is True
    stock.train()
    computed.clear()  # what the proofs asked for
    asked = len(computed)
    ours.train()
    # bf16 rounds each product by up to 4e-3; a loss is a mean over some 20 rows, and the steps carry what is left of that.
    same(losses(ours), losses(stock), **{"rel": 1e-3} if "bf16" in options else {})
    if where == "before":
        assert len(computed) == asked, "a step must not compute logits"
    rows = liger_patch.plan(ours.model, verify=False)
    assert {row.status for row in rows} == {"already"}


def scores(prediction: EvalPrediction) -> dict[str, float]:
    """Metrics of real logits: how often the next token is the likeliest, and its mean log-probability."""
    logits, labels = torch.tensor(prediction.predictions)[:, :-1], torch.tensor(prediction.label_ids)[:, 1:]
    counted = labels != -100
    log_prob = torch.log_softmax(logits, -1).gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
    return {"accuracy": (logits.argmax(-1) == labels)[counted].float().mean().item(), "log_prob": log_prob[counted].mean().item()}


def test_evaluation_sees_logits(tmp_path: Path) -> None:
    stock, ours = (
        trainer(model, tmp_path, {"eval_steps": 2, "eval_strategy": "steps"}, compute_metrics=scores) for model in (llama(), patched())
    )
    for each in (stock, ours):
        each.train()
    keys = ("eval_loss", "eval_accuracy", "eval_log_prob")
    found = [[[entry[key] for key in keys] for entry in each.state.log_history if "eval_loss" in entry] for each in (ours, stock)]
    assert len(found[1]) == 2
    for got, expected in zip(*found, strict=True):
        assert got == pytest.approx(expected, rel=LOSS)
    ours.model.load_state_dict(stock.model.state_dict())
    got, expected = (torch.tensor(each.predict(each.eval_dataset).predictions) for each in (ours, stock))
    assert got.shape == (4, 11, 128)
    # Of equal weights: roundings of two layers and a head in another order.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_alone(tmp_path: Path) -> None:
    stock, ours = (trainer(model, tmp_path, {"prediction_loss_only": True}) for model in (llama(), patched()))
    assert ours.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=2e-6)
    assert ours.predict(ours.eval_dataset).predictions is None
    with torch.no_grad():  # called as in training it may be fused, and still be the same
        got = ours.model.train()(**ours.data_collator([ours.eval_dataset[0]])).loss
    torch.testing.assert_close(got, stock.model.train()(**stock.data_collator([stock.eval_dataset[0]])).loss, rtol=2e-6, atol=0)


def test_smoothed_labels_are_made_from_logits(tmp_path: Path, computed: list[object]) -> None:
    """With this option the Trainer takes the labels away, and computes a loss of its own."""
    stock, ours = (trainer(model, tmp_path, {"label_smoothing_factor": 0.1}) for model in (llama(), patched()))
    stock.train()
    computed.clear()
    ours.train()
    same(losses(ours), losses(stock))
    plain = trainer(llama(), tmp_path)
    plain.train()
    assert losses(plain)[-1] != pytest.approx(losses(stock)[-1], rel=20 * LOSS), "the option must have done something"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_is_the_stock_models(tmp_path: Path, tied: bool) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    stock = trainer(llama(tie_word_embeddings=tied), tmp_path / "stock", saving)
    ours = trainer(patched(tie_word_embeddings=tied), tmp_path / "ours", saving)
    for each in (stock, ours):
        each.train()

    def kept(name: str) -> dict[str, Tensor]:
        return load_file(tmp_path / name / "checkpoint-2/model.safetensors")

    assert kept("ours").keys() == kept("stock").keys()
    for name, weight in kept("stock").items():
        # By norms: of a gradient near zero, Adam makes a step as large as any, by its sign.
        assert torch.linalg.vector_norm(kept("ours")[name] - weight) <= 1e-4 * torch.linalg.vector_norm(weight), name

    middle = tmp_path / "ours/checkpoint-2"
    with_other_weights = patched(seed=5, tie_word_embeddings=tied)
    again = trainer(with_other_weights, tmp_path / "again", saving)
    again.train(resume_from_checkpoint=str(middle))
    # The same program on the same numbers.
    assert losses(again) == losses(ours)
    assert is_fused(again.model.train())
    # A stock model takes up a patched model's checkpoint, and the other way round.
    late = trainer(llama(seed=5, tie_word_embeddings=tied), tmp_path / "late", saving)
    late.train(resume_from_checkpoint=str(middle))
    same(losses(late), losses(ours))
    assert type(ours.model).from_pretrained(middle).state_dict().keys() == ours.model.state_dict().keys()
