"""The lessons: solutions pass their checks, wrong answers are explained, stubs are unsolved; notebooks are their sources, executed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jupytext")
pytest.importorskip("nbformat")

import jupytext
import nbformat
from course import commands
from course import exercises as exercise

SOURCES = commands.sources() if any(commands.FOLDER.glob("[0-9][0-9]_*.py")) else []
NUMBERS = [int(s.name[:2]) for s in SOURCES]
for number in NUMBERS:
    for kind in ("lessons", "solutions", "mistakes"):
        exercise.load(kind, number)
EXERCISES = sorted(exercise.EXERCISES, key=lambda k: [int(n) for n in k.split(".")])
MISTAKES = [pytest.param(m, id=f"{m.key}-{m.answer.__name__}") for m in exercise.MISTAKES]


@pytest.mark.parametrize("key", EXERCISES)
def test_a_solution_passes(key: str) -> None:
    assert exercise.check(key, exercise.SOLUTIONS[key]).passed, exercise.check(key, exercise.SOLUTIONS[key])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_answer_is_explained(mistake: exercise.Mistake) -> None:
    report = exercise.check(mistake.key, mistake.answer)
    assert not report.passed
    assert mistake.says, "a mistake names words that the check says"
    for words in mistake.says:
        assert words in report.text


@pytest.mark.parametrize("key", EXERCISES)
def test_an_exercise_is_solved_and_mistaken(key: str) -> None:
    assert key in exercise.SOLUTIONS
    assert sum(m.key == key for m in exercise.MISTAKES) >= 2


def shown(cell: Any) -> str:
    """All text that a cell put out."""
    texts = [o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    return "\n".join(texts)


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_the_notebook_is_its_source_executed(source: Path) -> None:
    book, text = nbformat.read(source.with_suffix(".ipynb"), 4), jupytext.read(source)
    again = f"python -m notebooks run {int(source.name[:2])} --write"
    assert [(c.cell_type, c.source) for c in book.cells] == [(c.cell_type, c.source) for c in text.cells], again
    code = [c for c in book.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1)), again
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) for c in code for o in c.outputs) >= 2, "pictures"
    keys = [k for c in code for k in re.findall(r'course\.check\("(\d+\.\d+)"', c.source)]
    assert keys == [k for k in EXERCISES if int(k.split(".")[0]) == int(source.name[:2])], "each exercise once, in order"
    for cell in code:
        for key in re.findall(r'course\.check\("(\d+\.\d+)"', cell.source):
            assert f"✗ {key} " in shown(cell), f"{key}: its stub is no stub"
            assert "not solved yet" in shown(cell), f"{key}: {shown(cell)}"


def test_twelve_lessons() -> None:
    assert list(range(1, 13)) == NUMBERS


@pytest.mark.parametrize("wrong", [ZeroDivisionError("by zero"), RuntimeError("outer")])
def test_an_answer_that_raises_is_told_its_error(wrong: Exception) -> None:
    def answer(*args: Any, **kwargs: Any) -> None:
        raise wrong

    report = exercise.check(EXERCISES[0], answer)
    assert not report.passed
    assert type(wrong).__name__ in report.text
    assert str(wrong) in report.text


def test_an_unknown_exercise_is_an_error() -> None:
    with pytest.raises(KeyError, match="there is no exercise"):
        exercise.check("1.99", lambda: None)
