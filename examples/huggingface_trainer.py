"""Train a causal LM with the Trainer of transformers, patched by one line, on real text.

    python examples/huggingface_trainer.py                   # a toy on a CPU, some seconds; on a GPU a small Llama
    python examples/huggingface_trainer.py --stock           # the same without the line
    python examples/huggingface_trainer.py --preset 1b       # Llama-1B shapes in bf16, on a large GPU

`train` is the part to copy. The text (_corpus.py) and the sizes (_presets.py) are beside it.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import liger_patch
from _corpus import prepare
from _model import causal_lm
from _options import add_sizes, sized
from _presets import Preset


class Windows(Dataset[dict[str, Tensor]]):
    """Pieces of the corpus, each as long as the model's context."""

    def __init__(self, tokens: Path, preset: Preset) -> None:
        self.tokens, self.seq = torch.load(tokens).long(), preset.seq

    def __len__(self) -> int:
        return len(self.tokens) // self.seq

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.tokens[index * self.seq : (index + 1) * self.seq]
        return {"input_ids": ids, "labels": ids}


class Clock(TrainerCallback):
    """Times the steps after the first ones."""

    def __init__(self, preset: Preset) -> None:
        self.preset, self.marks = preset, dict[int, float]()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (min(self.preset.warmup, self.preset.steps - 1), self.preset.steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks[state.global_step] = time.perf_counter()

    @property
    def tokens_per_s(self) -> float:
        (first, begin), (last, end) = self.marks.items()
        return (last - first) * self.preset.batch * self.preset.seq / (end - begin)


def train(preset: Preset, stock: bool, out: Path, seed: int) -> None:
    """Train, and print losses, tokens/s and peak memory."""
    set_seed(seed)
    model = causal_lm(preset, "cuda" if torch.cuda.is_available() else "cpu")
    if not stock:
        print(liger_patch.auto(model))  # <- the one line, before the Trainer is made
    arguments = TrainingArguments(
        str(out), max_steps=preset.steps, per_device_train_batch_size=preset.batch, learning_rate=preset.lr, logging_steps=preset.every,
        lr_scheduler_type="constant", save_strategy="no", report_to=[], disable_tqdm=True, seed=seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    clock = Clock(preset)
    trainer = Trainer(model=model, args=arguments, train_dataset=Windows(out / "corpus/tokens.pt", preset), callbacks=[clock])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    name = "stock" if stock else "patched"
    print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}, {clock.tokens_per_s:,.0f} tokens/s, peak memory {peak_mib():,.0f} MiB")


def peak_mib() -> float:
    """Memory at its peak: of the GPU, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return float("nan")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, make the corpus, train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--stock", action="store_true", help="leave the model as it is")
    add_sizes(parser, "huggingface_trainer", "small" if torch.cuda.is_available() else "tiny")
    given = parser.parse_args(argv)
    preset = sized(parser, given)
    corpus = prepare(preset, given.out / "corpus")
    print(f"{corpus.tokens:,} tokens of {corpus.files} files of Python's standard library")
    train(preset, given.stock, given.out, given.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
