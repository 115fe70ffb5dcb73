"""Selective activation checkpointing of a patched model: its policy can name our operators."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import liger_patch
from tests.liger_patch.models import agree, family, one_step

OURS = ("rms_norm", "rope", "swiglu")


class Counted(TorchDispatchMode):
    """How often each of our forward operators runs, below the modes that answer from what they saved."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.removesuffix(".default")
        if func.namespace == "liger_fn" and name.endswith("_fwd"):
            self.calls[name.removesuffix("_fwd")] = self.calls.get(name.removesuffix("_fwd"), 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("saved", [(), ("swiglu",), OURS], ids=["none", "swiglu", "all"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_policy_names_our_operators(model_type: str, saved: tuple[str, ...]) -> None:
    """An operator that it saves runs once a layer, one that it does not twice; the step is the stock model's either way."""
    stock, ours = family(model_type), family(model_type)
    liger_patch.auto(ours)
    keep = {getattr(torch.ops.liger_fn, f"{name}_fwd").default for name in saved}
    seen = set()

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.add(op)
        return CheckpointPolicy.MUST_SAVE if op in keep else CheckpointPolicy.PREFER_RECOMPUTE

    enable = getattr(ours, "activation_checkpointing_enable", None) or ours.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, policy)})
    expected = one_step(stock)
    agree(one_step(ours), expected)
    assert {getattr(torch.ops.liger_fn, f"{name}_fwd").default for name in OURS} <= seen, "none is hidden from the policy"

    with Counted() as counted:
        agree(one_step(ours), expected)
    layers = ours.config.num_hidden_layers
    once = {"rms_norm": layers * (4 if model_type == "qwen3" else 2), "rope": layers, "swiglu": layers}
    final = {"rms_norm": 1}  # the norm behind the layers is no part of what is made again
    assert {name: counted.calls[name] for name in OURS} == {
        name: count * (1 if name in saved else 2) + final.get(name, 0) for name, count in once.items()
    }
