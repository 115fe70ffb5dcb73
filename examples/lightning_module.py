"""Train a causal LM with Lightning, patched by one line, on real text; then go on from its checkpoint.

    python examples/lightning_module.py                   # a toy on a CPU, some seconds; on a GPU a small Llama
    python examples/lightning_module.py --stock           # the same without the line
    python examples/lightning_module.py --preset 1b       # Llama-1B shapes in bf16, on a large GPU

`CausalLM` is the part to copy. The text, the clock and the model's configuration are those of huggingface_trainer.py.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

import liger_patch
from _corpus import prepare
from _model import causal_lm
from _options import add_sizes, sized
from _presets import Preset
from huggingface_trainer import Windows, peak_mib


class CausalLM(lightning.LightningModule):
    """A language model and its optimizer. Its checkpoints hold the stock model's weights, under `model.`, patched or not."""

    def __init__(self, preset: Preset, stock: bool = False) -> None:
        super().__init__()
        self.model, self.preset = causal_lm(preset, "cuda" if torch.cuda.is_available() else "cpu"), preset
        if not stock:
            self.report = liger_patch.auto(self.model)  # <- the one line; a checkpoint is loaded into it like into any model
        self.losses: list[float] = []
        self.marks: list[float] = []

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.preset.lr, betas=(0.9, 0.95))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))  # waits for the step, as its time is to be known
        self.marks.append(time.perf_counter())

    @property
    def tokens_per_s(self) -> float:
        """Of the steps after the first."""
        return (len(self.marks) - 1) * self.preset.batch * self.preset.seq / (self.marks[-1] - self.marks[0])


def trainer(steps: int, out: Path, every: int) -> lightning.Trainer:
    """So many steps, with a checkpoint every so many."""
    kept = ModelCheckpoint(out / "checkpoints", filename="{step}", every_n_train_steps=every, save_top_k=-1)
    return lightning.Trainer(
        max_steps=steps, accelerator="auto", devices=1, callbacks=[kept], gradient_clip_val=1.0, logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


def train(preset: Preset, stock: bool, out: Path, seed: int) -> None:
    """Train, go on for one more step from the checkpoint in another object, and print losses, tokens/s and peak memory."""
    data = Windows(out / "corpus/tokens.pt", preset)
    lightning.seed_everything(seed, verbose=False)
    module = CausalLM(preset, stock)
    if not stock:
        print(module.report)
    first = trainer(preset.steps, out, preset.steps)
    first.fit(module, DataLoader(data, batch_size=preset.batch, num_workers=0))
    losses, name = module.losses, "stock" if stock else "patched"
    print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}, {module.tokens_per_s:,.0f} tokens/s, peak memory {peak_mib():,.0f} MiB")
    kept = first.checkpoint_callback.best_model_path or first.checkpoint_callback.last_model_path
    del first, module  # a large model is not held twice
    again = CausalLM(preset, stock)
    trainer(preset.steps + 1, out, preset.steps + 1).fit(again, DataLoader(data, batch_size=preset.batch), ckpt_path=kept)
    print(f"resumed from {Path(kept).name}: loss {again.losses[-1]:.3f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, make the corpus, train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--stock", action="store_true", help="leave the model as it is")
    add_sizes(parser, "lightning_module", "small" if torch.cuda.is_available() else "tiny")
    given = parser.parse_args(argv)
    preset = sized(parser, given)
    corpus = prepare(preset, given.out / "corpus")
    print(f"{corpus.tokens:,} tokens of {corpus.files} files of Python's standard library")
    train(preset, given.stock, given.out, given.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
