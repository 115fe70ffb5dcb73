"""The examples in the public docstrings give what they say."""

from __future__ import annotations

import doctest

import pytest
import torch

import liger_fn

PUBLIC = [name for name in liger_fn.__all__ if name not in ("backend", "use_backend")]


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name: str) -> None:
    op = getattr(liger_fn, name)
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    test = parser.get_doctest(op.__doc__, {"liger_fn": liger_fn, "torch": torch}, name, None, 0)
    assert test.examples, f"{name} has no example"
    assert runner.run(test).failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_says_what_a_reader_needs(name: str) -> None:
    doc = getattr(liger_fn, name).__doc__
    for part in ("Args:", "Returns:", "Gradient", "Raises:", "Examples:"):
        assert part in doc, f"{name}'s docstring has no {part!r}"
