"""The benchmark suite's harness, run whole on a CPU: gate, figures, JSON, page. What it times there are tiny tensors, and means nothing."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import liger_fn
from tests.bench import measure, peers, report, results, table
from tests.bench.peers import DONATE, EAGER, LIGER, OURS
from tests.bench.results import GREEN, Result, Row
from tests.bench.run import Red, Run
from tests.bench.table import BOTH, FORWARD, HOST, MODES, SWEEP, Bench
from tests.cases import FP32, TABLES, Maker

CPU = torch.device("cpu")
ROOT = results.ROOT
PNG = b"\x89PNG"


def bench_of(op: str) -> Bench:
    return next(b for b in table.ALL if b.op == op)


# --- the whole chain --------------------------------------------------------------------------------------------------------------------


def test_gate_figures_json_and_page(tmp_path: Path) -> None:
    """What `make bench` and `make bench-report` do, for every function there is."""
    run = Run(CPU)
    for bench in table.present():
        run.host(bench)
        for sizes in table.sizes(bench, CPU):
            run.speed(bench, sizes)
    for sweep in table.sweeps():
        for sizes in table.sizes(sweep, CPU):
            run.sweep(sweep, sizes)
    path = results.save(run.result(), tmp_path / "results")
    result = results.load(path)
    report.write(tmp_path / "results", tmp_path / "docs")

    assert result.gates == {b.op: GREEN for b in table.present()}
    _complete(result)
    _dated(result, path)
    _shown(result, path.stem, tmp_path / "docs")


def _complete(result: Result) -> None:
    """A figure for every function, pass and provider; a floor wherever device time is."""
    found = {r.key for r in result.rows}
    for bench in table.present():
        everyone = set(peers.uncompiled(bench.op, CPU))
        assert everyone >= {OURS, EAGER}
        assert {(bench.op, bench.shape(bench.tiny), mode, p) for mode in (FORWARD, BOTH, HOST) for p in everyone} <= found
        donating = {mode for mode in (FORWARD, BOTH, HOST) if (bench.op, bench.shape(bench.tiny), mode, DONATE) in found}
        assert donating == ({BOTH} if bench.op in peers.DONATING else set())
    for sweep in table.sweeps():
        drawn = {(r.shape, r.provider, r.size) for r in result.rows if (r.op, r.mode) == (sweep.op, SWEEP)}
        assert drawn >= {(sweep.bench.shape(sizes), OURS, sizes[sweep.at]) for sizes in sweep.tiny}
        assert len({provider for _, provider, _ in drawn}) == 2
    assert result.limits.keys() == {"copy_gbs", "small_copy_gbs", "matmul_tflops"}
    assert all(r.us is not None and r.us > 0 for r in result.rows)
    assert all(r.floor_us and r.over_floor and (r.gbs if r.bytes else r.tflops) for r in result.rows if r.mode != HOST)
    assert all(r.ours_over_this for r in result.rows if r.mode == HOST and r.provider != OURS)


def _dated(result: Result, path: Path) -> None:
    assert result.machine["device"] == "cpu"
    assert result.machine["torch"] == torch.__version__
    assert path.name == f"cpu-{torch.__version__.split('+')[0]}-{result.machine['date']}.json"


def _shown(result: Result, stem: str, docs: Path) -> None:
    text = (docs / "benchmarks.md").read_text()
    assert "Wall clock on a CPU: this proves the harness and says nothing of speed." in text
    for bench in table.present():
        section = text.split(f"### `{bench.op}`\n")[1].split("\n### ")[0]
        for r in result.rows:
            if r.op == bench.op and r.mode in MODES:
                assert f"\n| {r.shape} | {r.mode} | {r.provider} {'(1) ' if r.note else ''}| " in section
    drawn = sorted((docs / "figures").iterdir())
    assert [p.name for p in drawn] == [f"bench-{stem}-{which}.png" for which in ("floor", "time")]  # no memory on a CPU
    assert all(p.read_bytes().startswith(PNG) and f"(figures/{p.name})" in text for p in drawn)


def test_make_bench_takes_a_choice(tmp_path: Path) -> None:
    """What `make bench BENCH_ARGS="-k host"` runs: no device time, so neither limits nor floors."""
    result = _make_bench("host and glu", tmp_path)
    assert {r.mode for r in result.rows} == {HOST}
    assert "swiglu" in result.gates
    assert result.limits == {}


def test_make_bench_takes_the_sweeps_alone(tmp_path: Path) -> None:
    result = _make_bench("sweep and swiglu", tmp_path)
    assert {(r.op, r.mode) for r in result.rows} == {("swiglu", SWEEP)}
    assert result.limits


def test_make_bench_takes_the_heads_alone(tmp_path: Path) -> None:
    result = _make_bench("heads and (tokens or errors)", tmp_path)
    assert {(r.op, r.mode) for r in result.rows} == {("linear_cross_entropy", mode) for mode in (table.HEAD_SWEEP, table.HEAD_ERRORS)}


KILL = """import os
import pytest

@pytest.hookimpl(trylast=True)
def pytest_runtest_setup(item):
    if "swiglu" in item.name:
        os._exit(9)
"""


def test_a_run_that_is_killed_keeps_what_it_measured(tmp_path: Path) -> None:
    (tmp_path / "killer.py").write_text(KILL)
    done = _bench("test_host_cost and not peers and (softmax or swiglu)", tmp_path / "out", "-p", "killer", path=str(tmp_path))
    assert done.returncode == 9, done.stdout + done.stderr
    (path,) = (tmp_path / "out").iterdir()
    assert {r.op for r in results.load(path).rows} == {"softmax"}


def _bench(choice: str, folder: Path, *options: str, path: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", "tests/bench", "--bench-dir", str(folder)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (path, env.get("PYTHONPATH"))))
    return subprocess.run([*command, "-k", choice], capture_output=True, text=True, cwd=ROOT, env=env, check=False)


def _make_bench(choice: str, folder: Path) -> Result:
    done = _bench(choice, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    assert f"written to {path}" in done.stdout
    return results.load(path)


# --- the gate ---------------------------------------------------------------------------------------------------------------------------


class Wrong:
    """An op with something done to what it returns."""

    def __init__(self, op: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.op, self.change, self.reference = op, change, op.reference

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        return self.change(self.op(*args, **options))


def _not_timed(*_: Any, **__: Any) -> Any:
    raise AssertionError("timed before its gate was green")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(lambda y: y + 0.02 * y.detach(), "value 0: error", id="value"),
        pytest.param(lambda y: 2 * y - y.detach(), "gradient of x: error", id="gradient"),
        pytest.param(lambda y: y.float(), "torch.float32", id="dtype"),
        pytest.param(lambda y: 1 / 0, "ZeroDivisionError", id="raises"),
    ],
)
def test_a_red_gate_reports_no_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: Any, says: str) -> None:
    run, wrong, right = Run(CPU), bench_of("rms_norm"), bench_of("swiglu")
    monkeypatch.setattr(liger_fn, "rms_norm", Wrong(liger_fn.rms_norm, change))
    for name in ("device_us", "peak_mib", "paired"):
        monkeypatch.setattr(measure, name, _not_timed)
    for _ in range(2):
        with pytest.raises(Red, match="rms_norm: no figures, its gate is red"):
            run.speed(wrong, wrong.tiny)
        with pytest.raises(Red, match="rms_norm: no figures"):
            run.host(wrong)
        with pytest.raises(Red, match="rms_norm: no figures"):
            run.sweep(table.SWEEPS[0], (4, 64))
    monkeypatch.undo()
    run.speed(right, right.tiny)  # the others go on

    path = results.save(run.result(), tmp_path / "results")
    found = results.load(path)
    assert {r.op for r in found.rows} == {"swiglu"}
    assert found.gates["swiglu"] == GREEN
    assert says in found.gates["rms_norm"]
    report.write(tmp_path / "results", tmp_path / "docs")
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert f"### No figures: these functions are wrong here\n\n- `rms_norm`: {found.gates['rms_norm']}\n" in text
    assert "### `rms_norm`" not in text
    assert "### `swiglu`" in text


def test_a_gate_that_turns_red_takes_the_earlier_figures_back(tmp_path: Path) -> None:
    before = Result({"device": "x", "torch": "1", "date": "d"}, {}, {"rms_norm": GREEN}, [Row("rms_norm", "s", BOTH, OURS, 1.0)])
    assert results.load(results.save(before, tmp_path)).rows == before.rows
    assert results.load(results.save(replace(before, gates={"rms_norm": "off"}, rows=[]), tmp_path)).rows == []
    assert results.load(results.save(replace(before, gates={}), tmp_path / "unjudged")).rows == []


def test_a_sweep_passes_the_gate_at_its_own_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that is wrong at one of them loses all its figures."""
    run, sweep = Run(CPU), table.SWEEPS[0]
    run.speed(sweep.bench, sweep.bench.tiny)
    assert {r.op for r in run.result().allowed()} == {sweep.op}
    monkeypatch.setattr(liger_fn, sweep.op, Wrong(liger_fn.rms_norm, lambda y: y if y.shape[-1] != sweep.tiny[1][1] else y + 0.1))
    with pytest.raises(Red, match=f"value 0.*error|{sweep.bench.shape(sweep.tiny[1])}"):
        run.sweep(sweep, sweep.tiny[0])
    assert run.result().allowed() == []


def test_a_sweep_goes_along_one_size() -> None:
    for sweep in table.SWEEPS:
        for sizes in (sweep.sizes, sweep.tiny):
            along = [s[sweep.at] for s in sizes]
            assert along == sorted(set(along))
            assert all(len(s) == 2 for s in sizes)
            other = {s[1 - sweep.at] for s in sizes}
            assert len(other) == 1 or len({s[0] * s[1] for s in sizes}) == 1


def test_each_measured_width_passes_the_gate() -> None:
    for bench in table.ALL:
        for sizes in bench.sizes:
            assert bench.gate_sizes(sizes)[1:] == sizes[1:]
            assert 1 <= bench.gate_sizes(sizes)[0] <= sizes[0]


# --- what is compared -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bench", [pytest.param(b, id=b.op) for b in table.present()])
def test_peers_compute_the_same(bench: Bench) -> None:
    """A comparison with something else would not be one. On the same seed, in fp32; outputs in the same order."""
    found = {}
    for provider, fn in (peers.uncompiled(bench.op, CPU) | peers.donating(bench.op)).items():
        inputs = bench.make(*bench.tiny)(Maker(CPU, FP32))
        leaves = [t.requires_grad_() for k, t in inputs.items() if t is not None and k in TABLES[bench.op].diff]
        args = inputs.values() if provider != DONATE else [t.clone() if t is not None and t.requires_grad else t for t in inputs.values()]
        y = fn(*args, **bench.options(*bench.tiny))
        ys = y if isinstance(y, tuple) else (y,)
        make = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(t.shape, generator=make) for t in ys]
        found[provider] = [*(t.detach() for t in ys), *torch.autograd.grad(ys, leaves, cotangents)]
    for each in found.values():
        torch.testing.assert_close(each, found[OURS], rtol=1e-4, atol=1e-5)


def test_inputs_are_the_functions_arguments_in_order() -> None:
    for bench in table.present():
        inputs, options = list(bench.make(*bench.tiny)(Maker(CPU, FP32))), bench.options(*bench.tiny)
        assert [k for k in inspect.signature(getattr(liger_fn, bench.op)).parameters if k not in options][: len(inputs)] == inputs


def test_rope_is_measured_on_transposed_views() -> None:
    inputs = bench_of("rope").make(1, 8, 4, 2, 16)(Maker(CPU, FP32))
    assert inputs["q"] is not None
    assert inputs["q"].shape == (1, 4, 8, 16)
    assert not inputs["q"].is_contiguous()


@pytest.mark.parametrize(
    ("op", "sizes", "mode", "least"),
    [
        ("rms_norm", (8192, 4096), FORWARD, 2 * 2 * 8192 * 4096),
        ("rms_norm", (8192, 4096), BOTH, 5 * 2 * 8192 * 4096),
        ("add_rms_norm", (8192, 4096), BOTH, 8 * 2 * 8192 * 4096),
        ("rope", (4, 4096, 32, 8, 128), BOTH, 4 * 2 * 4 * 4096 * 40 * 128),
        ("cross_entropy", (8192, 128256), BOTH, 3 * 2 * 8192 * 128256),
    ],
)
def test_least_bytes(op: str, sizes: table.Sizes, mode: str, least: int) -> None:
    assert sizes in bench_of(op).sizes
    assert bench_of(op).least_bytes(sizes, mode) == least
    assert bench_of(op).least_flops(sizes, mode) == 0


def test_least_flops() -> None:
    head = bench_of("linear_cross_entropy")
    assert [head.least_flops((8, 4, 100), mode) for mode in table.MODES] == [2 * 8 * 4 * 100, 6 * 8 * 4 * 100]
    assert head.least_bytes((8, 4, 100), BOTH) == 0


def test_least_work_counts_no_options() -> None:
    assert bench_of("group_norm").least_bytes((8, 320, 64, 64, 32), FORWARD) == 2 * 2 * 8 * 320 * 64 * 64
    assert bench_of("swiglu_mlp").least_flops((8, 4, 100), BOTH) == 9 * 2 * 8 * 4 * 100


def test_a_losss_cotangent_is_one() -> None:
    """As in `loss.backward()`: a peer that skips a pass then may skip it here."""
    x = torch.randn(3, requires_grad=True)
    (dx,) = measure.forward_backward(lambda x: (2 * x).sum(), (x,))()
    assert torch.equal(dx, torch.full((3,), 2.0))
    y = measure.forward(lambda x: 2 * x, (x,))()
    assert not y.requires_grad


# --- what goes wrong --------------------------------------------------------------------------------------------------------------------


def test_a_peers_fault_is_a_note_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    run, bench = Run(CPU), bench_of("swiglu")

    def fails(*_: Any) -> None:
        raise RuntimeError("no such GPU\nat great length")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    found = {OURS: liger_fn.swiglu, EAGER: full, LIGER: fails}
    monkeypatch.setattr(peers, "providers", lambda *_: found)
    monkeypatch.setattr(peers, "uncompiled", lambda *_: found)
    rows = {(r.provider, r.mode): r for r in [*run.speed(bench, bench.tiny), *run.host(bench)]}
    assert rows[OURS, BOTH].us
    for mode in table.MODES:
        assert (rows[EAGER, mode].us, rows[EAGER, mode].note) == (None, "out of memory")
    for mode in (*table.MODES, HOST):
        assert (rows[LIGER, mode].us, rows[LIGER, mode].note) == (None, "failed: RuntimeError: no such GPU")

    found[OURS] = fails
    with pytest.raises(RuntimeError, match="no such GPU"):
        run.speed(bench, bench.tiny)
