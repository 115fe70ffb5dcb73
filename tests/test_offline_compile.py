"""Every kernel in every configuration that ships compiles for every GPU generation, within a recorded budget. No GPU is needed.

The budget, tests/offline_compile.json, is what `python -m tests.offline_compile --write` found: run it after a change that is meant to
cost more. It holds for the version of Triton it was made with; with any other, the hardware's limits alone are held.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton's compiler")
import triton

from tests.offline_compile import BUDGET, SHARED_LIMIT, TARGETS, Usage

RECORDED = json.loads(BUDGET.read_text()) if BUDGET.exists() else {"triton": None, "kernels": {}}
REMEDY = "if that is meant, run `python -m tests.offline_compile --write` and commit the file"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a process without the interpreter compiled; made once, however many workers ask."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    made = folder / "offline_compile.json"
    with (folder / "offline_compile.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_DEFAULT_FP_FUSION": "1"}
            run = subprocess.run(
                [sys.executable, "-m", "tests.offline_compile"], capture_output=True, text=True, env=environment, check=False
            )
            assert run.returncode == 0, run.stderr
            made.write_text(run.stdout)
    return json.loads(made.read_text())["kernels"]


def test_every_kernel_is_recorded(compiled: dict[str, dict[str, Any]]) -> None:
    assert list(compiled) == list(RECORDED["kernels"]), f"kernels came or went: {set(compiled) ^ set(RECORDED['kernels'])}; {REMEDY}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", RECORDED["kernels"])
def test_compiles_within_budget(compiled: dict[str, dict[str, Any]], kernel: str, target: str) -> None:
    if kernel not in compiled:
        pytest.fail(f"{kernel} is recorded, and no op launches it any more; {REMEDY}")
    usage: Usage | str = compiled[kernel][target]
    if isinstance(usage, str) and "ROCm linker" in usage:
        pytest.skip(f"Triton {triton.__version__} links for AMD with ROCm's own linker, which is not here")
    assert isinstance(usage, dict), f"{kernel} does not compile for {target}: {usage}"
    assert usage["shared"] <= SHARED_LIMIT[target], (
        f"{kernel} takes {usage['shared']} bytes of shared memory; {target} has {SHARED_LIMIT[target]}"
    )
    assert usage["threads"] <= 1024, f"{kernel} has {usage['threads']} threads a block; {target} takes 1024"
    if triton.__version__ == RECORDED["triton"]:
        over = {k: (v, budget) for k, v in usage.items() if v > (budget := RECORDED["kernels"][kernel][target][k])}
        assert not over, f"{kernel} on {target} takes more than its budget, as (now, budget): {over}; {REMEDY}"
