"""The proof of convergence, on tiny models on a CPU: what it passes, what it finds, what it keeps and what it writes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

import _corpus
import liger_fn
import liger_patch
from _presets import PRESETS
from liger_patch import Report
from tests.convergence import kept, measure, models, report, run, train
from tests.convergence.measure import PATCHED, Result
from tests.convergence.train import STOCK, VARIANTS, Job, Trained, Trial

STEPS = 30
PRESET = replace(PRESETS["tiny"], batch=4, steps=STEPS)


@pytest.fixture(autouse=True)
def _plain() -> Iterator[None]:
    with liger_fn.use_backend("reference"):
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    _corpus.prepare(PRESET, folder)
    train.split(folder)
    return folder


@pytest.fixture(scope="module")
def trial(corpus: Path) -> tuple[Trial, dict[str, Trained]]:
    """A llama in fp32, and all of its runs."""
    with liger_fn.use_backend("reference"):
        found = Trial(Job("llama", "fp32", PRESET, "cpu", corpus))
        return found, {name: found.run(variant) for name, variant in VARIANTS.items()}


@pytest.fixture(scope="module")
def right(trial: tuple[Trial, dict[str, Trained]]) -> Result:
    return trial[0].result(trial[1])


# --- the verdict ------------------------------------------------------------------------------------------------------------------------


def test_a_right_patch_passes(right: Result, trial: tuple[Trial, dict[str, Trained]]) -> None:
    assert measure.judge(right) == []
    assert list(right.yardsticks) == ["rows reversed", "rows rotated", "products of 1/4", "products of 1/2", "products of 3/4"]
    assert set(liger_patch.supported()["llama"]) <= set(right.ops)
    again = right.runs[measure.AGAIN]
    assert (again.largest, again.early_update, again.update, again.held_out) == (0, 0, 0, 0)
    assert all(0 < of.update < 1e-3 and 0 < of.largest < 1e-4 for of in right.yardsticks.values())
    assert 0 < right.runs[PATCHED].update < 1e-3
    assert right.after < measure.LEARNED * right.before < right.before < 1.05 * math.log(PRESET.vocab)
    assert not any(torch.equal(p, trial[1][STOCK].early[name]) for name, p in trial[0].start.items())


def wrong_eps(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    right = liger_fn.rms_norm
    patch.setattr(liger_fn, "rms_norm", lambda x, weight, eps, **options: right(x, weight, 1e-2, **options))


def lost_gradient(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    right = liger_fn.rms_norm
    patch.setattr(liger_fn, "rms_norm", lambda x, weight, *args, **options: right(x, weight.detach(), *args, **options))


def wrong_scale(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    right = liger_fn.linear_cross_entropy
    patch.setattr(liger_fn, "linear_cross_entropy", lambda *args, **options: 1.01 * right(*args, **options))


def wrong_theta(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    rotary = model.model.rotary_emb
    theta = rotary.config.rope_parameters["rope_theta"]
    rotary.inv_freq = rotary.inv_freq ** (math.log(1.01 * theta) / math.log(theta))


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (wrong_eps, {"early", "late", "held-out", "early update", "update"}),
        (lost_gradient, {"early", "late", "held-out", "early update", "update"}),
        (wrong_scale, {"early", "late", "early update", "update"}),
        (wrong_theta, {"early update", "update"}),
    ],
)
def test_a_wrong_patch_is_found(
    fault: Callable[[PreTrainedModel, pytest.MonkeyPatch], None],
    where: set[str],
    trial: tuple[Trial, dict[str, Trained]],
    right: Result,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a hundred times what is allowed, where a right patch is within it."""

    def patch(model: PreTrainedModel) -> Report:
        done = models.patch(model)
        fault(model, monkeypatch)
        return done

    wrong = trial[0].result(trial[1] | {PATCHED: trial[0].run(VARIANTS[PATCHED], patch)})
    verdict = " ".join(measure.judge(wrong))
    for name in where:
        of = measure.MEASURES[name]
        assert f"{name} " in verdict
        assert of(wrong.runs[PATCHED]) > 100 * measure.allowed(wrong, name) >= 100 * of(right.runs[PATCHED]), name


@pytest.mark.parametrize(
    ("patched", "words"),
    [
        ({}, []),
        ({"late": 4.9e-3, "early": 4.9e-3, "update": 0.49, "early_update": 0.049}, []),
        ({"late": 5.1e-3}, ["late 0.0051, allowed 0.005"]),
        ({"early": 5.1e-3}, ["early"]),
        ({"update": 0.51}, ["update"]),
        ({"early_update": 0.051}, ["early update"]),
        ({"held_out": -4.9e-3}, []),  # by the yardsticks' late, although their own is near 0
        ({"held_out": -5.1e-3}, ["held-out"]),
        ({"late": math.nan, "update": math.inf}, ["late", "update"]),
    ],
)
def test_the_verdict(patched: dict[str, float], words: list[str]) -> None:
    wrong = measure.judge(result_of(**patched))
    assert len(wrong) == len(words)
    assert all(found.startswith(word) for found, word in zip(wrong, words, strict=True))


def test_the_last_bit_of_a_loss_may_differ() -> None:
    still = replace(YARDSTICK, early=0.0)
    found = replace(result_of(early=3e-6), runs={name: still for name in VARIANTS if name != STOCK} | {PATCHED: replace(still, early=3e-6)})
    assert measure.judge(found) == []
    assert len(measure.judge(replace(found, runs=found.runs | {PATCHED: replace(still, early=6e-6)}))) == 1


def test_training_that_does_not_learn_proves_nothing() -> None:
    assert "did not learn" in measure.judge(replace(result_of(), after=7.5))[0]
    assert "did not learn" in measure.judge(replace(result_of(), after=math.nan))[0]


def test_spread_is_that_of_the_yardsticks_alone() -> None:
    found = result_of(update=100.0)
    assert measure.spread(found) == pytest.approx(1)
    runs = found.runs | {"rows rotated": replace(YARDSTICK, update=0.37)}
    assert measure.spread(replace(found, runs=runs)) == pytest.approx(3.7)


YARDSTICK = measure.Run(
    early=1e-3, late=1e-3, mean=1e-3, largest=2e-3, held_out=1e-5, early_update=0.01, update=0.1, worst=0.2, where="w",
    curve=[1e-3, 2e-3], shift=[1e-4, -1e-4],
)  # fmt: skip


def result_of(**patched: float) -> Result:
    """A result as if it were measured."""
    runs = {name: YARDSTICK for name in VARIANTS if name != STOCK}
    runs |= {measure.AGAIN: replace(YARDSTICK, update=0.0), PATCHED: replace(YARDSTICK, **patched)}  # type: ignore[arg-type]
    return Result("llama", "bf16", 10**6, ["rms_norm", "rope"], 8.0, 4.0, [7.0, 5.0], runs)


# --- the measures -----------------------------------------------------------------------------------------------------------------------


def test_an_update_is_measured_by_what_moved() -> None:
    start = {"a": torch.full((3,), 100.0), "b": torch.ones(2), "still": torch.zeros(2)}
    stock = {"a": start["a"] + 1, "b": start["b"] - 2, "still": start["still"]}
    other = {"a": stock["a"] + 0.5, "b": stock["b"] + torch.tensor([0.0, 2.0]), "still": torch.full((2,), 0.5)}
    whole, worst, where = measure.updates(other, stock, start)
    assert whole == pytest.approx(math.sqrt((3 * 0.25 + 4 + 2 * 0.25) / (3 + 8)))
    assert (worst, where) == (pytest.approx(math.sqrt(4 / 8)), "b")


def test_losses_are_compared_step_by_step() -> None:
    steps = 2 * measure.EARLY + 20
    off = [1e-3] * measure.EARLY + [0.0] * measure.EARLY + [-0.5] * 20
    found = measure.run_of([1 + d for d in off], [1.0] * steps, -0.25, 0.125, (0.5, 0.75, "w"))
    assert (found.early, found.late) == (pytest.approx(1e-3), pytest.approx(0.5))
    assert (found.mean, found.largest) == (pytest.approx((20e-3 + 10) / steps), pytest.approx(0.5))
    assert (found.held_out, found.early_update, found.update, found.worst, found.where) == (-0.25, 0.125, 0.5, 0.75, "w")
    assert len(found.curve) == len(found.shift) == steps // measure.BIN
    assert (found.curve[-1], found.shift[-1]) == (pytest.approx(0.5), pytest.approx(-0.5))


# --- the models and what is varied ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.MODELS)
def test_a_model_is_patched_whole_and_has_no_noise(name: str) -> None:
    model = models.build(models.MODELS[name], PRESET, "bf16", "cpu", 0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids = torch.randint(PRESET.vocab, (1, 8))
    first, second = (model(input_ids=ids, labels=ids).loss for _ in range(2))
    assert torch.equal(first, second)
    assert first.item() == pytest.approx(math.log(PRESET.vocab), rel=0.05)
    assert not any(module.p for module in model.modules() if isinstance(module, nn.Dropout))
    assert {"rms_norm", "layer_norm"} & {row.op for row in models.patch(model).where("patched")}


def test_dropout_is_taken_out_of_every_part() -> None:
    for name in ("llama", "qwen2_5_vl"):
        row = models.MODELS[name]
        noisy = replace(row, options=lambda preset, row=row: row.options(preset) | {"attention_dropout": 0.5})
        made = models.config(noisy, PRESET)
        assert made.get_text_config().attention_dropout == 0


def test_a_model_that_stays_stock_in_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build(models.MODELS["llama"], PRESET, "fp32", "cpu", 0)
    auto = liger_patch.auto
    monkeypatch.setattr(liger_patch, "auto", lambda model: auto(model, rope=False))
    with pytest.raises(RuntimeError, match="llama: rope stayed stock"):
        models.patch(model)


def test_a_yardstick_differs_by_rounding_alone() -> None:
    ids = torch.arange(12).view(4, 3)
    for name in ("rows reversed", "rows rotated"):
        moved = VARIANTS[name].rows(ids)
        assert not torch.equal(moved, ids)
        assert sorted(moved.tolist()) == ids.tolist()
    model = models.build(models.MODELS["gpt_neox"], PRESET, "fp32", "cpu", 0).double()  # it has biases
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    parts = {variant.cut for variant in VARIANTS.values() if variant.cut}
    found = []
    for part in parts:
        apart = copy.deepcopy(model)
        train.cut(apart, part)
        found.append(apart(input_ids=ids).logits)
        torch.testing.assert_close(found[-1], model(input_ids=ids).logits, rtol=1e-10, atol=1e-10)
    assert len({tuple(y.flatten().tolist()) for y in (model(input_ids=ids).logits, *found)}) == 1 + len(parts) == 4


def test_what_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    torch.save(torch.arange(1000, dtype=torch.int32), tmp_path / "tokens.pt")
    train.split(tmp_path)
    parts: list[Tensor] = [torch.load(tmp_path / name / "tokens.pt") for name in ("train", "held")]
    assert torch.cat(parts).tolist() == list(range(1000))
    assert len(parts[1]) == 100


# --- what is kept -----------------------------------------------------------------------------------------------------------------------

MACHINE = {"device": "Some GPU (80 GB)", "torch": "2.0.0+cu1", "date": "2000-01-02", "sources": "a"}
SETTINGS = kept.settings(PRESET, 0, 1000)


def test_a_later_run_adds_to_the_file(tmp_path: Path) -> None:
    """Of the same machine and settings; others get a file of their own. A failure gives way to a result."""
    first = kept.Sheet(MACHINE, SETTINGS, [result_of()], {"llama fp32": "out of memory", "phi3 fp32": "lost"})
    path = kept.save(first, tmp_path)
    assert path.name == "some-gpu-80-gb-2.0.0-2000-01-02.json"
    later = kept.Sheet(MACHINE, SETTINGS, [replace(result_of(), dtype="fp32"), result_of(late=0.5)])
    assert kept.save(later, tmp_path) == path
    both = kept.load(path)
    assert {r.name: r.runs[PATCHED].late for r in both.results} == {"llama bf16": 0.5, "llama fp32": 1e-3}
    assert both.failed == {"phi3 fp32": "lost"}
    other = kept.save(replace(later, settings=SETTINGS | {"steps": 7}), tmp_path)
    assert other.name == "some-gpu-80-gb-2.0.0-2000-01-02-2.json"
    assert kept.load(path) == both
    assert not list(tmp_path.glob("*.part"))


def test_what_is_kept_is_short(tmp_path: Path) -> None:
    long = replace(result_of(update=1.23456789e-5), after=4.123456789, losses=[1.23456789])
    found = kept.load(kept.save(kept.Sheet(MACHINE, SETTINGS, [long]), tmp_path)).results[0]
    assert (found.after, found.losses, found.runs[PATCHED].update) == (4.12346, [1.23457], 1.23e-5)


def test_a_job_that_fails_is_kept_as_failed(tmp_path: Path) -> None:
    options = run.parse(["--preset", "tiny", "--out", str(tmp_path)])
    sheet = kept.Sheet(MACHINE, SETTINGS)
    futures: list[Future[Result]] = [Future(), Future(), Future()]
    futures[0].set_exception(RuntimeError("no memory\nof any kind"))
    futures[1].set_result(result_of(late=1.0))
    futures[2].set_result(replace(result_of(), dtype="fp32"))
    jobs = [Job("phi3", "fp32", PRESET, "cpu", tmp_path), *(Job("llama", dtype, PRESET, "cpu", tmp_path) for dtype in ("bf16", "fp32"))]
    console = Console(record=True, quiet=True)
    display = run._Display(console, 1)
    bad = [name for future, job in zip(futures, jobs, strict=True) for name in run._finish(future, job, options, sheet, display)]
    assert bad == ["phi3 fp32", "llama bf16"]
    found = kept.load(next(tmp_path.glob("*.json")))
    assert found.failed == {"phi3 fp32": "RuntimeError: no memory"}
    assert [r.name for r in found.results] == ["llama bf16", "llama fp32"]


# --- the commands -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--models", "llama,lama"], ["--models lama", "llama"]),
        (["--dtypes", "fp8"], ["--dtypes fp8", "bf16"]),
        (["--steps", "2"], ["--steps 2", "3 or more"]),
        (["--workers", "0"], ["--workers 0", "1 or more"]),
    ],
)
def test_a_bad_option_names_itself_and_the_remedy(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.parse(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []


def test_from_the_command_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # in the workers the functions are plain PyTorch
    monkeypatch.chdir(tmp_path)
    steps = ["--preset", "tiny", "--steps", str(STEPS)]
    assert run.main([*steps, "--models", "llama", "--dtypes", "bf16", "--out", "kept"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("held-out loss") == len(VARIANTS)
    assert printed.strip().endswith("1 of 1: patched is as near to stock as stock is to itself")
    assert report.main(["--results", "kept", "--docs", "docs"]) == 0
    page = (tmp_path / "docs/convergence.md").read_text()
    assert "1 of 1 pass. Stock, run again, gives the same bits in every model." in page
    assert "says nothing of the kernels" in page
    picture = next((tmp_path / "docs/figures").glob("convergence-cpu-*-bf16.png"))
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert f"(figures/{picture.name})" in page


def test_the_page_tells_what_failed() -> None:
    noisy = replace(result_of(), model="phi3", runs=result_of().runs | {measure.AGAIN: YARDSTICK})
    sheet = kept.Sheet(MACHINE, SETTINGS, [result_of(late=1.0), noisy], {"qwen3 fp32": "RuntimeError: no memory"})
    page = report.page({"stem": sheet})
    assert "1 of 2 pass. Stock, run again, does not give the same bits for phi3 bf16." in page
    assert "**fails**: late 1, allowed 0.005" in page
    assert "- qwen3 fp32: RuntimeError: no memory" in page
    assert "says nothing of the kernels" not in page
    assert max(map(len, report.HEAD.splitlines())) <= 140


def test_without_results_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: list[Any] = ["--results", tmp_path, "--docs", tmp_path / "docs"]
    assert report.main(list(map(str, arguments))) == 1
    assert "Nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


def test_no_result_of_a_cpu_is_committed() -> None:
    assert not [path.name for path in kept.FOLDER.glob("*.json") if kept.load(path).machine["device"] == "cpu"]
