"""The module of distillation is the function, its options held."""

from __future__ import annotations

import pytest
import torch

import liger_fn
import liger_nn

HELD = {"divergence": "jsd", "beta": 0.3, "temperature": 2.0, "ignore_index": -1, "reduction": "none"} | {
    "save": "recompute", "accumulate": "fp32", "memory_budget": 4096
}  # fmt: skip


def test_is_the_function(device: torch.device) -> None:
    x, w, x_teacher, w_teacher, b, b_teacher = (torch.randn(s, device=device) for s in ((6, 8), (11, 8), (6, 5), (11, 5), (11,), (11,)))
    target = torch.tensor([0, 3, 7, -1, 10, 2], device=device)
    loss_fn = liger_nn.LinearDistillLoss(**HELD)
    want = liger_fn.linear_distill(x, w, x_teacher, w_teacher, target, b, b_teacher, **HELD)
    assert torch.equal(loss_fn(w, x, w_teacher, x_teacher, target, b, b_teacher), want)
    assert repr(loss_fn) == (
        "LinearDistillLoss(divergence='jsd', beta=0.3, temperature=2.0, ignore_index=-1, reduction='none', "
        "save='recompute', accumulate='fp32', memory_budget=4096)"
    )


def test_hands_on_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(liger_fn, "linear_distill", lambda *args, **options: seen.update(options))
    one = torch.ones(1, 1)
    liger_nn.LinearDistillLoss(**HELD)(one, one, one, one, num_items=3)
    assert seen == HELD | {"num_items": 3, "token_weight": None}
