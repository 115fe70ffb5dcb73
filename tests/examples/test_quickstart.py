"""The quickstart: its options, its verdict, and one tiny run from the command line to the picture."""

import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import _corpus
import _figure
import _options
import _report
import _runs
import quickstart
from _presets import PRESETS
from _runs import Result

ROOT = Path(__file__).parents[2]
TINY = PRESETS["tiny"]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--steps", "0"], ["--steps 0", "2 or more"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--batch", "0"], ["--batch 0", "1 or more"]),
        (["--seed", "-1"], ["--seed -1", "2**63"]),
        (["--preset", "huge"], ["--preset huge", *PRESETS]),
        (["--preset", "1b"], ["--preset 1b", "GPU with about 66 GiB", "small"]),
        (["--model-type", "bert"], ["--model-type bert", "llama", "liger_patch.register"]),
        (["--out", __file__], [f"--out {__file__}", "is a file", "folder"]),
        (["--out", f"{__file__}/below"], ["is a file"]),
        (["--pre", "tiny"], ["unrecognized"]),
    ],
)
def test_a_bad_option_names_itself_and_the_remedy(argv, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        _options.parse(argv, ["llama"], "doc")
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert [word for word in words if word not in error] == []


def test_a_gpu_too_small_for_the_preset_is_refused(monkeypatch, capsys):
    class Small:
        total_memory = 24 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Small)
    assert _options.parse([], ["llama"], "doc").preset.name == "small"
    with pytest.raises(SystemExit):
        _options.parse(["--preset", "1b"], ["llama"], "doc")
    assert "this one has 24; lower --batch" in capsys.readouterr().err


def test_options_change_the_preset_and_nothing_else():
    options = _options.parse(["--preset", "tiny", "--steps", "3", "--batch", "5"], ["llama"], "doc")
    assert (options.preset.steps, options.preset.batch, options.device) == (3, 5, "cpu")
    assert PRESETS["tiny"] is TINY
    assert TINY.steps != 3


STOCK = Result("stock", losses=[4.0, 2.0])


@pytest.mark.parametrize(
    ("losses", "exact", "other", "passed"),
    [
        ([4.0, 2.0], True, None, True),
        ([4.0, 2.0 + 1e-5], True, None, True),
        ([4.0, 2.0 + 1e-4], True, None, False),
        ([4.0, float("nan")], True, None, False),
        ([4.0, float("nan")], False, None, False),
        ([4.0], True, None, False),
        ([4.0, 2.1], False, None, None),
        ([4.0, 2.1], False, [4.0, 2.09], True),
        ([4.0, 2.1], False, [4.0, 2.01], False),
    ],
)
def test_the_verdict(losses, exact, other, passed):
    second = other and Result("stock, compiled", losses=other)
    verdict = _report.judge(STOCK, Result("patched", losses=losses), second, exact)
    assert verdict.passed is passed
    assert verdict.line.startswith({True: "PASS", False: "FAIL", None: "NOT JUDGED"}[passed])


@pytest.mark.parametrize(("off", "code"), [(0.0, 0), (1e-3, 1)])
def test_the_exit_code_follows_the_verdict(off, code, tmp_path, monkeypatch, capsys):
    def pretend(train, run, log, on_step):
        return Result(run.name, [5.0, 4.0, 3.0 + off * run.patched], [1.0] * 3, 100.0, 10.0, "report", "sample")

    monkeypatch.setattr(quickstart, "execute", pretend)
    assert quickstart.main(["--preset", "tiny", "--steps", "3", "--out", str(tmp_path), "--baseline-compile"]) == code
    printed = capsys.readouterr().out
    assert ("FAIL" if code else "PASS") in printed
    assert "stock, compiled" in printed


def test_the_corpus_is_the_same_every_time(tmp_path):
    first, second = (_corpus.prepare(TINY, tmp_path / name) for name in "ab")
    assert first.tokens == second.tokens > 10_000
    one, two = (torch.stack(list(_corpus.batches(corpus.folder, TINY, 7, "cpu"))) for corpus in (first, second))
    assert torch.equal(one, two)
    assert one.shape == (TINY.steps, TINY.batch, TINY.seq)
    assert 0 <= one.min() < one.max() < TINY.vocab
    text = _corpus.sources(TINY.corpus)[0]
    tokenizer = _corpus.load_tokenizer(first.folder)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_run_that_fails_says_why(tmp_path):
    run = _runs.Run("stock", False, False, "llama", TINY, "cpu", 0, tmp_path)
    with pytest.raises(_runs.RunFailed, match="unsupported operand") as failure:
        _runs.execute(operator.add, run, tmp_path / "log", lambda step, loss: None)
    assert "the stock run failed" in str(failure.value)


def test_a_tiny_run_from_end_to_end(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)  # the demo's backend on a CPU is the reference
    command = [sys.executable, "examples/quickstart.py", "--preset", "tiny", "--steps", "3", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "loss, step 3",
        "difference",
        "tokens/s",
        "peak memory",
        "What was patched",
        "The patched model writes",
        "patched against stock",
    ):
        assert words in done.stdout
    assert done.stdout.splitlines()[-1].startswith("PASS")
    assert (tmp_path / "out/quickstart.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    written = json.loads((tmp_path / "out/results.json").read_text())
    assert written["verdict"]["passed"] is True
    stock, patched = written["runs"]
    assert len(stock["losses"]) == len(patched["losses"]) == len(patched["step_ms"]) == 3
    assert patched["losses"] == pytest.approx(stock["losses"], rel=1e-5)
    assert patched["report"]
    assert patched["sample"]
    assert min(stock["tokens_per_s"], stock["peak_mib"], patched["tokens_per_s"], patched["peak_mib"]) > 0


def test_the_picture_takes_a_third_run(tmp_path):
    options = _options.parse(["--preset", "tiny"], ["llama"], "doc")
    runs = [Result(name, [3.0, 2.0], [1.0, 1.0], 10.0, 5.0) for name in ("stock", "patched", "stock, compiled")]
    _figure.draw(_report.compare(options, _corpus.Corpus(tmp_path, 1, 1, 1), runs), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
