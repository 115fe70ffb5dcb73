"""The benchmarks' files: the JSON of a run, the page made from it, and the bars it is held to."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest

from tests.bench import bars, experts, heads, peers, report, results, table
from tests.bench.peers import COMPILE, DONATE, EAGER, LIGER, NATIVE, OURS
from tests.bench.results import GREEN, Result, Row
from tests.bench.table import BOTH, EXPERT_MODES, HEAD_MODES, HOST, MODES, SWEEP, Bench
from tests.bench.training import report as training


def bench_of(op: str) -> Bench:
    return next(b for b in table.ALL if b.op == op)


MACHINE = {"device": "Some GPU (80 GB)", "torch": "2.0.0+cu1", "date": "2000-01-02", "sources": "a"}


def test_a_second_run_adds_to_the_file_of_the_first(tmp_path: Path) -> None:
    """On the same machine, day and sources; other sources get a file of their own, and nothing is lost."""
    first = Result(
        MACHINE,
        {"copy_gbs": 1.0, "small_copy_gbs": 0.9, "matmul_tflops": 2.0},
        {"f": GREEN},
        [Row("f", "s", BOTH, OURS, 1.0), Row("f", "s", BOTH, EAGER, 5.0)],
    )
    second = Result(MACHINE, {}, {"f": GREEN, "g": GREEN}, [Row("f", "s", BOTH, OURS, 2.0), Row("g", "s", HOST, OURS, 3.0)])
    path = results.save(first, tmp_path)
    assert path.name == "some-gpu-80-gb-2.0.0-2000-01-02.json"
    assert results.save(second, tmp_path) == path
    both = results.load(path)
    assert [(r.op, r.provider, r.us) for r in both.rows] == [("f", OURS, 2.0), ("f", EAGER, 5.0), ("g", OURS, 3.0)]
    assert both.limits == {"copy_gbs": 1.0, "small_copy_gbs": 0.9, "matmul_tflops": 2.0}
    other = results.save(replace(second, machine=MACHINE | {"sources": "b"}), tmp_path)
    assert other.name == "some-gpu-80-gb-2.0.0-2000-01-02-2.json"
    assert results.load(path) == both
    later = replace(results.load(other), rows=[Row("f", "s", BOTH, OURS, 4.0)], gates={"f": GREEN})
    text = report.page({other.stem: later, path.stem: both})
    assert text.count("\n## ") == 1, "one machine"
    assert "| `g` | s | liger_fn | 3.0 |" in text
    assert "| s | forward + backward | liger_fn | **4.0** |" in text
    assert f"sources b ([JSON](../tests/bench/results/{other.stem}.json)): `f` alone" in text
    newer = replace(later, machine=MACHINE | {"sources": "b", "torch": "2.1.0"})
    assert report.page({path.stem: both, "newer": newer}).count("\n## ") == 2


def test_the_page_says_where_a_peer_is_better() -> None:
    def rows(shape: str, ours: tuple[float, float], theirs: dict[str, tuple[float | None, float | None]]) -> list[Row]:
        each = {OURS: ours, **theirs}
        return [Row("f", shape, BOTH, p, us, bytes=10**6, floor_us=4.0, mib=mib) for p, (us, mib) in each.items()]

    found = Result(
        MACHINE, {"copy_gbs": 3000.0, "small_copy_gbs": 2800.0, "matmul_tflops": 700.0}, {"f": GREEN},
        [
            *rows("won", (10.0, 100.0), {DONATE: (5.0, 50.0), EAGER: (20.0, 100.0), COMPILE: (30.0, 200.0)}),
            *rows("lost", (10.0, 100.0), {EAGER: (9.0, 80.0), NATIVE: (8.0, 90.0)}),
            *rows("alone", (10.0, 100.0), {EAGER: (None, None)}),
        ],
    )  # fmt: skip
    text = report.page({"stem": found})
    faster, less = text.split("### Where a peer is faster")[1].split("### Where a peer needs less memory")
    assert "In 1 of 2 comparisons" in faster
    assert "| `f` | lost | forward + backward | native | 8.0 | 10.0 | × 1.25 |" in faster
    assert "In 1 of 2 comparisons" in less
    assert "| `f` | lost | forward + backward | eager | 80.0 | 100 | × 1.25 |" in less
    assert "won" not in faster + less.split("### `f`")[0]
    assert "| won | forward + backward | liger_fn donate | **5.0** | 1 | 200 GB/s | 1.25 | 50 |" in text
    assert "| lost | forward + backward | liger_fn | 10.0 | 1 |" in text
    assert "| alone | forward + backward | eager | – | 1 | – | – | – |" in text
    assert "A copy reaches 3,000 GB/s (of 64 MiB 2,800 GB/s, 1.07 × its floor), a matrix product of bf16 700 TFLOP/s." in text


def test_the_page_shows_every_bar_met_or_not() -> None:
    shape = "8192x14336"
    rows = [
        Row("swiglu", shape, BOTH, OURS, 104.0, bytes=10, floor_us=100.0, mib=672.0),
        Row("swiglu", shape, BOTH, DONATE, 90.0, bytes=10, floor_us=100.0, mib=225.3),
        Row("swiglu", bench_of("swiglu").shape(bench_of("swiglu").tiny), HOST, LIGER, 9.0, ours_over_this=0.5),
        Row("geglu", shape, BOTH, OURS, 103.0, bytes=10, floor_us=100.0),
    ]
    text = report.page({"stem": Result(MACHINE, {}, {"swiglu": GREEN, "geglu": GREEN}, rows)})
    section = text.split("### The bars\n")[1].split("\n### ")[0]
    assert f"3 of 5 are met. {len(bars.verdicts(rows)) - 5} were not measured." in section
    assert f"| `swiglu` | {shape} | {BOTH} | liger_fn | ≤ 1.03 ÷ floor | 1.04 | **no** |" in section
    assert f"| `geglu` | {shape} | {BOTH} | liger_fn | ≤ 1.03 ÷ floor | 1.03 | yes |" in section
    assert f"| `swiglu` | {shape} | {BOTH} | liger_fn donate | ≤ 225 MiB | 225.3 | **no** |" in section  # 225 would hide it
    assert "| host | liger-kernel | ≤ 0.60 liger_fn ÷ this, host | 0.50 | yes |" in section
    assert f"| `geglu` | {shape} | {BOTH} | liger_fn donate | ≤ 225 MiB | not measured | – |" in section
    assert "`rms_norm`" not in section, "a function that was not run has no verdict"
    printed = bars.lines(rows)
    assert len(printed) == len(bars.verdicts(rows)) + 1
    assert len({line.index(column) for line, column in ((printed[0], "bar"), *((p, "≤") for p in printed[1:]))}) == 1


def test_every_bar_is_of_something_measured() -> None:
    for bar in bars.every():
        if bar.mode in EXPERT_MODES:
            assert hasattr(Row(*bar[:4], None), bar.what)
            assert (*bar[:3], LIGER if bar.provider == bars.BEST else bar.provider) in experts.measured()
            continue
        bench = bench_of(bar.op)
        if bar.mode == HOST:
            assert bar.shape == bench.shape(bench.tiny)
            continue
        assert hasattr(Row(*bar[:4], None), bar.what)
        if bar.mode in HEAD_MODES:
            assert bar[:4] in heads.keys()  # noqa: SIM118  not a dict
            continue
        assert bar.shape in [bench.shape(sizes) for sizes in bench.sizes]
        assert bar.mode in MODES
        assert bar.provider == OURS or (bar.provider == DONATE and bar.op in peers.DONATING and bar.mode == BOTH)
    assert len(set(bars.every())) == len(bars.every()) > 30


def test_the_page_marks_what_was_timed_by_events(tmp_path: Path) -> None:
    rows = [Row("f", "s", BOTH, OURS, 1.0), Row("f", "s", BOTH, LIGER, 5.0, by_events=True, note="copies")]
    path = results.save(Result(MACHINE, {}, {"f": GREEN}, rows), tmp_path)
    assert results.load(path).rows == rows
    text = report.page({"stem": results.load(path)})
    assert "| s | forward + backward | liger-kernel (1) (2) | 5.0 |" in text
    assert "\n(1) copies\n" in text
    assert "\n(2) timed by events: " in text
    assert "| s | forward + backward | liger_fn | **1.0** |" in text


def test_a_row_survives_the_file(tmp_path: Path) -> None:
    """No memory at all is a figure; a row that failed has none."""
    rows = [
        Row("f", "s", BOTH, OURS, 1.5, bytes=3, floor_us=1.0, mib=0.0),
        Row("f", "s", BOTH, EAGER, None, note="out of memory"),
        Row("f", "s", SWEEP, OURS, 2.0, size=4, by_events=True),
        Row("f", "s", HOST, LIGER, 2.0, ours_over_this=0.5),
    ]
    path = results.save(Result(MACHINE, {}, {"f": GREEN}, rows), tmp_path)
    assert results.load(path).rows == rows
    assert '{"op": "f", "shape": "s", "mode": "host", "provider": "liger-kernel", "us": 2.0, "ours_over_this": 0.5}' in path.read_text()


def test_the_page_has_the_figures_by_size() -> None:
    rows = [
        Row("swiglu", shape, SWEEP, p, us, bytes=10, floor_us=1.0, mib=mib, size=n)
        for n, shape, us, mib in ((1024, "1024x8", 20.0, 4.0), (512, "512x8", 10.0, 2.0))
        for p in (OURS, LIGER)
    ]
    result = Result(MACHINE, {}, {"swiglu": GREEN}, rows)
    text = report.page({"stem": result})
    assert "`swiglu`, along its rows of 14336:\n\n| shape | liger_fn | liger-kernel |" in text
    assert "| 512x8 | 10.0 / 2 | 10.0 / 2 |\n| 1024x8 | 20.0 / 4 | 20.0 / 4 |" in text
    assert list(report.drawn(result)) == ["time", "memory"]
    assert "figures/bench-stem-memory.png" in text
    assert "figures/bench-stem-floor.png" not in text
    assert "### `swiglu`" not in text  # its tables are of the other passes


def test_without_results_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.write(tmp_path, tmp_path / "docs") == []
    monkeypatch.setattr(sys, "argv", ["report", "--results", str(tmp_path / "none"), "--docs", str(tmp_path / "docs")])
    assert report.main() == 1
    assert "make bench" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    found = {path.stem: results.load(path) for path in sorted(results.FOLDER.glob("*.json"))}
    shown = report.DOCS / "benchmarks.md"
    if not found:
        assert not shown.exists(), "a page of figures that nobody can look up"
        return
    assert all(r.machine["device"] != "cpu" for r in found.values()), "a CPU has no figures to show"
    steps = training.read()
    assert all(s.machine["device"] != "cpu" for s in steps.values()), "a CPU has no figures to show"
    assert shown.read_text() == report.page(found, steps), "run `make bench-report`"
    assert all((report.DOCS / "figures" / f"training-{stem}.png").exists() for stem in steps)
    for stem, runs in report.together(found).items():
        drawn = report.drawn(reduce(Result.with_later, runs.values()))
        assert all((report.DOCS / "figures" / f"bench-{stem}-{which}.png").exists() for which in drawn)
