"""Patched models in engines that spread a training over processes: the same training as by one process with the stock model.

The ranks of a table are started once, go through all its checks, and say of each what it raised; a test is one check.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("transformers")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs gloo", allow_module_level=True)

from . import data_parallel, mesh, tensor_parallel
from .ranks import outcomes

RANKS = {"data_parallel": 2, "tensor_parallel": 2, "mesh": 4}
TABLES = {"data_parallel": data_parallel, "tensor_parallel": tensor_parallel, "mesh": mesh}
Found = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def found() -> Found:
    """What the ranks of each table have said so far."""
    return {}


@pytest.mark.parametrize(("table", "check"), [(table, check) for table, module in TABLES.items() for check in module.CHECKS])
def test_engine(table: str, check: str, found: Found, tmp_path: Path):
    if table not in found:
        found[table] = outcomes(table, RANKS[table], tmp_path, preload=TABLES)
    assert not found[table][check], found[table][check]
