"""What trainers' tests share: a data set, a Trainer of transformers over it, and how near two runs must be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.liger_patch.models import labels_of, tokens

# Losses of some steps in fp32: a rounding is 6e-8, a loss is the mean of some 20 rows, and Adam makes a part of a step of what rounding
# leaves of a gradient near zero. Found are differences of 1e-7 to 3e-7.
LOSS = 2e-6


def rows(count: int = 8) -> list[dict[str, Tensor]]:
    """A data set: token ids, and labels of which some are ignored, not equally many in each row."""
    batches = [tokens(seed=seed) for seed in range(count // 2)]
    return [{"input_ids": x, "labels": y} for ids in batches for x, y in zip(ids, labels_of(ids), strict=True)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """A few steps on a CPU that log every loss, and write and report nothing else."""
    defaults: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(str(folder), **defaults | options)


def trainer(model: nn.Module, folder: Path, options: dict[str, Any] | None = None, **more: Any) -> Trainer:
    """`options` go to the arguments, the rest to the trainer."""
    return Trainer(model=model, args=arguments(folder, **options or {}), train_dataset=rows(), eval_dataset=rows(4), **more)


def losses(trained: Any) -> list[float]:
    """Every loss that a trainer of transformers or TRL has logged."""
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def same(got: Sequence[float], expected: Sequence[float], rel: float = LOSS) -> None:
    assert len(set(expected)) == len(expected) > 1, "the model must have moved"
    assert got == pytest.approx(expected, rel=rel)
