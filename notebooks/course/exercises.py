"""Exercises: a check that runs on the reader's answer, a solution that passes it, and mistakes that it explains.

A lesson NN has three modules, which hold functions for each exercise: `lessons/lessonNN.py` its check, `solutions/lessonNN.py` the
answer, `mistakes/lessonNN.py` likely wrong ones, with words that the check must say of them.
"""

from __future__ import annotations

import html
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from .compare import Wrong

Answer = Callable[..., Any]


@dataclass(frozen=True)
class Exercise:
    """One thing to write. `check(answer)` raises `Wrong`, whose text the reader sees, or returns what to say of a right answer."""

    key: str
    title: str
    hint: str
    check: Callable[[Answer], str | None]


@dataclass(frozen=True)
class Mistake:
    """A wrong answer, and words of which the check says all."""

    key: str
    answer: Answer
    says: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What the reader sees below an answer."""

    key: str
    title: str
    passed: bool
    text: str = ""

    def __repr__(self) -> str:
        return f"{'✓' if self.passed else '✗'} {self.key} {self.title}" + (f"\n  {self.text}".replace("\n", "\n  ") if self.text else "")

    def _repr_html_(self) -> str:
        colour = "#2e7d32" if self.passed else "#c62828"
        body = html.escape(self.text).replace("\n", "<br>")
        return (
            f'<div style="border-left:4px solid {colour};padding:.3em .8em"><b style="color:{colour}">{"✓" if self.passed else "✗"}</b> '
            f"<b>{self.key} {html.escape(self.title)}</b><br>{body}</div>"
        )


EXERCISES: dict[str, Exercise] = {}
SOLUTIONS: dict[str, Answer] = {}
MISTAKES: list[Mistake] = []


def exercise(key: str, title: str, hint: str) -> Callable[[Callable[[Answer], str | None]], Exercise]:
    """Registers the check of exercise `key` ("4.2": the second of lesson 4)."""

    def register(check: Callable[[Answer], str | None]) -> Exercise:
        EXERCISES[key] = Exercise(key, title, hint, check)
        return EXERCISES[key]

    return register


def solution(key: str) -> Callable[[Answer], Answer]:
    """Registers the answer to exercise `key`."""

    def register(answer: Answer) -> Answer:
        SOLUTIONS[key] = answer
        return answer

    return register


def mistake(key: str, *says: str) -> Callable[[Answer], Answer]:
    """Registers a wrong answer to exercise `key`; its check must say all of `says`."""

    def register(answer: Answer) -> Answer:
        MISTAKES.append(Mistake(key, answer, says))
        return answer

    return register


def load(kind: str, lesson: int) -> None:
    """Import `lessons`, `solutions` or `mistakes` of a lesson, which registers what it holds."""
    import_module(f"{__package__}.{kind}.lesson{lesson:02d}")


def check(key: str, answer: Answer) -> Report:
    """Run the check of exercise `key` on the reader's answer, and say what is wrong with it.

    Raises:
        KeyError: there is no such exercise.
    """
    load("lessons", int(key.split(".")[0]))
    if key not in EXERCISES:
        raise KeyError(f"check: there is no exercise {key!r}; this lesson has {sorted(EXERCISES)}")
    asked = EXERCISES[key]
    try:
        with torch.random.fork_rng(devices=[]):  # the same numbers each time: what is wrong once is wrong again
            torch.manual_seed(0)
            said = asked.check(answer)
    except Wrong as wrong:
        return Report(key, asked.title, False, str(wrong))
    except Exception as error:
        return Report(key, asked.title, False, _what_broke(error, asked))
    return Report(key, asked.title, True, said or "")


def _what_broke(error: BaseException, asked: Exercise) -> str:
    """An answer that raises: not begun, or the error and the line of the answer that it comes from."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:  # the interpreter wraps what a kernel raises
        chain.append(cause)
    if any(isinstance(e, NotImplementedError) for e in chain):
        return f"not solved yet. Hint: {asked.hint}"
    first = chain[-1]
    frames = traceback.extract_tb(first.__traceback__)
    own = [f for f in frames if "ipykernel" in f.filename or "<ipython" in f.filename or "notebooks" in f.filename]
    last = own[-1] if own else frames[-1] if frames else None
    line = f"\nin the line: {last.line}" if last is not None and last.line else ""
    return f"your answer raised {type(first).__name__}: {first}{line}"
