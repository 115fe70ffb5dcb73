"""torch.func over a patched model: its parameters handed in, a transform around the call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, stack_module_state, vmap

import liger_patch
from tests.liger_patch.models import labels_of, llama, tokens

# torch says of its own attention on a CPU that vmap runs it once for each element.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop.*scaled_dot_product:UserWarning")

Named = dict[str, Tensor]


def ours(seed: int = 0) -> nn.Module:
    model = llama(seed=seed)
    liger_patch.auto(model)
    return model


def loss_of(model: nn.Module) -> object:
    """The model as a function of its parameters and buffers."""

    def loss(params: Named, buffers: Named, ids: Tensor, labels: Tensor) -> Tensor:
        output = functional_call(model, (params, buffers), (ids,), {"labels": labels, "use_cache": False})
        assert not isinstance(output.logits, Tensor), "the loss is to be made in the head"
        return output.loss

    return loss


def by_autograd(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[Named, Tensor]:
    loss = model(ids, labels=labels, use_cache=False).loss
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)), loss.detach()


def same(got: Named, expected: Named) -> None:
    """Equal but for the order in which fp32 sums of a few hundred terms are made."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        distance = torch.linalg.vector_norm(got[name] - value)
        assert torch.linalg.vector_norm(value) > 0, name
        assert distance <= 1e-5 * torch.linalg.vector_norm(value), f"{name}: {distance:.3g}"


def stacked(several: list[Named]) -> Named:
    return {name: torch.stack([each[name] for each in several]) for name in several[0]}


@pytest.mark.parametrize("base", ["one of them", "on meta"])
def test_an_ensemble_is_the_loop_over_its_models(base: str) -> None:
    """The model that is called lends its code alone: it may be one of the ensemble or hold no weights at all."""
    models = [ours(seed) for seed in range(3)]
    ids, labels = tokens(), labels_of(tokens())
    params, buffers = stack_module_state(models)
    called = models[0] if base == "one of them" else copy.deepcopy(models[0]).to("meta")
    grads, losses = vmap(grad_and_value(loss_of(called)), in_dims=(0, 0, None, None))(params, buffers, ids, labels)
    each = [by_autograd(llama(seed=seed), ids, labels) for seed in range(3)]  # stock models
    torch.testing.assert_close(losses, torch.stack([loss for _, loss in each]), rtol=1e-6, atol=0)
    same(grads, stacked([grads for grads, _ in each]))


def test_an_ensemble_with_data_of_each_model_s_own() -> None:
    models = [ours(seed) for seed in range(3)]
    ids = torch.stack([tokens(seed=seed) for seed in range(3)])
    params, buffers = stack_module_state(models)
    grads = vmap(grad(loss_of(models[0])))(params, buffers, ids, ids)
    same(grads, stacked([by_autograd(llama(seed=seed), ids[seed], ids[seed])[0] for seed in range(3)]))


def test_per_sample_gradients_are_the_loop_over_samples() -> None:
    model, ids = ours(), tokens(batch=3)
    labels = labels_of(ids)  # another number of labels counts in each sample
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    rows = vmap(grad(loss_of(model)), in_dims=(None, None, 0, 0))(params, buffers, ids[:, None], labels[:, None])
    same(rows, stacked([by_autograd(llama(), ids[i : i + 1], labels[i : i + 1])[0] for i in range(3)]))
