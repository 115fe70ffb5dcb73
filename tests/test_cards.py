"""`make cards`: errors are those that the rule judges, a run is kept whole, and the page says what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cards import kept, measure, report
from tests.cards.measure import Line

CPU = torch.device("cpu")
MACHINE = {"device": "a GPU", "date": "2026-01-01", "torch": "2.0"}


def test_errors_are_in_roundings() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    off = torch.tensor([0.0, 4.0 * 2**-8], dtype=torch.float64)  # of bf16, u = 2⁻⁸
    line = measure._line("op", "value", "case", (truth + off).bfloat16(), truth.bfloat16(), truth)
    assert line is not None
    assert line.plain == 0
    assert line.ours == pytest.approx(0.0 if (truth + off).bfloat16()[1] == 4 else 4.0 * 2 / 5)
    assert line.share == pytest.approx(line.ours, rel=1e-6), "plain is exact, so that one rounding is all that is allowed"
    assert measure._line("op", "value", "case", truth * 0, truth * 0, truth * 0) is None, "nothing has no error"


def test_every_output_of_every_case_is_measured() -> None:
    lines = [line for nth in range(len(measure.of("swiglu", CPU))) for line in measure.measure("swiglu", nth, CPU)]
    assert {line.output for line in lines} == {"value", "gradient of gate", "gradient of up"}
    assert {line.dtype for line in lines} == {"float32", "bfloat16", "float16"}
    assert len({line.key for line in lines}) == len(lines)
    assert 0 < max(line.share for line in lines) <= 1
    assert "vocab_parallel_linear_log_prob" not in measure.measured(CPU)


def test_what_is_kept_is_read_again_and_added_to(tmp_path: Path) -> None:
    one, other = Line("a", "float32", "value", "x", 0.5, 0.25, 0.4), Line("b", "float32", "value", "x", 0.5, 0.25, 0.4)
    path = kept.save(MACHINE, [one, other], tmp_path)
    again = Line("a", "float32", "value", "x", 1.5, 0.25, 0.9)
    assert kept.save(MACHINE, [again], tmp_path) == path
    assert kept.load(path).lines == [other, again]
    assert kept.save(MACHINE | {"sources": "others"}, [one], tmp_path) != path, "a run of other code is left as it is"


def test_the_page_has_the_worst_case_of_each_output() -> None:
    lines = [
        Line("a", "bfloat16", "value", "x", 0.5, 0.25, 0.4),
        Line("a", "bfloat16", "value", "y", 0.75, 1.25, 0.3),
        Line("a", "float32", "value", "x", 3.0, 4.0, 0.6),
    ]
    text = report.page(kept.Cards(MACHINE, lines))
    assert "a GPU, date 2026-01-01, torch 2.0." in text
    wide, half = (
        text.index(row) for row in ("| float32 | value | 1 | 3.00 |", "| bfloat16 | value | 2 | 0.62 | 0.75 | 0.75 | 1.25 | 0.40 | x |")
    )
    assert wide < half


def test_the_committed_page_is_that_of_the_newest_run_and_keeps_the_rule() -> None:
    path = max(kept.FOLDER.glob("*.json"), key=lambda path: (kept.load(path).machine["date"], path.stem))
    cards = kept.load(path)
    assert report.PAGE.read_text() == report.page(cards)
    assert {line.op for line in cards.lines} == set(measure.measured(CPU))
    assert max(line.share for line in cards.lines) <= 1
