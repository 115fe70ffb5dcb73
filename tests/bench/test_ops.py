"""Each function at the sizes of real models, forward and backward, against its peers: device time, peak memory, and the floor.

Run by `make bench`. Device time is by graph replay; calls of milliseconds, some of which make the host wait, are timed as they are. The
floor is the least bytes over the copy bandwidth, or the least FLOPs over the matmul rate, measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.bench import measure, peers

Make = Callable[[], tuple[Any, ...]]
GIB = 2**30


def _randn(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_(grad)


def _norm(n: int, h: int) -> Make:
    return lambda: (_randn(n, h), _randn(h))


def _rope(b: int, t: int, q: int, k: int, d: int) -> Make:
    def make() -> tuple[Any, ...]:
        heads = [_randn(b, t, h, d, grad=False).transpose(1, 2).requires_grad_() for h in (q, k)]
        angle = torch.outer(torch.arange(t, device="cuda"), 10000 ** -(torch.arange(0, d, 2, device="cuda") / d))
        table = torch.cat((angle, angle), -1)[None].expand(b, -1, -1)
        return *heads, table.cos().bfloat16(), table.sin().bfloat16()

    return make


def _logits(n: int, v: int) -> Make:
    return lambda: (_randn(n, v), torch.randint(v, (n,), device="cuda"))


def _head(n: int, h: int, v: int) -> Make:
    return lambda: (_randn(n, h), (_randn(v, h, grad=False) * h**-0.5).requires_grad_(), torch.randint(v, (n,), device="cuda"))


# name, op, inputs, differentiable inputs, least bytes moved (bf16, forward + backward), least FLOPs
CASES: list[tuple[str, str, Make, int, int, int]] = [
    ("8192x4096", "rms_norm", _norm(8192, 4096), 2, 2 * 8192 * 4096 * 5, 0),
    ("2048x16384", "rms_norm", _norm(2048, 16384), 2, 2 * 2048 * 16384 * 5, 0),
    ("65536x128", "rms_norm", _norm(65536, 128), 2, 2 * 65536 * 128 * 5, 0),
    ("8192x14336", "swiglu", lambda: (_randn(8192, 14336), _randn(8192, 14336)), 2, 2 * 8192 * 14336 * 8, 0),
    ("4x4096 q32 k8 d128", "rope", _rope(4, 4096, 32, 8, 128), 2, 2 * 4 * 4096 * 40 * 128 * 4, 0),
    ("8192x128256", "cross_entropy", _logits(8192, 128256), 1, 2 * 8192 * 128256 * 3, 0),
    ("8192x4096x128256", "linear_cross_entropy", _head(8192, 4096, 128256), 2, 0, 6 * 8192 * 4096 * 128256),
    ("16384x2048x32000", "linear_cross_entropy", _head(16384, 2048, 32000), 2, 0, 6 * 16384 * 2048 * 32000),
]


@pytest.fixture(scope="module")
def limits() -> tuple[float, float]:
    return measure.copy_gbs(), measure.matmul_tflops()


@pytest.mark.parametrize(("shape", "op", "make", "diff", "least_bytes", "flops"), CASES, ids=[f"{c[1]}-{c[0]}" for c in CASES])
def test_op(
    record: Callable[..., None], limits: tuple[float, float], shape: str, op: str, make: Make, diff: int, least_bytes: int, flops: int
) -> None:
    gbs, tflops = limits
    floor = least_bytes / gbs / 1e3 + flops / tflops / 1e6
    for provider, fn in peers.providers(op).items():
        torch.manual_seed(0)
        args = make()
        try:
            run = measure.forward_backward(fn, args, diff)
            mib = measure.peak_mib(run)
            record(op=op, shape=shape, provider=provider, us=measure.device_us(run, graph=floor < 1000), floor_us=floor, mib=mib)
        except torch.OutOfMemoryError:
            record(op=op, shape=shape, provider=provider, us=None, floor_us=floor, mib=None)
        finally:
            args = run = None
            torch.cuda.empty_cache()
