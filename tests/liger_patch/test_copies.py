"""Undoing, copying and saving a patched model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from transformers import LlamaForCausalLM

import liger_patch
from liger_patch import PatchError

from .models import dicts, labels_of, llama, tokens


def patched_llama():
    model = llama()
    liger_patch.auto(model)
    return model


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


def loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_revert_restores_the_exact_original():
    model, ids = llama(), tokens()
    before = dicts(model)
    expected = model(ids, labels=ids)
    for times in (1, 2):
        for _ in range(times):
            liger_patch.auto(model)
        assert dicts(model) != before
        assert liger_patch.revert(model) is model
        assert dicts(model) == before
    after = model(ids, labels=ids)
    assert torch.equal(after.loss, expected.loss)
    assert type(after.logits) is torch.Tensor
    liger_patch.revert(model)
    assert dicts(model) == before


def test_the_context_manager_reverts_also_on_an_error():
    model, ids = llama(), tokens()
    before = dicts(model)
    with liger_patch.patched(model, rope=False) as same:
        assert same is model
        assert {row.op for row in liger_patch.plan(model).where("planned")} == {"rope"}
        model(ids, labels=ids)
    assert dicts(model) == before
    with pytest.raises(ZeroDivisionError), liger_patch.patched(model):
        _ = 1 / 0
    assert dicts(model) == before


def test_the_context_manager_keeps_what_was_patched_before():
    model = llama()
    liger_patch.auto(model, rope=False, cross_entropy=False)
    before = dicts(model)[1:]  # the model's own note of its patches is made anew
    with liger_patch.patched(model):
        assert not liger_patch.plan(model).where("planned")
    assert dicts(model)[1:] == before
    assert {row.op for row in liger_patch.plan(model).where("planned")} == {"rope", "cross_entropy"}


def another_layer(model):
    model.lm_head = torch.nn.Linear(32, 128, bias=False)


def resized(model):
    model.resize_token_embeddings(160)


@pytest.mark.parametrize("change", [another_layer, resized])
def test_revert_after_the_head_was_exchanged_and_patched_again(change):
    model, ids = llama(), tokens()
    liger_patch.auto(model)
    old = model.lm_head
    for _ in range(2):
        change(model)
        report = liger_patch.auto(model)
        assert {row.op for row in report.where("patched")} <= {"linear_cross_entropy"}
        assert not isinstance(model(ids, labels=ids).logits, torch.Tensor)
    liger_patch.revert(model)
    assert all(name not in module.__dict__ for module in (*model.modules(), old) for name in ("forward", "_loss_function", "_liger_patch"))
    assert isinstance(model(ids, labels=ids).logits, torch.Tensor)


def test_a_swap_under_an_accelerate_hook_is_replaced_and_undone():
    """The hook keeps what it wraps in a slot of its own; a new swap goes there, and the hook must find a forward there in the end."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, ids = llama(), tokens()
    expected = model(ids).logits
    liger_patch.auto(model)
    hooks.add_hook_to_module(model, hooks.ModelHook())
    weight = model.lm_head.weight
    another_layer(model)
    model.lm_head.weight = weight
    liger_patch.auto(model)
    assert not isinstance(model(ids, labels=ids).logits, torch.Tensor)
    liger_patch.revert(model)
    assert model._old_forward.__self__ is model  # the class's forward, and no swap
    torch.testing.assert_close(model(ids, labels=ids).logits, expected)
    hooks.remove_hook_from_module(model)
    torch.testing.assert_close(model(ids).logits, expected)


def test_replicas_are_refused():
    model = patched_llama()
    with pytest.raises(PatchError, match=r"nn\.DataParallel makes replicas.*DistributedDataParallel"):
        model._replicate_for_data_parallel()
    liger_patch.revert(model)
    model._replicate_for_data_parallel()


def test_a_wrapper_around_a_patched_forward_stops_revert():
    model = patched_llama()
    mlp = model.model.layers[1].mlp
    inner = mlp.forward
    mlp.forward = lambda x: inner(x)
    before = dicts(model)
    with pytest.raises(PatchError, match=r"wrapped since, on model.layers.1.mlp\. Remove the wrapper first"):
        liger_patch.revert(model)
    assert dicts(model) == before
    mlp.forward = inner
    liger_patch.revert(model)
    assert "forward" not in mlp.__dict__


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled, loaded])
def test_copies_stay_patched_and_are_their_own(copied):
    model, ids = patched_llama(), tokens()
    model(ids, labels=ids).loss.backward()
    model.zero_grad()
    other = copied(model)
    assert {row.status for row in liger_patch.plan(other)} == {"already"}
    for original, twin in zip(model.modules(), other.modules(), strict=True):
        if "forward" in original.__dict__:
            assert twin.forward is not original.forward
            assert twin.forward.__self__.module is twin
    assert other.forward.__self__.head is other.lm_head.forward.__self__

    with torch.no_grad():
        other.lm_head.weight.add_(0.1 * torch.randn_like(other.lm_head.weight))
        other.model.norm.weight.mul_(2)
    stock = llama()
    stock.load_state_dict(other.state_dict())
    output = other(ids, labels=labels_of(ids))
    torch.testing.assert_close(output.loss, stock(ids, labels=labels_of(ids)).loss, rtol=1e-6, atol=0)
    assert not isinstance(output.logits, torch.Tensor)

    liger_patch.revert(other)
    assert all("forward" not in module.__dict__ for module in other.modules())
    assert {row.status for row in liger_patch.plan(model)} == {"already"}
    assert not isinstance(model(ids, labels=ids).logits, torch.Tensor)


def test_no_labels_travel_with_a_copy():
    model, ids = patched_llama(), tokens()
    copies = []
    model.model.norm.register_forward_hook(lambda *_: copies.append(copy.deepcopy(model.lm_head)))
    model(ids, labels=ids)
    assert model.lm_head.forward.__self__.requests == []
    assert copies[0].forward.__self__.requests == []
    assert type(copies[0](torch.randn(1, 32))) is torch.Tensor


def test_a_copy_of_the_head_is_a_head_and_not_a_model():
    head = copy.deepcopy(patched_llama().lm_head)
    assert head.forward.__self__.module is head
    assert len(pickle.dumps(head)) < 3 * head.weight.nbytes


def test_state_dict_and_saving_are_the_stock_models(tmp_path):
    model, ids = patched_llama(), tokens()
    model(ids, labels=ids).loss.backward()
    assert list(model.state_dict()) == list(llama().state_dict())
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).train()
    assert {row.status for row in liger_patch.plan(again)} == {"planned"}
    assert again.config.to_dict().keys() - {"dtype"} == llama().config.to_dict().keys() - {"dtype"}
    torch.testing.assert_close(again(ids, labels=ids).loss, model(ids, labels=ids).loss, rtol=1e-6, atol=0)
