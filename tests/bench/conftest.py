"""One table at the end of `make bench`, and the same figures as JSON with the machine and versions beside them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

_rows: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-json", default="out/bench.json", help="where the figures go (default: %(default)s)")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> None:
    """Not here: filling what the tests fill would be timed."""


@pytest.fixture
def record() -> Callable[..., None]:
    """Add one row to the table."""

    def add(**row: Any) -> None:
        _rows.append(row)

    return add


@pytest.fixture
def recorded() -> list[dict[str, Any]]:
    """The rows so far."""
    return _rows


def _machine() -> dict[str, str]:
    names = ("torch", "triton", "liger-kernel")
    versions = {n: importlib.metadata.version(n) for n in names if importlib.util.find_spec(n.replace("-", "_"))}
    return {"device": torch.cuda.get_device_name(), "python": platform.python_version(), "cuda": str(torch.version.cuda), **versions}


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _rows:
        return
    out = Path(config.getoption("--bench-json"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": _machine(), "rows": _rows}, indent=1))
    write = terminalreporter.write_line
    write(", ".join(f"{k} {v}" for k, v in _machine().items()))
    write(f"{'op':22}{'shape':22}{'provider':14}{'µs':>10}{'÷ floor':>9}{'peak MiB':>10}")
    for r in _rows:
        ratio = r["us"] / r["floor_us"] if r["us"] and r["floor_us"] else None
        write(f"{r['op']:22}{r['shape']:22}{r['provider']:14}{_number(r['us']):>10}{_number(ratio, 2):>9}{_number(r['mib']):>10}")
    write(f"written to {out}")
