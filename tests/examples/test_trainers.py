"""The examples of trainers, from the command line: each trains a toy, patched and stock."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import liger_fn
from _presets import PRESETS

pytest.importorskip("accelerate")
ROOT = Path(__file__).parents[2]
EXAMPLES = ("huggingface_trainer", "lightning_module")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def figures(printed: str, name: str) -> list[float]:
    """First loss, last loss, tokens/s and MiB of the line that an example prints of a run."""
    found = re.search(rf"^{name}: loss ([\d.]+) to ([\d.]+), ([\d,]+) tokens/s, peak memory ([\d,]+) MiB$", printed, re.M)
    assert found, printed
    return [float(figure.replace(",", "")) for figure in found.groups()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_toy(name, tmp_path):
    if name == "lightning_module":
        pytest.importorskip("lightning")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # the examples run plain PyTorch here, as a user's CPU does
    command = [sys.executable, str(ROOT / f"examples/{name}.py"), "--steps", "3", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "liger_fn.linear_cross_entropy  patched" in done.stdout
    first, last, speed, memory = figures(done.stdout, "patched")
    assert last < first < 6.5  # ln 512 = 6.2 at first
    assert min(speed, memory) > 0


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_command_line(name, tmp_path, capsys):
    if name == "lightning_module":
        pytest.importorskip("lightning")
    example = importlib.import_module(name)
    for argv, words in (
        (["--help"], ["--stock", "--preset", "tiny"]),
        (["--steps", "1"], ["--steps 1", "2 or more"]),
        (["--preset", "1b"], ["--preset 1b", "GPU with about 66 GiB"]),
    ):
        with pytest.raises(SystemExit):
            example.main([*argv, "--out", str(tmp_path)])
        printed = "".join(capsys.readouterr())
        assert all(word in printed for word in words), printed
    assert not any(tmp_path.iterdir()), "nothing is made before the command line is checked"


def test_stock_is_the_same_but_for_the_patch(tmp_path, capsys, monkeypatch):
    example = importlib.import_module("huggingface_trainer")
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], corpus=50_000))
    runs = {}
    for name, switch in (("patched", []), ("stock", ["--stock"])):
        with liger_fn.use_backend("reference"):
            code = example.main([*switch, "--steps", "3", "--out", str(tmp_path)])
        assert code == 0
        printed = capsys.readouterr().out
        assert ("liger_fn.rms_norm" in printed) is (name == "patched")
        runs[name] = figures(printed, name)[:2]
    assert runs["patched"] == runs["stock"]  # as printed, to three places
