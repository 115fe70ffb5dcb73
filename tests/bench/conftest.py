"""One table at the end of `make bench`, and the same figures as JSON with the machine and versions beside them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench import bars, results
from tests.bench.results import Row
from tests.bench.run import Run

_run, _path = pytest.StashKey[Run](), pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-dir", type=Path, help=f"where the JSON goes (default: {results.FOLDER}; without a GPU a temporary folder)")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> None:
    """Not here: filling what the tests fill would be timed."""


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config, device: torch.device) -> Run:
    """The run that all benchmarks add to."""
    pytestconfig.stash[_run] = run = Run(device)
    return run


@pytest.fixture(scope="session")
def folder(pytestconfig: pytest.Config, device: torch.device) -> Path:
    """Where the JSON goes."""
    chosen: Path | None = pytestconfig.getoption("--bench-dir")
    return chosen or (Path(tempfile.mkdtemp(prefix="liger-fn-bench-")) if device.type == "cpu" else results.FOLDER)


@pytest.fixture(autouse=True)
def kept(pytestconfig: pytest.Config, run: Run, folder: Path) -> Iterator[None]:
    """What was measured so far is on disk after each benchmark: a run that is cut off loses nothing."""
    yield
    if run.gates:
        pytestconfig.stash[_path] = results.save(run.result(), folder)


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _line(r: Row) -> str:
    rate = f"{r.tflops:,.1f} TFLOP/s" if r.tflops else f"{r.gbs:,.0f} GB/s" if r.gbs else "–"
    moved = _number(r.bytes / 1e6 if r.bytes else None, 1)
    ratio = _number(r.over_floor, 2) if r.mode != "host" else "–" if r.ours_over_this is None else f"ours × {r.ours_over_this:.2f}"
    figures = f"{_number(r.us, 1):>11}{moved:>10}{rate:>16}{ratio:>13}{_number(r.mib):>10}"
    said = "; ".join(filter(None, (r.note, "timed by events" if r.by_events else "")))
    return f"{r.op:22}{r.shape:28}{r.mode:29}{r.provider:24}{figures}  {said}".rstrip()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash.get(_run, None)
    if run is None or not run.gates:
        return
    result, write = run.result(), terminalreporter.write_line
    on_cpu = run.device.type == "cpu"
    write(", ".join(f"{k} {v}" for k, v in (result.machine | {k: f"{v:,.0f}" for k, v in result.limits.items()}).items()))
    if on_cpu:
        write("No GPU: wall clock of tiny tensors, which proves the harness and says nothing of speed.")
    write(f"{'op':22}{'shape':28}{'pass':29}{'provider':24}{'µs':>11}{'MB moved':>10}{'rate':>16}{'÷ floor':>13}{'peak MiB':>10}")
    for row in result.allowed():
        write(_line(row))
    if not on_cpu:
        write("")
        for line in bars.lines(result.allowed()):
            write(line)
    for op, verdict in result.gates.items():
        if verdict != results.GREEN:
            write(f"{op}: no figures, its gate is red: {verdict}")
    write(f"written to {config.stash[_path]}")
