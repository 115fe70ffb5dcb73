"""Sharded pretraining: what a checkpoint holds, which one is taken, and that a run that was killed ends as one that was not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import liger_fn

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs gloo", allow_module_level=True)

import fsdp2_pretrain as example

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 6, 2
ARGV = ["--preset", "tiny", "--steps", str(STEPS), "--save-every", str(EVERY), "--seq", "32", "--warmup", "2"]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with liger_fn.use_backend("reference"):
        yield


def losses(out: Path) -> list[tuple[float, float]]:
    """Loss and gradient's norm of each step; every step is there once."""
    lines = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [(line["loss"], line["grad_norm"]) for line in lines]


def flat(pairs: list[tuple[float, float]]) -> list[float]:
    return [value for pair in pairs for value in pair]


# First the whole training undisturbed; then rank 1 leaves after backward and before the optimizer's step, without a word to anybody.
WORKER = """
import os, sys, torch
import torch.distributed as dist
import fsdp2_pretrain

whole, killed, last, *argv = sys.argv[1:]
clip, calls = torch.nn.utils.clip_grad_norm_, []

def leaves(*args):
    calls.append(0)
    if len(calls) == int(last) and dist.get_rank() == 1:
        os._exit(9)
    return clip(*args)

with fsdp2_pretrain.processes():
    assert fsdp2_pretrain.main([*argv, "--out", whole]) == 0
    torch.nn.utils.clip_grad_norm_ = leaves
    fsdp2_pretrain.main([*argv, "--out", killed])
"""


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    return subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes have trained to the end in `whole`, and lost one of them in the last step in `killed`."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "worker.py").write_text(WORKER)
    ended = torchrun(*map(str, (folder / "worker.py", folder / "whole", folder / "killed", STEPS)), *ARGV)
    assert ended.returncode != 0
    assert "exitcode  : 9" in ended.stderr, ended.stdout + ended.stderr
    return folder


def test_killed_in_a_step_and_resumed(runs: Path, tmp_path: Path) -> None:
    """By as many processes to the same bits; by another number of them to what another order of summing leaves."""
    whole = losses(runs / "whole")
    assert len(whole) == STEPS
    assert len({loss for loss, _ in whole}) == STEPS, "the model must have moved"
    killed = runs / "killed"
    assert example.latest(killed / "checkpoints") == killed / "checkpoints" / f"step-{STEPS - EVERY:08d}"
    shutil.copytree(killed, tmp_path / "alone")
    shutil.copytree(killed / "checkpoints" / f"step-{EVERY:08d}", killed / "checkpoints" / f"step-{STEPS:08d}{example.PARTIAL}")

    resumed = torchrun("examples/fsdp2_pretrain.py", *ARGV, "--out", str(killed))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"{STEPS - EVERY} steps done" in resumed.stdout
    assert "tokens/s" in resumed.stdout
    assert losses(killed) == whole
    kept = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (STEPS - EVERY, STEPS)]

    assert example.main([*ARGV, "--out", str(tmp_path / "alone")]) == 0
    # fp32, a few hundred terms a sum: 1e-6 for each of the two steps that follow the checkpoint, and what AdamW makes of it.
    assert flat(losses(tmp_path / "alone")) == pytest.approx(flat(whole), rel=5e-6)


def test_a_checkpoint_that_is_half_written_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    argv = [*ARGV, "--out", str(tmp_path), "--keep", "1"]
    rename, renamed = Path.rename, []

    def interrupted(path: Path, target: Path) -> Path:
        renamed.append(path.suffix)  # torch's own writer renames files too
        if path.suffix == example.PARTIAL and renamed.count(example.PARTIAL) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        example.main(argv)
    assert not dist.is_initialized()
    checkpoints = tmp_path / "checkpoints"
    names = [f"step-{step:08d}" for step in (2, 4, 6)]
    assert sorted(path.name for path in checkpoints.iterdir()) == [names[0], names[1] + example.PARTIAL]
    assert example.latest(checkpoints) == checkpoints / names[0]
    assert len(losses(tmp_path)) == 4

    assert example.main(argv) == 0
    assert "2 steps done" in capsys.readouterr().out
    assert [path.name for path in checkpoints.iterdir()] == names[2:]
    assert len(losses(tmp_path)) == STEPS


def test_a_checkpoint_of_something_else_is_refused(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    argv = [*ARGV, "--out", str(runs / "whole")]
    before = (runs / "whole/losses.jsonl").read_text()
    assert example.main([*argv, "--lr", "0.5"]) == 2
    error = capsys.readouterr().out
    assert [word for word in ("of another training", "lr was 0.003 and is 0.5", "--out") if word not in error] == []

    now = example.versions()
    monkeypatch.setattr(example, "versions", lambda: now | {"transformers": "4.0.1"})
    assert example.main(argv) == 2
    error = capsys.readouterr().out
    remedy = f"pip install 'transformers=={now['transformers']}'"
    assert [
        word for word in (f"transformers {now['transformers']}, and this is 4.0.1", remedy, "--other-versions") if word not in error
    ] == []
    assert example.main([*argv, "--other-versions"]) == 0
    assert (runs / "whole/losses.jsonl").read_text() == before


def test_activation_checkpointing_and_bf16(runs: Path, tmp_path: Path) -> None:
    whole, argv = losses(runs / "whole"), [*ARGV, "--activation-checkpointing"]
    assert example.main([*argv, "--out", str(tmp_path / "a")]) == 0
    assert flat(losses(tmp_path / "a")) == pytest.approx(flat(whole), rel=5e-6)
    assert example.main([*argv, "--bf16", "--out", str(tmp_path / "b")]) == 0
    # From equal weights each rounding is up to 2⁻⁹ of a value, and they are many and of both signs; later steps drift apart.
    first = losses(tmp_path / "b")[0]
    assert first != pytest.approx(whole[0], rel=1e-5)
    assert first == pytest.approx(whole[0], rel=2**-8)
    saved = torch.distributed.checkpoint.FileSystemReader(tmp_path / "b/checkpoints/step-00000006").read_metadata().state_dict_metadata
    assert {each.properties.dtype for key, each in saved.items() if key.startswith("model.")} == {torch.float32}


def test_every_process_takes_its_part_of_the_text() -> None:
    tokens = torch.arange(40, dtype=torch.int32)
    alone, parts = example.Windows(tokens, 4, seed=3), [example.Windows(tokens, 4, seed=3) for _ in range(2)]
    seen = [alone.take(4, 0, 1) for _ in range(5)]  # two epochs of ten sequences
    for batch in seen:
        assert torch.equal(torch.cat([part.take(4, rank, 2) for rank, part in enumerate(parts)]), batch)
    epochs = torch.cat(seen)[:, 0].view(2, 10)
    assert epochs.sort().values.tolist() == [list(range(0, 40, 4))] * 2
    assert not torch.equal(*epochs)
    resumed = example.Windows(tokens, 4, seed=3)
    resumed.position = 12
    assert torch.equal(resumed.take(4, 0, 1), seen[3])


def test_the_schedule() -> None:
    options = example.parse(["--preset", "tiny", "--steps", "100", "--warmup", "10", "--lr", "1.0"])
    rates = [example.lr_at(step, options) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert (rates[10], rates[55], rates[100]) == pytest.approx((1.0, 0.55, 0.1))
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--bf16", "--fp32"], ["exclude"]),
        (["--steps", "0"], ["--steps 0", "1 or more"]),
        (["--save-every", "0"], ["--save-every 0", "1 or more"]),
        (["--batch", "3"], ["--batch 3", "multiple of the 2 processes"]),
        (["--preset", "huge"], ["huge", "tiny"]),
    ],
)
def test_a_bad_option_names_itself(argv: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        example.parse(argv)
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []
