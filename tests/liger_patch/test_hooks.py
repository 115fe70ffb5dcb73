"""Hooks, wrappers and in-place edits on and around what is patched: each acts once, as on the stock model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import liger_patch
from liger_fn import linear_cross_entropy

from .models import VOCAB, labels_of, llama, same_gradients, tokens


def same(change, *, fused: bool | None = None, **changes: object) -> None:
    """A stock and a patched model on which the same change was made agree in loss, gradients and logits."""
    stock, ours = llama(**changes), llama(**changes)
    liger_patch.auto(ours)
    outputs = []
    for model in (stock, ours):
        change(model)
        ids = tokens()
        output = model(ids, labels=labels_of(ids))
        output.loss.backward()
        outputs.append(output)
    expected, got = outputs
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    same_gradients(ours, stock)
    if fused is not None:
        assert (not isinstance(got.logits, torch.Tensor) and not got.logits.source.touched) is fused
    torch.testing.assert_close(got.logits + 0, expected.logits)


def returning(model):
    model.lm_head.register_forward_hook(lambda module, args, out: out * 3.0)


def before(model):
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 3.0,))


def wrapping(model):
    inner = model.lm_head.forward
    model.lm_head.forward = lambda x: inner(x) * 3.0


def wrapping_the_input(model):
    inner = model.lm_head.forward
    model.lm_head.forward = lambda x: inner(x * 3.0)


def reading(model):
    model.lm_head.register_forward_hook(lambda module, args, out: None if out.shape[-1] == VOCAB and out.dtype else out)


@pytest.mark.parametrize(
    ("change", "fused"), [(returning, False), (before, True), (wrapping, False), (wrapping_the_input, True), (reading, True)]
)
def test_what_is_put_around_the_head_acts_once(change, fused):
    same(change, fused=fused)


def in_place(edit):
    def change(model):
        model.lm_head.register_forward_hook(lambda module, args, out: edit(out) and None)

    return change


def masked(out):
    out[..., 100:] = -1e4


def added(out):
    out += torch.arange(VOCAB)


def scaled(out):
    out *= 3.0


EDITS = {
    "method": lambda out: out.mul_(3.0),
    "function": lambda out: torch.clamp_(out, -0.05, 0.05),
    "item": masked,
    "iadd": added,
    "imul": scaled,
    "view": lambda out: out.view(-1, VOCAB).mul_(3.0),
    "data": lambda out: out.data.mul_(3.0),
    "hook": lambda out: out.register_hook(lambda grad: grad * 3.0),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_in_place_reaches_the_loss(name):
    def once(out):
        EDITS[name](out)

    same(in_place(once), fused=False)


def test_an_edit_of_the_cast_logits_reaches_the_loss_and_not_their_source():
    """Between `.float()` and the loss, as a model's own forward may do it, in a model whose logits are not fp32."""
    model, ids = llama().bfloat16(), tokens()
    liger_patch.auto(model)
    logits = model(ids, labels=ids).logits
    cast = logits.float()
    assert (logits.dtype, cast.dtype) == (torch.bfloat16, torch.float32)
    cast.mul_(3.0)
    expected = F.cross_entropy(3.0 * logits[:, :-1].float().reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(model.loss_function(cast, ids, VOCAB), expected)


def test_logits_are_those_of_the_forward_pass_in_gradient_mode_and_autocast_too():
    ids = tokens()
    stock, ours = llama(), llama()
    liger_patch.auto(ours)
    with torch.no_grad():
        silent = ours(ids, labels=ids).logits
    assert not silent.requires_grad
    assert not (silent + 0).requires_grad
    loud = ours(ids, labels=ids).logits
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loud.argmax(-1)
    assert loud.requires_grad
    torch.testing.assert_close(loud.materialize(), stock(ids).logits)
    loud.square().mean().backward()
    stock(ids).logits.square().mean().backward()
    same_gradients(ours, stock)


def test_logits_under_a_function_transform():
    """Tensors under a transform have no storage that tells whether the weight is here."""
    stock, ours, ids = llama(), llama(), tokens()
    liger_patch.auto(ours)

    def loss(parameters, model):
        return torch.func.functional_call(model, parameters, (ids,), {"labels": ids}).logits.square().mean()

    parameters = {name: p.detach() for name, p in stock.named_parameters()}
    grads, expected = (torch.func.grad(loss)(parameters, model) for model in (ours, stock))
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_backward_hooks_of_the_head_are_called(register, when):
    seen: dict[str, list[torch.Tensor]] = {"stock": [], "ours": []}
    models = {"stock": llama(), "ours": llama()}
    if when == "after":
        assert liger_patch.auto(models["ours"]).where("left") == ()
    for name, model in models.items():

        def hook(module, *grads, name=name):
            seen[name].append(grads[-1][0])
            return

        handle = getattr(model.lm_head, register)(hook)
    if when == "before":
        (left,) = liger_patch.auto(models["ours"]).where("left")
        assert (left.path, left.op) == ("lm_head", "linear_cross_entropy")
        assert "has backward hooks" in left.why
    ids = tokens()
    for model in models.values():
        model(ids, labels=ids).loss.backward()
    assert len(seen["ours"]) == len(seen["stock"]) == 1
    torch.testing.assert_close(seen["ours"][0], seen["stock"][0])
    same_gradients(models["ours"], models["stock"])
    if when == "after":
        handle.remove()
        assert not isinstance(models["ours"](ids, labels=ids).logits, torch.Tensor)


# --- the activation of a gated MLP ------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def forward(self, x):
        return 2.0 * x


def exchanged(mlp):
    mlp.act_fn = Scaled()


def hooked(mlp):
    mlp.act_fn.register_forward_hook(lambda module, args, out: out * 2.0)


def pre_hooked(mlp):
    mlp.act_fn.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))


def replaced(mlp):
    mlp.act_fn.forward = lambda x: 2.0 * x


@pytest.mark.parametrize("change", [exchanged, hooked, pre_hooked, replaced])
def test_an_activation_that_is_no_longer_silu_is_called(change):
    same(lambda model: change(model.model.layers[0].mlp))


def test_an_activation_with_hooks_is_left():
    stock, ours, ids = llama(), llama(), tokens()
    for model in (stock, ours):
        hooked(model.model.layers[0].mlp)
    (left,) = liger_patch.auto(ours).where("left")
    assert (left.path, left.op) == ("model.layers.0.mlp", "swiglu")
    assert "hooks on its act_fn" in left.why
    torch.testing.assert_close(ours(ids, labels=ids).loss, stock(ids, labels=ids).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copys_activation_is_the_one_that_was_proved(copied, monkeypatch, fresh_compiler):
    import liger_fn

    calls = []
    model, ids = llama(), tokens()
    liger_patch.auto(model)
    model = copied(model)
    for layer in model.model.layers:
        assert layer.mlp.forward.__self__.act_fn is layer.mlp.act_fn
    original = liger_fn.swiglu
    monkeypatch.setattr(liger_fn, "swiglu", lambda *args, **options: calls.append(1) or original(*args, **options))
    model(ids, labels=ids)
    assert len(calls) == 2
    monkeypatch.undo()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, labels=ids).loss, llama()(ids, labels=ids).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("edit", [lambda out: out * 3.0, lambda out: out.tanh(), lambda out: out.mul_(3.0), masked])
def test_edits_inside_compiled_code_reach_the_loss(edit, fresh_compiler):
    stock, ours, ids = llama(), llama(), tokens()
    liger_patch.auto(ours)
    for model in (stock, ours):
        model.lm_head.register_forward_hook(lambda module, args, out: edit(out))
    expected = stock(ids, labels=ids).loss
    got = torch.compile(ours, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_the_fused_loss_is_what_ran():
    """The models above are fused unless something stands in the way: a guard for this file's other tests."""
    model, ids = llama(), tokens()
    liger_patch.auto(model)
    output = model(ids, labels=ids, output_hidden_states=True)
    x = output.hidden_states[-1].reshape(-1, 32)
    torch.testing.assert_close(
        output.loss, linear_cross_entropy(x, model.lm_head.weight, F.pad(ids, (0, 1), value=-100)[:, 1:].reshape(-1))
    )
