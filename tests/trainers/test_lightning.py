"""Lightning trains a module that holds a patched model, and goes on from its checkpoints: examples/lightning_module.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

lightning = pytest.importorskip("lightning")

from _presets import PRESETS  # noqa: E402

from .runs import same  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),  # Lightning uses what torch has renamed
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),  # its frequency is another in the second run
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # as it is meant too
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*not in train mode"),
]
PRESET = replace(PRESETS["tiny"], hidden=32, heads=4, kv_heads=2, mlp=64, head=128, seq=16, lr=1e-2)


def rows() -> DataLoader:
    """Two batches: the checkpoint after two steps is at the end of an epoch, since a DataLoader does not know where it was within one."""
    ids = torch.randint(PRESET.head, (4, PRESET.seq), generator=torch.Generator().manual_seed(1))
    return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=2)


def fit(stock: bool, folder: Path, steps: int = 4, start: str | None = None, seed: int = 0, **options: object):
    """A module after so many steps, and the path of its checkpoint after two."""
    from lightning_module import CausalLM

    torch.manual_seed(seed)
    module = CausalLM(PRESET, stock)
    kept = lightning.pytorch.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = {} if options else {"callbacks": [kept], "max_steps": steps}
    lightning.Trainer(accelerator="cpu", **callbacks, **quiet, **options).fit(module, rows(), ckpt_path=start)
    return module


def test_a_checkpoint_and_what_follows(tmp_path):
    stock, ours = fit(True, tmp_path / "stock"), fit(False, tmp_path / "ours")
    same(ours.losses, stock.losses)
    assert {row.status for row in ours.report} == {"patched"}
    kept = [torch.load(tmp_path / name / "step=2.ckpt", weights_only=False)["state_dict"].keys() for name in ("ours", "stock")]
    assert kept[0] == kept[1]
    middle = str(tmp_path / "ours/step=2.ckpt")
    # The same program on the same numbers; and a stock model takes up what a patched one has left.
    assert fit(False, tmp_path / "again", start=middle, seed=5).losses == ours.losses[2:]
    same(fit(True, tmp_path / "late", start=middle, seed=5).losses, ours.losses[2:])


@pytest.mark.parametrize(
    "options", [{"fast_dev_run": True}, {"max_steps": 3, "accumulate_grad_batches": 2, "enable_checkpointing": False}], ids=str
)
def test_its_switches(tmp_path, options):
    stock, ours = (fit(stock, tmp_path, **options) for stock in (True, False))
    assert ours.losses == pytest.approx(stock.losses, rel=2e-6)
    assert len(ours.losses) == (1 if "fast_dev_run" in options else 6)
