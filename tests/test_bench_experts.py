"""The benchmark of a mixture's experts: what is measured, what it is measured against, and what the page says of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import liger_fn
from tests.bench import bars, experts, measure, peers, report, results
from tests.bench.bars import BEST
from tests.bench.experts import MIXTURES, OP, TINY, Truth
from tests.bench.peers import EAGER, GROUPED, HAND, LIGER, MINE, OURS, RECOMPUTE
from tests.bench.results import GREEN, Result, Row
from tests.bench.run import Red, Run
from tests.bench.table import BOTH, EXPERTS_BOTH, EXPERTS_SKEWED
from tests.cases import BF16, Maker

CPU = torch.device("cpu")
MACHINE = {"device": "Some GPU (80 GB)", "torch": "2.0.0+cu1", "date": "2000-01-02", "sources": "a"}
FIRST, MIXTRAL, DEEPSEEK, FEW = MIXTURES


@pytest.fixture(autouse=True)
def plain() -> Iterator[None]:
    """The harness is tried here; `make bench` without a GPU tries it over the kernels."""
    with liger_fn.use_backend("reference"):
        yield


def test_gate_figures_json_and_page(tmp_path: Path) -> None:
    run = Run(CPU)
    for mixture in experts.mixtures(CPU):
        experts.speed(run, mixture)
    path = results.save(run.result(), tmp_path / "results")
    result = results.load(path)
    report.write(tmp_path / "results", tmp_path / "docs")

    assert result.gates == {OP: GREEN}
    assert all(r.us and r.floor_us for r in result.rows)
    assert {(r.mode, r.provider) for r in result.rows if r.shape == TINY[0].label} == {
        *((EXPERTS_BOTH, p) for p in (OURS, RECOMPUTE, EAGER, GROUPED, HAND)),
        *((EXPERTS_SKEWED, p) for p in (OURS, RECOMPUTE, GROUPED, HAND)),
    }
    for r in result.rows:
        assert (r.over_balanced is not None) == (r.mode == EXPERTS_SKEWED)
        assert (r.ours_over_this is not None) == (r.provider not in MINE)
        assert bool(r.bytes) != bool(r.flops) == (r.shape == TINY[0].label)
    section = (tmp_path / "docs" / "benchmarks.md").read_text().split("### The experts of a mixture\n")[1]
    assert f"| {TINY[0].label}, skewed | liger_fn recompute | " in section
    assert f"| {TINY[1].label} | torch._grouped_mm (2) | " in section
    assert "\n(1) transformers' loop over the experts\n\n(2) with sorting" in section


# --- what is measured -------------------------------------------------------------------------------------------------------------------


def test_half_of_the_tokens_choose_one_expert_if_skewed() -> None:
    for skewed in (False, True):
        found = experts.make(64, 8, 3, 4, 2, skewed)(Maker(CPU, BF16))
        index, weight = found["topk_index"], found["topk_weight"]
        assert index is not None
        assert weight is not None
        assert all(len(set(row)) == 3 for row in index.tolist())
        assert (index.min(), index.max()) == (0, 7)
        assert weight.dtype == torch.float32
        assert ((index == 0).any(1) == torch.tensor([True, False] * 32)).all() == skewed
    assert {k: tuple(t.shape) for k, t in found.items() if t is not None} == {
        "x": (64, 4), "gate_up": (8, 4, 4), "down": (8, 4, 2), "topk_index": (64, 3), "topk_weight": (64, 3),
    }  # fmt: skip


def test_the_floor_is_the_dense_products_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    t, _, k, h, i = TINY[0].sizes
    p, done, mm = t * k, [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: done.append((*a.shape, b.shape[1])) or mm(a, b, out=out))
    experts.products(TINY[0], CPU)()
    assert done == [(p, h, 2 * i), (p, i, h), (p, h, i), (p, 2 * i, h), (2 * i, p, h), (h, p, i)]
    assert experts.least(TINY[0]) == {"flops": 2 * sum(a * b * c for a, b, c in done)}


def test_of_few_tokens_the_floor_is_three_passes_over_the_weights() -> None:
    run = Run(CPU)
    run.limits = {"copy_gbs": 1.0}
    _, e, _, h, i = TINY[1].sizes
    rows = experts.speed(run, TINY[1])
    passes = 3 * 2 * sum(t.numel() for t in (torch.empty(e, 2 * i, h), torch.empty(e, h, i)))
    assert {(r.bytes, r.floor_us) for r in rows} == {(passes, passes / 1e3)}
    assert FEW.by_weights


def test_the_gate_keeps_the_widths_and_the_tokens_of_an_expert() -> None:
    for m in MIXTURES:
        (t, e, k, *widths), (few_t, few_e, few_k, *few_widths) = m.sizes, m.small
        assert (few_k, few_widths, few_t * few_k / few_e) == (k, widths, t * k / e)
        assert few_e > few_k
        numbers = 3 * few_e * widths[0] * widths[1]
        assert 8 * 2 * numbers < 12 * 2**30, "fp64 weights and gradients leave no room"
        assert [s[-1] for s in experts.bench(m).sizes] == list(m.routings)
    assert [m.routings for m in MIXTURES] == [(False, True), (False, True), (False,), (False,)]


def test_slow_providers_and_those_that_tune_are_asked_where_that_is_told() -> None:
    asked = {(shape, mode) for _, shape, mode, provider in experts.measured() if provider == EAGER}
    assert asked == {(m.label, EXPERTS_BOTH) for m in (FIRST, MIXTRAL)}
    tuned = {shape for _, shape, _, provider in experts.measured() if provider == LIGER}
    assert tuned == {FIRST.label, MIXTRAL.label}
    assert {p for _, shape, _, p in experts.measured() if shape == DEEPSEEK.label} == {OURS, RECOMPUTE, GROUPED, HAND}


def test_what_is_timed_must_be_captured_if_it_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    def timed(run: measure.Run, device: torch.device, *, must_capture: bool, replays: tuple[int, int]) -> measure.Timed:
        told.append(must_capture)
        return measure.Timed(3.0 if len(told) % 2 else 6.0, not must_capture)

    monkeypatch.setattr(measure, "device_us", timed)
    monkeypatch.setattr(measure, "peak_mib", lambda call, device: 7.0)
    rows = experts._rows(Run(CPU), TINY[0], False, TINY[0].names(False))
    assert told == [x for r in rows for x in (True, r.provider in MINE)]  # the floor, and then the provider
    assert {(r.us, r.floor_us, r.over_floor, r.mib) for r in rows} == {(6.0, 3.0, 2.0, 7.0)}
    assert [r.by_events for r in rows] == [r.provider not in MINE for r in rows]


def test_a_provider_that_tunes_itself_does_so_at_the_sizes_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fn(x: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        asked.append(len(x))
        return liger_fn.moe_experts(x, *args, **more)

    monkeypatch.setattr(peers, "experts", lambda device: {OURS: fn})
    experts._rows(Run(CPU), TINY[1], False, (OURS,))
    (tokens, *_), (few, *_) = TINY[1].sizes, TINY[1].small
    assert asked[:3] == [tokens, tokens, few]  # for cotangents, with its backward, and beside fp64
    assert set(asked[3:]) == {tokens}


# --- what is compared -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skewed", [False, True])
def test_every_provider_computes_the_same(skewed: bool) -> None:
    truth, found = Truth(TINY[0], skewed, CPU), peers.experts(CPU)
    assert list(found) == [OURS, RECOMPUTE, EAGER, GROUPED, HAND]
    assert {name: truth.wrong(fn) for name, fn in found.items()} == dict.fromkeys(found, "")


def test_liger_kernel_takes_the_same_arguments_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        class LigerFusedMoEFunction:
            apply = staticmethod(lambda x, gate_up, down, index, weight: liger_fn.moe_experts(x, gate_up, down, index, weight))

    for name in ("liger_kernel", "liger_kernel.ops", "liger_kernel.ops.fused_moe"):
        monkeypatch.setitem(sys.modules, name, Module())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "liger_kernel")
    assert Truth(TINY[0], False, CPU).wrong(peers.liger_experts) == ""
    assert LIGER not in peers.experts(CPU)
    assert list(peers.experts(torch.device("cuda"))) == [OURS, RECOMPUTE, HAND, LIGER]


@pytest.mark.parametrize(("which", "says"), [("y", "y is off by"), ("topk_weight", "dtopk_weight is off by"), ("nan", "y is off by nan")])
def test_what_is_off_is_said(which: str, says: str) -> None:
    def fn(*, topk_weight: torch.Tensor, **more: Any) -> torch.Tensor:
        weight = topk_weight if which != "topk_weight" else topk_weight + 0.1 * (topk_weight - topk_weight.detach())
        y = liger_fn.moe_experts(topk_weight=weight, **more)
        return y * {"y": 1.05, "nan": float("nan")}.get(which, 1.0)

    assert Truth(TINY[0], False, CPU).wrong(fn).startswith(says)


def test_a_wrong_provider_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer's row says so; ours takes all figures back."""
    found, timed = peers.experts(CPU), []
    monkeypatch.setattr(peers, "experts", lambda device: found)
    monkeypatch.setattr(measure, "device_us", lambda *_, **__: timed.append(1) or measure.Timed(1.0))
    monkeypatch.setattr(experts, "products", lambda *_: lambda: None)
    good = dict(found)
    found |= {name: (lambda *a, f=good[name], **k: 1.1 * f(*a, **k)) for name in (GROUPED,)}
    run = Run(CPU)
    rows = {r.provider: r for r in experts.speed(run, replace(TINY[0], skewed=False))}
    assert rows[GROUPED].us is None
    assert rows[GROUPED].note.startswith("failed: Wrong: y is off by 0.1")
    assert rows[HAND].us
    assert len(timed) == 2 * (len(found) - 1)
    found[RECOMPUTE] = lambda *a, **k: 1.1 * good[RECOMPUTE](*a, **k)
    with pytest.raises(Red, match="moe_experts: no figures, its gate is red: liger_fn recompute: y is off by"):
        experts.speed(run, replace(TINY[0], skewed=False))
    assert run.result().allowed() == []


def test_a_wrong_function_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rule of numerics, not by the wide one for peers."""
    op = liger_fn.moe_experts

    class Wrong:
        reference = op.reference

        def __call__(self, *args: Any, **options: Any) -> Any:
            return 1.01 * op(*args, **options)

    monkeypatch.setattr(liger_fn, OP, Wrong())
    with pytest.raises(Red, match="moe_experts: no figures, its gate is red"):
        experts.speed(Run(CPU), TINY[1])


def test_a_peers_fault_is_a_note_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    found = peers.experts(CPU) | {HAND: full}
    monkeypatch.setattr(peers, "experts", lambda device: found)
    rows = {(r.mode, r.provider): r for r in experts.speed(Run(CPU), TINY[0])}
    for mode in (EXPERTS_BOTH, EXPERTS_SKEWED):
        row = rows[mode, HAND]
        assert (row.us, row.over_balanced, row.note) == (None, None, "out of memory")
        assert rows[mode, GROUPED].us


# --- bars and page ----------------------------------------------------------------------------------------------------------------------


def _row(m: experts.Mixture, mode: str, provider: str, us: float | None, mib: float | None = None, **more: Any) -> Row:
    return Row(OP, m.label, mode, provider, us, flops=2 * 10**9, floor_us=None if us is None else 1000.0, mib=mib, **more)


ROWS = [
    _row(FIRST, EXPERTS_BOTH, OURS, 1400.0, 200.0),
    _row(FIRST, EXPERTS_BOTH, RECOMPUTE, 1000.0, 100.0, ours_over_this=2.0, ours_mib_over_this=3.0),  # no peer
    _row(FIRST, EXPERTS_BOTH, EAGER, None, note="failed: x"),
    _row(FIRST, EXPERTS_BOTH, GROUPED, 2000.0, 190.0, ours_over_this=0.7, ours_mib_over_this=1.053),
    _row(FIRST, EXPERTS_BOTH, HAND, 1500.0, 400.0, ours_over_this=0.933, ours_mib_over_this=0.5, by_events=True),
    _row(FIRST, EXPERTS_SKEWED, OURS, 1700.0, 200.0, over_balanced=1.214),
    _row(FIRST, EXPERTS_SKEWED, HAND, 1600.0, 400.0, over_balanced=1.067, ours_over_this=1.0625),
    _row(MIXTRAL, EXPERTS_BOTH, OURS, 1200.0, 200.0),
]


@pytest.mark.parametrize(
    ("m", "mode", "provider", "what", "says", "met"),
    [
        (FIRST, EXPERTS_BOTH, BEST, "ours_over_this", "≤ 0.90 liger_fn ÷ this | 0.93", "**no**"),
        (FIRST, EXPERTS_BOTH, BEST, "ours_mib_over_this", "≤ 1.00 liger_fn ÷ this, MiB | 1.05", "**no**"),
        (FIRST, EXPERTS_BOTH, OURS, "over_floor", "≤ 1.43 ÷ floor | 1.40", "yes"),
        (FIRST, EXPERTS_SKEWED, OURS, "over_balanced", "≤ 1.30 ÷ balanced | 1.21", "yes"),
        (MIXTRAL, EXPERTS_BOTH, OURS, "over_floor", "≤ 1.15 ÷ floor | 1.20", "**no**"),
        (MIXTRAL, EXPERTS_SKEWED, OURS, "over_balanced", "≤ 1.30 ÷ balanced | not measured", "–"),
    ],
)
def test_the_bars_of_the_experts(m: experts.Mixture, mode: str, provider: str, what: str, says: str, met: str) -> None:
    (verdict,) = (v for v in bars.verdicts(ROWS) if v.bar[:5] == (OP, m.label, mode, provider, what))
    assert " | ".join(bars.cells(verdict)[4:]) == f"{says} | {met}"
    assert sum(b.op == OP for b in bars.every()) == 6


def test_the_page_has_the_experts() -> None:
    text = report.page({"stem": Result(MACHINE, {}, {OP: GREEN}, ROWS)})
    faster = text.split("### Where a peer is faster")[1].split("\n### ")[0]
    assert "In 1 of 2 comparisons" in faster
    assert f"| `{OP}` | {FIRST.label} | experts: skewed | torch._grouped_mm | 1,600 | 1,700 | × 1.06 |" in faster
    less = text.split("### Where a peer needs less memory")[1].split("\n### ")[0]
    assert f"| `{OP}` | {FIRST.label} | experts | transformers grouped_mm | 190 | 200 | × 1.05 |" in less
    section = text.split("### The experts of a mixture\n")[1]
    for line in (
        f"- {MIXTRAL.label}: Mixtral 8x7B\n",
        f"| {FIRST.label} | liger_fn | 1.40 | 1.4 TFLOP/s | 1.40 | – | 200 | – | – |",
        f"| {FIRST.label} | eager (1) | – | – | – | – | – | – | – |",
        f"| {FIRST.label} | torch._grouped_mm (2) | 1.50 | 1.3 TFLOP/s | 1.50 | – | 400 | × 0.93 | × 0.50 |",
        f"| {FIRST.label}, skewed | torch._grouped_mm | 1.60 | 1.2 TFLOP/s | 1.60 | 1.07 | 400 | × 1.06 | – |",
        "\n(1) failed: x\n\n(2) timed by events",
    ):
        assert line in section
    assert DEEPSEEK.label not in section
    assert f"### `{OP}`" not in text  # that table is of the other passes


def test_a_run_without_experts_says_nothing_of_them() -> None:
    rows = [Row("swiglu", "8192x14336", BOTH, OURS, 1.0, floor_us=1.0)]
    text = report.page({"stem": Result(MACHINE, {}, {"swiglu": GREEN}, rows)})
    assert "### The bars" in text
    assert OP not in text
    assert "experts" not in text


def test_what_tunes_itself_is_compared_with_what_was_measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured by itself, with ours where that was not; beside it stands how ours compares, and the other rows stay."""
    found = peers.experts(CPU)
    monkeypatch.setattr(peers, "experts", lambda device: found | {LIGER: found[EAGER]})
    mixture = replace(TINY[0], by=(OURS, EAGER, LIGER), skewed=False)
    for before in ((OURS, EAGER), ()):
        run = Run(CPU)
        if before:
            assert [r.provider for r in experts.speed(run, mixture)] == list(before)
        rows = {r.provider: r for r in experts.speed(run, mixture, tuning=True)}
        assert list(rows) == [*(before or (OURS,)), LIGER]
        assert rows[LIGER].ours_over_this == rows[OURS].over_floor / rows[LIGER].over_floor
        assert [r.provider for r in run.rows] == list(rows)
