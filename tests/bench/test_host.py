"""What a call costs the host. Collected before the other benchmarks: a compiler's worker processes would share the cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.bench import peers

PROVIDERS = ("liger_fn", "eager", "native", "liger-kernel")


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_host_cost_of_rms_norm(benchmark: Any, record: Callable[..., None], provider: str) -> None:
    """A tiny norm, forward and backward, on which the device never falls behind."""
    fn = peers.uncompiled("rms_norm").get(provider) or pytest.skip(f"{provider} is not installed")
    x, w, dy = _randn(8, 256).requires_grad_(), _randn(256).requires_grad_(), _randn(8, 256)
    benchmark.pedantic(lambda: fn(x, w).backward(dy), rounds=40, iterations=50, warmup_rounds=2)
    record(op="rms_norm host", shape="8x256", provider=provider, us=benchmark.stats.stats.min * 1e6, floor_us=None, mib=None)


def test_host_cost_is_a_fraction_of_liger_kernels(recorded: list[dict[str, Any]]) -> None:
    cost = {r["provider"]: r["us"] for r in recorded if r["op"] == "rms_norm host"}
    if not {"liger_fn", "liger-kernel"} <= cost.keys():
        pytest.skip("needs both measured in this run")
    assert cost["liger_fn"] <= 0.65 * cost["liger-kernel"], cost
