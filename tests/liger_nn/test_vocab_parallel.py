"""The modules of a sharded head are the functions, their options and the shard held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import liger_fn
import liger_nn

SHARD = {"vocab_start": 0, "vocab_size": 11}
MODULES = (
    (liger_nn.VocabParallelLinearCrossEntropyLoss, "vocab_parallel_linear_cross_entropy", {"label_smoothing": 0.1, "reduction": "none"}),
    (liger_nn.VocabParallelLinearLogProb, "vocab_parallel_linear_log_prob", {"softcap": 3.0}),
    (liger_nn.VocabParallelLinearDistillLoss, "vocab_parallel_linear_distill", {"divergence": "jsd", "beta": 0.3}),
)


def given(device: torch.device, distill: bool) -> tuple[Tensor, ...]:
    """x, weight and target, or those of two heads."""
    x, w, x_teacher, w_teacher = (torch.randn(s, device=device) for s in ((6, 8), (11, 8), (6, 5), (11, 5)))
    return (x, w, x_teacher, w_teacher) if distill else (x, w, torch.tensor([0, 3, 7, -100, 10, 2], device=device))


@pytest.mark.parametrize(("module", "name", "options"), MODULES, ids=[name for _, name, _ in MODULES])
def test_is_the_function(module: Any, name: str, options: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    fn, arguments = getattr(liger_fn, name), given(device, "distill" in name)
    x, w, *rest = arguments
    held = module(**options, **SHARD)
    called = (w, x, *rest[::-1]) if "distill" in name else (w, x, *rest)
    found, want = held(*called), fn(*arguments, **options, **SHARD)
    for got, wanted in zip(*((y[0],) if isinstance(y, tuple) else (y,) for y in (found, want)), strict=True):
        assert torch.equal(got, wanted)
    seen: dict[str, Any] = {}
    monkeypatch.setattr(liger_fn, name, lambda *args, **options: seen.update(options))
    module(**options, **SHARD, group="tp")(*called)
    assert seen.items() >= (options | SHARD | {"group": "tp"}).items()
    assert "vocab_size=11" in repr(held)
