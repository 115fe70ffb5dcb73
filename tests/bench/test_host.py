"""What a call costs the host. Collected before the other benchmarks: a compiler's worker processes would share the cores."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch

from tests.bench import peers

PROVIDERS = ("liger_fn", "eager", "native", "liger-kernel")


def _step(provider: str) -> Callable[[], None]:
    """A tiny norm, forward and backward, on which the device never falls behind."""
    fn = peers.uncompiled("rms_norm").get(provider) or pytest.skip(f"{provider} is not installed")

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, w, dy = randn(8, 256).requires_grad_(), randn(256).requires_grad_(), randn(8, 256)
    return lambda: fn(x, w).backward(dy)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_host_cost_of_rms_norm(benchmark: Any, record: Callable[..., None], provider: str) -> None:
    benchmark.pedantic(_step(provider), rounds=40, iterations=50, warmup_rounds=2)
    record(op="rms_norm host", shape="8x256", provider=provider, us=benchmark.stats.stats.min * 1e6, floor_us=None, mib=None)


def _seconds(step: Callable[[], None], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        step()
    return time.perf_counter() - start


def test_host_cost_is_a_fraction_of_liger_kernels() -> None:
    """In pairs of short turns, so that what else the machine does meets both: a busy host's minima are luck."""
    ours, theirs = _step("liger_fn"), _step("liger-kernel")
    for step in (ours, theirs):
        _seconds(step, 100)
    ratios = sorted(_seconds(ours, 50) / _seconds(theirs, 50) for _ in range(100))
    print(f"\nhost cost over liger-kernel's: median {median(ratios):.2f}, half of 100 pairs from {ratios[25]:.2f} to {ratios[75]:.2f}")
    assert median(ratios) <= 0.65
