"""Patched models under DeepSpeed's ZeRO. Its checks are named here, since this process must not import it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from .ranks import outcomes

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs deepspeed", allow_module_level=True)

CHECKS = (
    "stage 1, patched before",
    "stage 1, patched after",
    "stage 2, patched before",
    "stage 2, patched after",
    "stage 2, two parts of each batch, patched before",
    "stage 3, patched before",
    "stage 3, patched after",
    "stage 3, tied, patched before",
    "stage 3, two parts of each batch, patched before",
    "stage 3, never whole, patched before",
    "stage 3, never whole, patched after",
    "the_head_is_whole_in_its_own_call_alone",
    "takes_no_more_than_stock",
    "logits_are_there_when_asked_for",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What two ranks say of each check."""
    return outcomes("zero", 2, Path(tmp_path_factory.mktemp("zero")))


@pytest.mark.parametrize("check", CHECKS)
def test_zero(check: str, found: dict[str, str]):
    assert not found[check], found[check]


def test_every_check_is_named(found: dict[str, str]):
    assert set(found) == set(CHECKS)
