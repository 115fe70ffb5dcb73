"""The modules add parameters and names to the functions, and nothing else."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import liger_fn
import liger_nn

transformers = pytest.importorskip("transformers")


def test_rms_norm_is_the_function(device: torch.device) -> None:
    norm = liger_nn.RMSNorm(24, eps=1e-5, device=device)
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 24, device=device)
    assert torch.equal(norm(x), liger_fn.rms_norm(x, norm.weight, 1e-5))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_starts_as_a_plain_norm(device: torch.device, offset: float) -> None:
    x = torch.randn(3, 24, device=device)
    norm = liger_nn.RMSNorm(24, offset=offset, cast="gemma", device=device)
    assert torch.equal(norm(x), liger_nn.RMSNorm(24, cast="gemma", elementwise_affine=False, device=device)(x))


def test_modules_load_hugging_face_weights(device: torch.device) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    config = transformers.LlamaConfig(hidden_size=16, intermediate_size=40, num_attention_heads=4, mlp_bias=True)
    x = torch.randn(2, 5, 16, device=device)
    theirs_mlp, theirs_norm = LlamaMLP(config).to(device), LlamaRMSNorm(16, eps=1e-6).to(device)
    nn.init.normal_(theirs_norm.weight)
    ours_mlp, ours_norm = liger_nn.SwiGLUMLP.from_config(config, device=device), liger_nn.RMSNorm(16, device=device)
    ours_mlp.load_state_dict(theirs_mlp.state_dict())
    ours_norm.load_state_dict(theirs_norm.state_dict())
    torch.testing.assert_close(ours_mlp(x), theirs_mlp(x))
    torch.testing.assert_close(ours_norm(x), theirs_norm(x))


def test_mlp_of_another_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden_act.*'gelu'"):
        liger_nn.SwiGLUMLP.from_config(transformers.LlamaConfig(hidden_act="gelu"))


def test_compose_your_own_model(device: torch.device) -> None:
    """The example that the library's users start from: a head, a loss, a backward."""
    model = nn.Linear(128, 256, device=device)
    loss_fn = liger_nn.LinearCrossEntropyLoss()
    x = torch.randn(4, 128, requires_grad=True, device=device)
    target = torch.randint(256, (4,), device=device)
    loss = loss_fn(model.weight, x, target)
    loss.backward()
    theirs = torch.nn.functional.cross_entropy(x @ model.weight.T, target)
    torch.testing.assert_close(loss, theirs)
    assert model.weight.grad is not None
    assert x.grad is not None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_are_the_functions(device: torch.device, reduction: str) -> None:
    x, w, b = (torch.randn(s, device=device) for s in ((6, 8), (11, 8), (11,)))
    target = torch.tensor([0, 3, 7, -1, 10, 2], device=device)
    held = {"ignore_index": -1, "reduction": reduction}
    ours = liger_nn.LinearCrossEntropyLoss(**held)(w, x, target, b)
    assert torch.equal(ours, liger_fn.linear_cross_entropy(x, w, target, b, **held))
    logits = x @ w.T + b
    assert torch.equal(liger_nn.CrossEntropyLoss(**held)(logits, target), liger_fn.cross_entropy(logits, target, **held))


def test_a_head_hands_on_every_option(device: torch.device) -> None:
    """Each at a value that is not its default, those of the call too."""
    x, w, b = (torch.randn(s, device=device) for s in ((2, 3, 8), (11, 8), (11,)))
    target = torch.tensor([[0, 3, 7], [-1, 10, 2]], device=device)
    shared = {"ignore_index": -1, "softcap": 5.0, "logit_scale": 0.5, "temperature": 2.0, "shift": True, "accumulate": "exact"}
    held = shared | {
        "class_weight": torch.rand(11, device=device), "label_smoothing": 0.1, "z_loss": 0.1, "return_aux": True, "save": "recompute",
        "memory_budget": 100, "reduction": "mean",
    }  # fmt: skip
    call = {"num_items": 5, "token_weight": torch.rand(2, 3, device=device)}
    assert {"self", *held} == {"self", *inspect.signature(liger_nn.LinearCrossEntropyLoss).parameters}
    ours = liger_nn.LinearCrossEntropyLoss(**held)(w, x, target, b, **call)
    want = liger_fn.linear_cross_entropy(x, w, target, b, **held, **call)
    assert torch.equal(ours[0], want[0])
    assert torch.equal(ours[1].entropy, want[1].entropy)
    log_prob, aux = liger_nn.LinearLogProb(**shared, memory_budget=100)(w, x, target, b)
    want = liger_fn.linear_log_prob(x, w, target, b, **shared, memory_budget=100)
    assert torch.equal(log_prob, want[0])
    assert torch.equal(aux.lse, want[1].lse)


def test_loss_hands_on_its_memory_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(liger_fn, "linear_cross_entropy", lambda *args, **options: seen.update(options))
    liger_nn.LinearCrossEntropyLoss(memory_budget=4096)(torch.ones(3, 2), torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))
    assert seen["memory_budget"] == 4096
