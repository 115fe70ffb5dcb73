"""The benchmark on several GPUs: what it measures on two processes of a CPU, what it makes of failures, and what it says of figures."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.bench.distributed import bars, group, measure, plan, report, store
from tests.bench.distributed.__main__ import main, options
from tests.bench.distributed.plan import CONTEXT, LLAMA_8B, LONGEST, SCALING, STEPS, WORKLOADS, Task, tasks
from tests.bench.distributed.rank import Figures
from tests.bench.distributed.search import Search
from tests.bench.distributed.store import Row, Steps
from tests.bench.training.models import LIGER, OURS, STOCK

MACHINE = {"device": "GPU", "date": "2026-01-02", "torch": "2.0", "transformers": "5.0", "sources": "abc", "gpus": "2"}


FAILED: dict[str, Any] = {"peak_gib": (), "first_losses": (), "losses": (), "note": "out of memory"}


def row(provider: str, tokens: float | None = 100.0, peak: float = 40.0, shape: str = "4x4096", gpus: int = 2, **changes: Any) -> Row:
    """On two GPUs: the second rank needs a GiB more, and 30 GiB are parameters and the optimizer's states."""
    memory, losses = ((peak - 1, peak), (10.0, 10.0), (20.0, 20.0)), (12.0, 11.5)
    found = Row(LLAMA_8B.name, shape, gpus, provider, tokens, 5.0, *memory, losses, losses, first_s=1.0)
    return replace(found, **changes)


# --- the harness, on processes ----------------------------------------------------------------------------------------------------------


def test_all_parts_on_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps of all providers, scaling, and contexts; a provider that is not installed has a row that says so."""
    given = ["--gpus", "1,2", "--workloads", "4x4096", "--warm", "2", "--steps", "2"]
    failed = main([*given, "--providers", f"{STOCK},{LIGER},{OURS}", "--parts", f"{STEPS},{SCALING}", "--out", str(tmp_path)])
    failed |= main([*given, "--providers", OURS, "--parts", CONTEXT, "--out", str(tmp_path)])
    assert not failed
    (path,) = tmp_path.glob("*.json")
    found = {(r.shape, r.gpus, r.provider): r for r in store.load(path).rows}
    stock, ours, alone = found["4x8", 2, STOCK], found["4x8", 2, OURS], found["4x8", 1, OURS]
    assert found["4x8", 2, LIGER].note.startswith("failed: ")
    assert (stock.patched, ours.patched > 10) == (0, True)
    # fp32 of one batch on each rank, whose order of summing differs; and a rank's own loss is the same whatever the others have.
    assert ours.losses == pytest.approx(stock.losses, rel=1e-5)
    assert ours.first_losses == pytest.approx(stock.first_losses, rel=1e-5)
    assert ours.first_losses[0] == pytest.approx(alone.first_losses[0], rel=1e-5)
    assert ours.first_losses[0] != pytest.approx(ours.first_losses[1], rel=1e-3)
    assert ours.losses[0] == pytest.approx(sum(ours.first_losses) / 2, rel=1e-6)
    assert ours.losses[0] > ours.losses[1]
    assert ours.tokens_per_s == pytest.approx(1e3 * 2 * 4 * 8 / (ours.step_ms or 0), rel=1e-3)  # kept to a thousandth of a millisecond
    # Halves of what one process has alone, and two moments (each with a count of steps) of every parameter.
    assert ours.parameters_gib == pytest.approx([alone.parameters_gib[0] / 2] * 2)
    assert ours.optimizer_gib == pytest.approx([2 * g for g in ours.parameters_gib], rel=0.01)
    longest = found[LONGEST, 2, OURS]
    assert (longest.longest, longest.fails, longest.note) == (40, 48, "")
    assert "4x8" in capsys.readouterr().out


def waits_for_a_rank_that_dies(on: group.Rank) -> Iterator[str]:
    yield "here"
    if on.rank == 1:
        os._exit(9)
    time.sleep(100)  # a collective that nobody ends: NCCL's do not notice


def waits_for_nobody(on: group.Rank) -> Iterator[str]:
    yield str(dist.get_world_size())
    time.sleep(100)


def one_has_no_memory(on: group.Rank) -> Iterator[str]:
    if on.rank == 0:
        raise RuntimeError("NCCL error: remote process exited")
    raise RuntimeError("CUDA error: out of memory")
    yield ""


@pytest.mark.parametrize(
    ("work", "timeout", "note"),
    [
        (waits_for_a_rank_that_dies, 60.0, "rank 1 was ended from outside (exit code 9): out of the host's memory?"),
        (waits_for_nobody, 1.0, group.OUT_OF_TIME),
        (one_has_no_memory, 60.0, "out of memory"),  # the cause, not what the other saw of it
    ],
)
def test_no_rank_is_left_when_one_fails(work: group.Work, timeout: float, note: str) -> None:
    begun = time.monotonic()
    *_, (_, last) = group.run(work, 2, (), timeout)
    assert isinstance(last, group.Failed)
    assert last.note == note
    assert time.monotonic() - begun < 30, "somebody was waited for"
    assert not multiprocessing.active_children()


# --- what is made of what they say ------------------------------------------------------------------------------------------------------


def test_a_row_is_of_all_ranks_and_a_failure_is_its_note(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks((STEPS,), ("llama-8b",), WORKLOADS[:1], (2,), (OURS,))[0]
    said = [Figures(ms, peak, 7.5, 15.0, (loss, 11.0), 9.0, 130) for ms, peak, loss in ((2000.0, 40.0, 12.0), (2048.0, 41.0, 12.5))]
    heard: list[tuple[int, object]] = [(1, said[1]), (0, said[0])]
    monkeypatch.setattr(measure, "run", lambda *_: (each for each in heard))
    (found,) = measure.measured(task, 10)
    assert (found.key, found.tokens_per_s, found.step_ms) == (("Llama 8B", "4x4096", 2, OURS), 16000.0, 2048.0)
    assert (found.peak, found.beyond_gib, found.losses, found.first_losses) == (41.0, 18.5, (12.25, 11.0), (12.0, 12.5))
    heard[:] = [(0, said[0]), (1, group.Failed("out of memory", 3))]
    assert [r.note for r in measure.measured(task, 10)] == ["out of memory"]
    heard[:] = [(0, group.Failed(group.OUT_OF_TIME))]
    assert [r.note for r in measure.measured(task, 10)] == ["not done after 10 s"]


@pytest.mark.parametrize("limit", [7000, 16384, 45500, 230000])
@pytest.mark.parametrize("constant", [0.0, 20.0])
def test_a_search_ends_within_an_eighth_after_few_tries(limit: int, constant: float) -> None:
    """Where memory is the higher of a straight line and of what no length changes."""

    def peaks(length: int) -> tuple[float, ...]:
        return (10 + length / 1e4, constant)

    search, tried = Search(first=16384, grain=4096), 0
    while (length := search.next()) is not None:
        assert length % 4096 == 0
        tried += 1
        search = search.with_fit(length, peaks(length), peaks(limit)[0]) if length <= limit else search.without(length)
    assert search.longest is not None
    assert search.fails is not None
    assert search.longest <= limit < search.fails <= search.longest + max(4096, search.longest // 8)
    assert tried <= 5


def test_a_search_goes_on_when_its_lines_promised_too_much() -> None:
    search, tried = Search(first=16384, grain=4096), 0
    while (length := search.next()) is not None:
        tried += 1
        search = search.with_fit(length, (length / 1e4,), 40.0) if length <= 150_000 else search.without(length)
    assert search.longest is not None
    assert search.fails is not None
    assert search.longest <= 150_000 < search.fails <= search.longest * 9 / 8
    assert tried <= 12
    assert Search(first=16, grain=8, fails=8).next() is None, "not even the shortest"


def test_every_row_is_made_once_and_on_the_most_gpus() -> None:
    found = tasks(plan.PARTS, ("llama-8b",), WORKLOADS, (1, 2, 4), (STOCK, OURS))
    assert [t.key[1:] for t in found] == [
        *((w, 4, p) for w in ("4x4096", "1x32768") for p in (STOCK, OURS)),
        ("4x4096", 1, OURS), ("4x4096", 2, OURS), (LONGEST, 4, STOCK), (LONGEST, 4, OURS),
    ]  # fmt: skip
    assert [t.key[1:] for t in tasks((SCALING,), ("llama-8b",), WORKLOADS[1:], (1, 2), (STOCK,))] == [("1x32768", n, OURS) for n in (1, 2)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--models", "llama-7b"], "llama-7b: not one of llama-8b"),
        (["--workloads", "4x"], "4x: not a batch and a length"),
        (["--gpus", "0"], "0: must be a whole number"),
        (["--gpus", "1,4"], "--gpus 4: this host has 2"),
    ],
)
def test_an_option_that_is_none_is_refused(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(given, gpus=2)
    assert said in capsys.readouterr().err


# --- what is kept and said --------------------------------------------------------------------------------------------------------------


def synthetic() -> list[Row]:
    """Beyond 30 GiB: stock 40, liger-kernel 14, ours 12."""
    return [
        row(STOCK, 100.0, 70.0), row(LIGER, 120.0, 44.0), row(OURS, 125.0, 42.0, first_losses=(12.0, 11.5046)),
        row(OURS, 66.0, gpus=1), row(STOCK, None, shape="1x32768", **FAILED),
        row(OURS, 50.0, shape="1x32768"), row(STOCK, 30.0, shape=LONGEST, longest=49152, fails=53248),
        row(OURS, 20.0, shape=LONGEST, longest=245760, fails=278528),
    ]  # fmt: skip


def test_bars_are_of_what_was_run() -> None:
    found = {(v.shape, v.gpus, v.what.split(",")[0]): v for v in bars.verdicts(synthetic())}
    judged = {key: (round(v.found, 5) if v.found else None, v.met) for key, v in found.items()}
    assert judged == {
        ("4x4096", 2, "tokens/s"): (1.25, True),
        ("4x4096", 2, bars.MEMORY.split(",")[0]): (0.3, True),
        ("4x4096", 2, "first loss of any rank"): (0.0004, False),
        ("4x4096", 2, "scaling: tokens/s a GPU"): (0.94697, False),
        ("1x32768", 2, "tokens/s"): (None, None),
        ("1x32768", 2, bars.MEMORY.split(",")[0]): (None, None),
        ("1x32768", 2, "first loss of any rank"): (None, None),
        (LONGEST, 2, "longest sequence"): (5.0, True),
    }
    assert bars.verdicts([]) == []
    assert bars.verdicts([row(OURS), row(LIGER)]) == [], "stock was not run"
    alone = {v.what: v for v in bars.verdicts([row(STOCK, gpus=1, peak=70.0), row(OURS, gpus=1, peak=60.0)])}
    assert (alone[bars.MEMORY].found, alone[bars.MEMORY].met) == (0.75, None), "gradients of one GPU: shown, not judged"
    assert [v.what for v in bars.verdicts([row(p, model="Llama 8B 16 layers") for p in (STOCK, OURS)])] == [bars.BARS[-1].what]


def test_runs_of_one_machine_are_merged(tmp_path: Path) -> None:
    path = store.save(Steps(MACHINE, [row(STOCK), row(OURS, 99.0)]), tmp_path)
    assert path == store.save(Steps(MACHINE, [row(OURS, 111.0), row(OURS, 60.0, gpus=1)]), tmp_path)
    read = store.load(path)
    assert [(r.gpus, r.provider, r.tokens_per_s) for r in read.rows] == [(2, STOCK, 100.0), (2, OURS, 111.0), (1, OURS, 60.0)]
    assert read.rows[0] == row(STOCK)
    assert json.loads(path.read_text())["machine"] == MACHINE
    assert store.save(Steps(MACHINE | {"gpus": "4"}, [row(OURS)]), tmp_path) != path


def test_the_page_shows_what_was_measured_and_what_was_not(tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    assert report.write(results, docs) == []
    assert not docs.exists()
    path = store.save(Steps(MACHINE, synthetic()), results)
    page, figure = report.write(results, docs)
    text = page.read_text()
    assert page.name == report.PAGE
    assert figure.exists()
    assert f"figures/{figure.name}" in text
    assert f"results/distributed/{path.name}" in text
    assert "## 2 × GPU, torch 2.0, 2026-01-02" in text
    assert "| Llama 8B | 4x4096 | 2 | liger_fn | **125** | × 1.250 | 5.0 | 42.00 | 12.00 | × 0.300 | 12.0000, 11.5000 |" in text
    assert "| Llama 8B | 1x32768 | 2 | stock | out of memory | – |" in text
    assert "| Llama 8B | 2 | liger_fn | 245,760 | × 5.000 | 278,528 | 20 | 40.00 |" in text
    assert "| Llama 8B | 4x4096 | 2 | 125 | 62 | 94.7% |" in text
    assert "3 of 5 are met." in text
    assert "| Llama 8B | longest | 2 | longest sequence, liger_fn ÷ stock | ≥ 4 | 5 | yes |" in text
    assert "| first loss of any rank, liger_fn from stock, relative | ≤ 0.0002 | 0.0004 | **no** |" in text


def test_a_context_keeps_what_it_knew_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fault in the middle, the longest that fitted is there, and where it ended."""
    from tests.bench.distributed.rank import Fits, Trying

    task: Task = tasks((CONTEXT,), ("llama-8b",), WORKLOADS, (1,), (LIGER,))[0]
    figures = Figures(1000.0, 60.0, 15.0, 30.0, (12.0,), 0.0, 0)
    said = [(0, Trying(16384)), (0, Fits(16384, (50.0, 60.0), 130.0, figures)), (0, Trying(32768)), (0, group.Failed("failed: E: why"))]
    monkeypatch.setattr(measure, "run", lambda *_: iter(said))
    provisional, last = measure.measured(task, 10)
    assert (provisional.longest, provisional.note) == (16384, measure.UNFINISHED)
    assert (last.longest, last.tokens_per_s, last.note) == (16384, 16384.0, "failed: E: why (at 32768 tokens)")
