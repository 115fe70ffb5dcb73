"""A patched model under each implementation of attention, with one sequence in a row or several."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import liger_patch
from tests.liger_patch.models import agree, family, one_step

PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 0, 1, 2, 3]])


def as_stock(model_type: str, implementation: str, packed: bool, device: torch.device, **sizes: int) -> None:
    """A step of the patched model is the stock model's; and packed rows are no plain ones."""
    stock, ours = (family(model_type, **sizes).to(device) for _ in range(2))
    liger_patch.auto(ours)
    for model in (stock, ours):
        model.set_attn_implementation(implementation)
    call: dict[str, Any] = {"position_ids": PACKED.to(device)} if packed else {}
    expected = one_step(stock, **call)
    assert not packed or not torch.equal(expected["loss"], one_step(stock)["loss"])
    agree(one_step(ours, **call), expected)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
# Gemma 2 caps the scores, which sdpa cannot.
@pytest.mark.parametrize(("model_type", "implementation"), [("llama", "eager"), ("qwen3", "eager"), ("qwen3", "sdpa"), ("gemma2", "eager")])
def test_a_step_is_the_stock_models(model_type: str, implementation: str, packed: bool) -> None:
    as_stock(model_type, implementation, packed, torch.device("cpu"))


@pytest.mark.gpu  # flex_attention has no backward on a CPU
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")  # of the compiler it runs through
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("model_type", ["qwen3", "gemma2"])
def test_flex_attention(model_type: str, packed: bool, device: torch.device) -> None:
    as_stock(model_type, "flex_attention", packed, device, head_dim=16)  # the least that its kernels take
