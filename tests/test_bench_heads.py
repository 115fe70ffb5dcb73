"""The benchmark of the heads: what is measured, what it is measured against, and what the page says of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import liger_fn
from tests.bench import bars, heads, measure, peers, report, results
from tests.bench.heads import ALONE, FROZEN, HALF, OP, WHOLE
from tests.bench.peers import CCE, COMPILE, EAGER, EXACT, EXACT_64, FP32, LIGER, LIGER_FP32, OURS, RECOMPUTE, WEIGHT, WEIGHT_64
from tests.bench.results import GREEN, Result, Row
from tests.bench.run import Red, Run, compared
from tests.bench.table import HEAD_BOTH, HEAD_ERRORS, HEAD_FORWARD, HEAD_FROZEN, HEAD_HALF, HEAD_SWEEP
from tests.cases import Maker

CPU = torch.device("cpu")
FIRST = heads.TINY[0]
MACHINE = {"device": "Some GPU (80 GB)", "torch": "2.0.0+cu1", "date": "2000-01-02", "sources": "a"}


@pytest.fixture(autouse=True)
def plain() -> Iterator[None]:
    """The harness is tried here; `make bench` without a GPU tries it over the kernels."""
    with liger_fn.use_backend("reference"):
        yield


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose gate need not be asked."""
    run = Run(CPU)
    run.gates[OP] = GREEN
    monkeypatch.setattr(heads, "gate", lambda run: None)
    return run


# --- the whole chain --------------------------------------------------------------------------------------------------------------------


def test_gate_figures_json_and_page(tmp_path: Path) -> None:
    run = Run(CPU)
    for sizes in heads.shapes(CPU):
        heads.speed(run, sizes)
    heads.options(run)
    for n in heads.tokens(CPU):
        heads.by_tokens(run, n)
    heads.errors(run)
    path = results.save(run.result(), tmp_path / "results")
    result = results.load(path)
    report.write(tmp_path / "results", tmp_path / "docs")

    assert result.gates == {OP: GREEN}
    timed = [r for r in result.rows if r.mode != HEAD_ERRORS]
    assert all(r.us and r.floor_us and r.flops and not r.note for r in timed)
    first = heads.label(FIRST)
    mine = {(r.mode, r.provider) for r in timed if r.shape == first and r.provider in peers.MINE}
    of_whole = {(HEAD_BOTH, p) for p in (OURS, WEIGHT, FP32, EXACT, RECOMPUTE, WEIGHT_64, EXACT_64)}
    assert mine == of_whole | {(HEAD_HALF, OURS), (HEAD_HALF, WEIGHT), (HEAD_FORWARD, OURS), (HEAD_FROZEN, OURS)}
    along = {(r.size, r.provider) for r in timed if r.mode == HEAD_SWEEP}
    assert along == {(n, p) for n in heads.TINY_TOKENS for p in (OURS, WEIGHT, EXACT)}
    errors = {r.provider: r.errors for r in result.rows if r.mode == HEAD_ERRORS}
    assert errors.keys() == {OURS, WEIGHT, FP32, EXACT, EAGER}
    for each in errors.values():
        assert each is not None
        assert each.keys() == {"loss", "dx", "dweight", "lse", "log_prob"}
        assert all(0 < e < 0.01 for e in each.values())
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    section = text.split("### Linear cross entropy: the head\n")[1]
    assert f"| {first} | liger_fn recompute | " in section
    assert f"| {first} | half ignored | liger_fn weight | " in section
    assert f"Errors at {first}" in section
    (figure,) = (tmp_path / "docs" / "figures").iterdir()
    assert figure.name == f"bench-{path.stem}-heads.png"
    assert f"(figures/{figure.name})" in text


def test_a_red_way_to_sum_takes_all_figures_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is judged, not the default alone."""
    op, run = liger_fn.linear_cross_entropy, Run(CPU)
    heads.speed(run, FIRST)
    assert run.result().allowed()

    class Wrong:
        reference = op.reference

        def __call__(self, *args: Any, **options: Any) -> Any:
            y = op(*args, **options)
            return 1.1 * y if options.get("accumulate") == "exact" else y

    monkeypatch.setattr(liger_fn, OP, Wrong())
    run._judged.clear()
    for _ in range(2):
        with pytest.raises(Red, match="linear_cross_entropy: no figures"):
            heads.speed(run, FIRST)
    assert "accumulate=exact: AssertionError" in run.gates[OP]
    assert run.result().allowed() == []


def test_each_measured_width_passes_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    run = Run(CPU)
    monkeypatch.setattr(run, "_judge", lambda bench, sizes: asked.append((sizes, bench.options(*sizes))))
    monkeypatch.setattr("tests.bench.table.sizes", lambda bench, device: bench.sizes)
    heads.gate(run)
    assert {sizes[1:] for sizes, options in asked if not options} == {s[1:] for s in heads.SHAPES}
    assert heads.WIDTH in {s[1:] for s in heads.SHAPES}
    assert [options for _, options in asked if options] == [{"accumulate": "fp32"}, {"accumulate": "exact"}]
    heads.gate(run)
    assert len(asked) == len({s[1:] for s in heads.SHAPES}) + 2


# --- what is measured -------------------------------------------------------------------------------------------------------------------


def test_inputs_are_what_the_question_says() -> None:
    x, weight, target = heads.inputs(CPU, (6, 4, 10), HALF)
    assert (x.shape, weight.shape, target.shape) == ((6, 4), (10, 4), (6,))
    assert (x.requires_grad, weight.requires_grad) == (True, True)
    assert int((target == -100).sum()) == 3
    assert [t.requires_grad for t in heads.inputs(CPU, (6, 4, 10), FROZEN)] == [True, False, False]
    assert [t.requires_grad for t in heads.inputs(CPU, (6, 4, 10), ALONE)] == [False, False, False]
    assert int((heads.inputs(CPU, (6, 4, 10), WHOLE)[2] < 0).sum()) == 0


@pytest.mark.parametrize(("count", "share"), [(1, 1.0), (2, 1.0), (3, 1.0), (3, 4.0)])
def test_the_floor_is_the_products_of_the_shape(monkeypatch: pytest.MonkeyPatch, count: int, share: float) -> None:
    """Of all rows; of a part, and as often as it takes, where their logits are too many."""
    n, h, v = 8, 3, 10
    monkeypatch.setattr(heads, "LOGITS", int(n * v * 2 / share))
    x, weight, _ = heads.inputs(CPU, (n, h, v))
    done, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: done.append((*a.shape, b.shape[1])) or mm(a, b, out=out))
    run, times = heads.products(x, weight, count)
    run()
    m = int(n / share)
    assert done == [(m, h, v), (m, v, h), (v, m, h)][:count]
    assert times == share


def test_turns_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    """One disturbed turn moves neither."""
    clock, order = iter([1.0, 10.0, 50.0, 12.0, 2.0, 90.0]), []
    monkeypatch.setattr(heads, "_once", lambda run, device: order.append(run) or next(clock))
    first, second = (lambda: None), (lambda: None)
    assert heads.in_turns((first, second), torch.device("cuda"), 3) == [2.0, 12.0]
    assert order == [first, second] * 3


def test_on_a_gpu_a_turn_lies_between_events_around_a_plain_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(run: measure.Run, renew: measure.Run, n: int, *, by_events: bool) -> list[float]:
        assert (n, by_events) == (1, True)
        run()
        return [2.0]

    done: list[int] = []
    monkeypatch.setattr(measure, "_times", times)
    assert heads._once(lambda: done.append(1), torch.device("cuda")) == 2000.0
    assert done == [1]


@pytest.mark.parametrize(("question", "gradients"), [(WHOLE, "both"), (FROZEN, "x"), (ALONE, "none")])
def test_workspace_is_the_peak_over_the_gradients(
    monkeypatch: pytest.MonkeyPatch, judged: Run, question: heads.Question, gradients: str
) -> None:  # fmt: skip
    n, h, v = FIRST
    monkeypatch.setattr(measure, "peak_mib", lambda run, device: run() and 100.0)
    row = heads._rows(judged, FIRST, question, (OURS,))[0]
    size = {"both": n * h + v * h, "x": n * h, "none": 0}[gradients] * 2 / 2**20
    assert row.mib == pytest.approx(100.0 - size, abs=1e-9)
    assert row.flops == 2 * n * h * v * {"both": 3, "x": 2, "none": 1}[gradients]


def test_the_gradients_that_are_asked_for_are_made() -> None:
    x, weight, _ = args = heads.inputs(CPU, FIRST)
    found = heads._with_gradients(lambda *a: F.cross_entropy((a[0] @ a[1].T).float(), a[2]), args)()
    assert [g.shape for g in found] == [x.shape, weight.shape]
    (dx,) = heads._with_gradients(lambda *a: F.cross_entropy((a[0] @ a[1].T).float(), a[2]), heads.inputs(CPU, FIRST, FROZEN))()
    assert dx.shape == x.shape


def test_a_part_of_the_rows_counts_for_all(monkeypatch: pytest.MonkeyPatch, judged: Run) -> None:
    monkeypatch.setattr(heads, "products", lambda *_: (lambda: None, 4.0))
    monkeypatch.setattr(heads, "in_turns", lambda *_: [10.0, 80.0])
    (row,) = heads._rows(judged, FIRST, WHOLE, (OURS,))
    assert (row.floor_us, row.us, row.over_floor) == (40.0, 80.0, 2.0)


def test_a_peers_fault_is_a_note_in_its_row(monkeypatch: pytest.MonkeyPatch, judged: Run) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such GPU\nat great length")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    found = peers.heads(CPU) | {EAGER: full, LIGER: fails}
    monkeypatch.setattr(peers, "heads", lambda device: found)
    monkeypatch.setattr(peers, "head_rows", lambda device: dict.fromkeys(found, peers._head_rows))
    rows = {r.provider: r for r in heads.speed(judged, FIRST)}
    assert rows[OURS].us
    assert (rows[EAGER].us, rows[EAGER].note) == (None, "out of memory")
    assert (rows[LIGER].us, rows[LIGER].note) == (None, "failed: RuntimeError: no such GPU")
    assert {r.provider: r.note for r in heads.errors(judged)}[LIGER] == "failed: RuntimeError: no such GPU"
    found[WEIGHT] = fails
    with pytest.raises(RuntimeError, match="no such GPU"):
        heads.speed(judged, FIRST)
    with pytest.raises(RuntimeError, match="no such GPU"):
        heads.errors(judged)


def test_beside_a_peer_stands_how_ours_compares() -> None:
    """Over its own floor each: the floor of a hot GPU is slower."""
    row = Row(OP, "s", HEAD_BOTH, OURS, 30.0, floor_us=20.0, mib=200.0)
    rows = [row, replace(row, provider=EXACT), replace(row, provider=LIGER_FP32, us=60.0, floor_us=30.0, mib=400.0)]
    ours, exact, theirs = compared([*rows])
    assert (ours, exact) == tuple(rows[:2])
    assert (theirs.ours_over_this, theirs.ours_mib_over_this) == (0.75, 0.5)


def test_the_largest_shapes_are_not_compiled() -> None:
    assert [COMPILE in heads.asked(s) for s in heads.SHAPES] == [True, True, True, False, True]
    assert [EAGER in heads.asked(s) for s in heads.SHAPES] == [True, False, False, False, True]
    assert [COMPILE in heads.asked_by_tokens(n) for n in heads.TOKENS] == [True, True, True, False, False]
    assert heads.TOKENS == (1024, 4096, 16384, 65536, 262144)


# --- what is compared -------------------------------------------------------------------------------------------------------------------


def test_every_provider_computes_the_same() -> None:
    m = Maker(CPU, torch.float32)
    x, weight, target = m.normal(6, 8).requires_grad_(), m.normal(20, 8, scale=0.3).requires_grad_(), m.targets(6, classes=20, every=0)
    found = {}
    for name, fn in peers.heads(CPU).items():
        loss = fn(x, weight, target)
        found[name] = [loss.detach(), *torch.autograd.grad(loss, (x, weight))]
    assert found.keys() >= {OURS, WEIGHT, FP32, EXACT, RECOMPUTE, WEIGHT_64, EXACT_64, EAGER}
    for each in found.values():
        torch.testing.assert_close(each, found[OURS], rtol=1e-4, atol=1e-6)
    rows = {name: fn(x.detach(), weight.detach(), target) for name, fn in peers.head_rows(CPU).items()}
    assert rows.keys() == {OURS, WEIGHT, FP32, EXACT, EAGER}
    for lse, log_prob in rows.values():
        torch.testing.assert_close([lse, -log_prob.mean()], [rows[OURS][0], found[OURS][0]], rtol=1e-4, atol=1e-6)


def test_liger_kernel_is_told_how_to_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments go by position."""
    names = (
        "x", "weight", "target", "bias", "ce_weight", "ignore_index", "lse_square_scale", "label_smoothing", "reduction", "softcap",
        "return_z_loss", "accum_dtype",
    )  # fmt: skip
    told: list[dict[str, Any]] = []

    class Function:
        @staticmethod
        def apply(*args: Any) -> tuple[Any, ...]:
            told.append(dict(zip(names, args, strict=True)))
            return "loss", None

    class Module:
        LigerFusedLinearCrossEntropyFunction = Function

    monkeypatch.setitem(sys.modules, "liger_kernel", Module())
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", Module())
    assert peers._liger_head(torch.float32)(1, 2, 3) == "loss"
    assert peers._liger_head(None, "none")(1, 2, 3) == "loss"
    assert [(t["accum_dtype"], t["reduction"]) for t in told] == [(torch.float32, "mean"), (None, "none")]
    assert all((t["x"], t["weight"], t["target"], t["ignore_index"], t["return_z_loss"]) == (1, 2, 3, -100, False) for t in told)


def test_truth_is_fp64_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """In slices, as of the whole."""
    monkeypatch.setattr(heads, "SLICE", 3)
    monkeypatch.setattr(heads, "COMPARED_ROWS", 5)
    monkeypatch.setattr(heads, "COMPARED_CLASSES", 7)
    x, weight, target = heads.inputs(CPU, (8, 4, 10))
    found = heads.truth(x, weight, target)
    wide, w = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = wide @ w.T
    loss = F.cross_entropy(logits, target)
    dx, dweight = torch.autograd.grad(loss, (wide, w), retain_graph=True)
    wanted = {"loss": loss, "dx": dx[:5], "dweight": dweight[:7], "lse": logits.logsumexp(-1)}
    wanted["log_prob"] = -F.cross_entropy(logits, target, reduction="none")
    assert found.keys() == wanted.keys()
    for k, t in wanted.items():
        torch.testing.assert_close(found[k], t.detach(), rtol=1e-12, atol=1e-14)


def test_an_error_is_relative() -> None:
    true = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert heads.error(torch.tensor([3.0, 4.1]), true) == 0.02


# --- files, bars and page ---------------------------------------------------------------------------------------------------------------


def _row(mode: str, provider: str, us: float | None, mib: float | None = None, **more: Any) -> Row:
    return Row(OP, heads.label(heads.SHAPES[0]), mode, provider, us, mib=mib, floor_us=None if us is None else 1000.0, **more)


ROWS = [
    _row(HEAD_BOTH, OURS, 1110.0, 200.0),
    _row(HEAD_BOTH, WEIGHT, 1100.0, 257.0),
    _row(HEAD_BOTH, WEIGHT_64, 1830.0, 64.0),
    _row(HEAD_BOTH, COMPILE, 1080.0, 2004.0, ours_over_this=1.028, ours_mib_over_this=0.1),
    _row(HEAD_BOTH, LIGER_FP32, 1900.0, 190.0, ours_over_this=0.584, ours_mib_over_this=1.053),
    _row(HEAD_HALF, WEIGHT, 600.0, 100.0),
    _row(HEAD_FORWARD, OURS, 1200.0, 100.0),
    _row(HEAD_BOTH, CCE, None, note="failed: x"),
    _row(HEAD_ERRORS, OURS, None, errors={"dx": 0.00123, "loss": 1.2e-08}),
    _row(HEAD_ERRORS, CCE, None, errors={"dx": 0.5}),
    *(Row(OP, f"{n}x2048x128256", HEAD_SWEEP, p, 2.0 * n, floor_us=1.0 * n, mib=9.0, size=n) for n in (4096, 1024) for p in (OURS, LIGER)),
]


def test_rows_survive_the_file_and_a_second_run(tmp_path: Path) -> None:
    first = Result(MACHINE, {}, {OP: GREEN}, ROWS)
    path = results.save(first, tmp_path)
    assert results.load(path).rows == ROWS
    again = replace(next(r for r in ROWS if r.mode == HEAD_ERRORS), errors={"dx": 0.25})
    assert results.save(replace(first, rows=[again]), tmp_path) == path
    found = {r.key: r for r in results.load(path).rows}
    assert len(found) == len(ROWS)
    assert found[again.key].errors == {"dx": 0.25}


def test_older_files_are_read() -> None:
    for path in results.FOLDER.glob("*.json"):
        assert all(r.errors is None or r.mode == HEAD_ERRORS for r in results.load(path).rows)


@pytest.mark.parametrize(
    ("mode", "provider", "what", "says", "met"),
    [
        (HEAD_BOTH, WEIGHT, "over_floor", "≤ 1.12 ÷ floor | 1.10", "yes"),
        (HEAD_BOTH, WEIGHT, "mib", "≤ 256 MiB | 257", "**no**"),
        (HEAD_BOTH, WEIGHT_64, "over_floor", "≤ 1.82 ÷ floor | 1.83", "**no**"),
        (HEAD_BOTH, LIGER_FP32, "ours_over_this", "≤ 0.75 liger_fn ÷ this | 0.58", "yes"),
        (HEAD_BOTH, LIGER_FP32, "ours_mib_over_this", "≤ 1.00 liger_fn ÷ this, MiB | 1.05", "**no**"),
        (HEAD_HALF, WEIGHT, "over_floor", "≤ 0.62 ÷ floor | 0.60", "yes"),
        (HEAD_FORWARD, OURS, "over_floor", "≤ 1.15 ÷ floor | 1.20", "**no**"),
        (HEAD_FROZEN, OURS, "mib", "≤ 256 MiB | not measured", "–"),
    ],
)
def test_the_bars_of_the_heads(mode: str, provider: str, what: str, says: str, met: str) -> None:
    (verdict,) = (v for v in bars.verdicts(ROWS) if v.bar[:5] == (*_row(mode, provider, 1.0).key, what))
    assert " | ".join(bars.cells(verdict)[4:]) == f"{says} | {met}"


def test_every_shape_has_its_bars() -> None:
    found = [b for b in bars.every() if b.op == OP and b.mode == HEAD_BOTH and b.provider != WEIGHT_64]
    assert [b.shape for b in found] == [heads.label(s) for s in heads.SHAPES for _ in range(7)]


def test_the_page_has_the_heads() -> None:
    result = Result(MACHINE, {}, {OP: GREEN}, ROWS)
    text = report.page({"stem": result})
    faster = text.split("### Where a peer is faster")[1].split("\n### ")[0]
    shape = heads.label(heads.SHAPES[0])
    assert f"| `{OP}` | {shape} | head | torch.compile | 1,080 | 1,110 | × 1.03 |" in faster
    less = text.split("### Where a peer needs less memory")[1].split("\n### ")[0]
    assert f"| `{OP}` | {shape} | head | liger-kernel fp32 | 190 | 200 | × 1.05 |" in less
    section = text.split("### Linear cross entropy: the head\n")[1]
    for line in (
        f"| {shape} | liger_fn | 1.11 | 1.110 | 200 | – | – |",
        f"| {shape} | torch.compile | 1.08 | 1.080 | 2,004 | × 1.03 | × 0.10 |",
        f"| {shape} | cut-cross-entropy (failed: x) | – | – | – | – | – |",
        f"| {shape} | half ignored | liger_fn weight | 0.60 | 0.600 | 100 |",
        "| shape | liger_fn | liger-kernel |\n| --- | --- | --- |\n| 1024x2048x128256 | 2.05 / 9 | 2.05 / 9 |\n| 4096x2048",
        "| provider | dx | loss |\n| --- | --- | --- |\n| liger_fn | 0.0012 | 1.2e-08 |\n| cut-cross-entropy | 0.5 | – |",
    ):
        assert line in section
    assert list(report.drawn(result)) == ["heads"]
    assert f"### `{OP}`" not in text  # that table is of graphs and of all memory


def test_the_plot_has_time_a_token_and_workspace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.bench import figures

    drawn: dict[str, dict[str, list[float]]] = {}

    def keep(figure: Any, title: str, path: Path) -> None:
        for axes in figure.axes:
            assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
            drawn[axes.get_title("left").split(",")[0]] = {line.get_label(): list(line.get_ydata()) for line in axes.lines}

    monkeypatch.setattr(figures, "_finish", keep)
    figures.heads(report.drawn(Result(MACHINE, {}, {OP: GREEN}, ROWS))["heads"], "title", tmp_path)
    time, workspace = drawn.values()
    assert time[OURS] == time[LIGER] == [2.0, 2.0]
    assert [1.0, 1.0] in time.values()  # the products
    assert workspace == {OURS: [9.0, 9.0], LIGER: [9.0, 9.0]}
    assert isinstance(figures.COLOURS[WEIGHT], str)
