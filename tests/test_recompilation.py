"""Ten sequence lengths cost no more compilations than one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton's compiler")


def test_lengths_share_their_kernels() -> None:
    """Ten lengths, odd or even, of a width that 16 does not divide: for them the number of elements may or may not be a multiple of 16."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.recompilation"], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) >= 15
    for op, kernels in found.items():
        assert kernels["alike"] == kernels["first"], f"{op}: {kernels}"
        assert kernels["odd"] <= 2 * kernels["first"], f"{op}: {kernels}"
