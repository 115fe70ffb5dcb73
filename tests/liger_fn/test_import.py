"""A machine with nothing but torch: no triton, no transformers, no GPU. Everything imports, and runs as plain PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

import liger_fn

EVERY_OP = """
    import sys

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in HIDDEN:
                raise ImportError(f"{name} is hidden")

    sys.meta_path.insert(0, Missing())

    import torch
    import liger_fn
    from tests.cases import TABLES, FP32
    from tests.sample import Sample

    assert set(TABLES) == set(liger_fn.__all__) - {"backend", "rope_complex", "use_backend"}
    for table in TABLES.values():
        s = Sample(table, table.typical, FP32, torch.device("cpu"))
        for got, want in zip(s.ours(), s.naive()):
            for a, b in zip(got, want):
                torch.testing.assert_close(a, b)
    for name in HIDDEN:
        assert name not in sys.modules, name
    try:
        with liger_fn.use_backend("triton"):
            pass
    except RuntimeError as error:
        assert "triton package" in str(error), error
    else:
        assert "triton" not in HIDDEN
"""


def run(source: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(source)],
        capture_output=True, text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_without_triton(interpret: str) -> None:
    run("HIDDEN = ('triton', 'transformers')\n" + textwrap.dedent(EVERY_OP), TRITON_INTERPRET=interpret)


def test_import_leaves_others_and_the_gpu_alone() -> None:
    """What is not needed is not imported; and no context is made before the first call: processes fork, and choose a device, afterwards."""
    run("""
        import sys, liger_fn
        others = {'transformers', 'liger_nn', 'liger_patch', 'numpy.testing'} & set(sys.modules)
        assert not others, others
        import torch
        assert not torch.cuda.is_initialized()
    """)


def test_every_op_has_a_table() -> None:
    from tests.cases import TABLES

    assert sorted(TABLES) == sorted(set(liger_fn.__all__) - {"backend", "rope_complex", "use_backend"})
    assert list(liger_fn.__all__) == sorted(liger_fn.__all__)
