"""The head: every argument that `ForCausalLMLoss` honours, and the object that stands where logits would."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree
from transformers import LlamaForCausalLM

import liger_patch

from .models import VOCAB, labels_of, llama, same_gradients, tokens


@pytest.fixture
def pair():
    """A stock and a patched model, equal otherwise."""
    stock, ours = llama(), llama()
    liger_patch.auto(ours)
    return stock, ours


def check(pair, *args, **kwargs):
    """Both models give the same loss and gradients for a call."""
    stock, ours = pair
    losses = [model(*args, **kwargs).loss for model in (stock, ours)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for model, loss in zip((stock, ours), losses, strict=True):
        model.zero_grad()
        loss.backward()
    same_gradients(ours, stock)


SHIFTED = F.pad(labels_of(tokens(seed=5)), (0, 1), value=-100)[..., 1:].contiguous()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_items_in_batch": 13},
        {"num_items_in_batch": torch.tensor(13)},
        {"ignore_index": 7},
        {"ignore_index": 7, "num_items_in_batch": 4},
        {"shift_labels": SHIFTED},
        {"shift_labels": SHIFTED, "num_items_in_batch": 5},
        {"shift_labels": SHIFTED[:, -3:].contiguous(), "logits_to_keep": 3},
        {"shift_labels": SHIFTED[:, [1, 4]], "logits_to_keep": torch.tensor([1, 4])},
        {"attention_mask": (torch.arange(11) < torch.tensor([[9], [11]])).long()},
        {"output_hidden_states": True},
        {"use_cache": True},
    ],
    ids=lambda arguments: "-".join(arguments) or "plain",
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_arguments_of_the_loss(pair, arguments, training):
    for model in pair:
        model.train(training)
    ids = tokens()
    labels = labels_of(ids)
    if "ignore_index" in arguments:
        labels = labels.masked_fill(labels == -100, 7)
    check(pair, ids, labels=labels, **arguments)


def test_labels_by_position(pair):
    ids = tokens()
    check(pair, ids, None, None, None, None, labels_of(ids))
    assert not isinstance(pair[1](ids, None, None, None, None, ids).logits, torch.Tensor)


def test_embeddings_as_input(pair):
    check(pair, inputs_embeds=torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0)), labels=tokens())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_tied_head(tied):
    stock, ours = llama(tie_word_embeddings=tied), llama(tie_word_embeddings=tied)
    liger_patch.auto(ours)
    check((stock, ours), tokens(), labels=tokens())


def test_a_head_with_a_bias():
    stock, ours = llama(), llama()
    for model in (stock, ours):
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, VOCAB))
    liger_patch.auto(ours)
    check((stock, ours), tokens(), labels=tokens())


def test_a_tuple_instead_of_a_dictionary(pair):
    ids = tokens()
    stock, ours = (model(ids, labels=ids, return_dict=False) for model in pair)
    assert isinstance(ours, tuple)
    torch.testing.assert_close(ours[0], stock[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[1] + 0, stock[1])


def test_every_label_ignored_is_a_loss_of_zero(pair):
    ids = tokens()
    for training in (True, False):
        ours = pair[1].train(training)
        loss = ours(ids, labels=torch.full_like(ids, -100)).loss
        loss.backward()
        assert loss == 0
        assert all(not p.grad.any() for p in ours.parameters() if p.grad is not None)


def test_targets_that_do_not_match_the_kept_positions(pair):
    ids = tokens()
    for training in (True, False):
        with pytest.raises(ValueError, match=r"logits for 6 positions but targets for 22.*shift_labels"):
            pair[1].train(training)(ids, labels=ids, logits_to_keep=3)


def test_no_labels_and_evaluation_give_ordinary_logits(pair):
    ids = tokens()
    stock, ours = pair
    for call in ({}, {"labels": ids}):
        for training in (True, False):
            if call and training:
                continue
            expected, got = stock.train(training)(ids, **call), ours.train(training)(ids, **call)
            assert type(got.logits) is torch.Tensor
            torch.testing.assert_close(got.logits, expected.logits)


def test_generation(pair):
    ids = tokens(batch=1, length=4)
    stock, ours = (m.eval().generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None) for m in pair)
    assert ids.shape[1] + 6 == ours.shape[1]
    assert torch.equal(ours, stock)


def test_logits_in_training_materialise_on_demand(pair):
    ids = tokens()
    expected, got = (model(ids, labels=ids).logits for model in pair)
    assert not isinstance(got, torch.Tensor)
    assert (got.shape, got.ndim, got.device, len(got), got.size(-1)) == (expected.shape, 3, expected.device, 2, VOCAB)
    assert got.source._logits is None, "the shape alone must not compute logits"
    close = torch.testing.assert_close
    close(got[:, -1], expected[:, -1])
    close(got.float().view(-1, VOCAB), expected.view(-1, VOCAB))
    close(torch.log_softmax(got, dim=-1), expected.log_softmax(-1))
    close(torch.cat([got, got]), torch.cat([expected, expected]))
    close(got / 2 + 1, expected / 2 + 1)
    close(1 - got, 1 - expected)
    close(-got @ torch.ones(VOCAB), -expected @ torch.ones(VOCAB))
    close(torch.ones(1, VOCAB) * got, expected)
    assert torch.equal(got > 0, expected > 0)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    assert got.dtype == torch.float32
    assert got.requires_grad
    assert [row.shape for row in got] == [row.shape for row in expected]
    close(torch.from_numpy(got.detach().numpy()), expected.detach())
    with pytest.raises(AttributeError):
        _ = got.no_such_method


def test_whoever_walks_an_output_finds_the_loss_in_the_carrier(pair):
    """Sharding libraries hook the gathering of a layer's weight in backward to the tensors in what the layer returned."""
    ids = tokens()
    output = pair[1](ids, labels=ids)
    leaves, structure = _pytree.tree_flatten(output.logits)
    assert leaves == [output.loss]
    again = _pytree.tree_unflatten([output.loss * 2], structure)
    assert again.loss == 2 * output.loss
    assert again.source is output.logits.source
    assert dataclasses.replace(output.logits, loss=output.loss * 3).loss == 3 * output.loss


def test_materialised_logits_carry_gradients(pair):
    ids = tokens()
    for model in pair:
        output = model(ids, labels=ids)
        (output.loss + output.logits.square().mean()).backward()
    same_gradients(pair[1], pair[0])


def test_logits_after_an_optimizer_step_are_refused(pair):
    ids, ours = tokens(), pair[1]
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    output = ours(ids, labels=ids)
    output.loss.backward()
    kept = ours(ids, labels=ids).logits
    kept.materialize()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"weight has changed since the forward pass.*before the step"):
        output.logits.argmax(-1)
    assert kept[0].shape == (11, VOCAB)


def test_copies_of_an_output_hold_values_and_no_model(pair):
    ids = tokens()
    output = pair[1](ids, labels=ids)
    for logits in (copy.deepcopy(output.logits), pickle.loads(pickle.dumps(output.logits))):
        assert type(logits) is torch.Tensor
        assert torch.equal(logits, output.logits.materialize())


def test_a_loss_that_the_user_set_before_is_respected():
    def own(logits, labels, vocab_size, **kwargs):
        return logits.float().view(-1, vocab_size).square().mean()

    stock, ours, ids = llama(), llama(), tokens()
    stock.loss_function = ours.loss_function = own
    report = liger_patch.auto(ours)
    assert [row.op for row in report.where("left")] == ["linear_cross_entropy", "cross_entropy"]
    assert all("own" in row.why for row in report.where("left"))
    assert ours.loss_function is own
    check((stock, ours), ids, labels=ids)


def test_a_loss_that_the_user_sets_afterwards_is_respected(pair):
    seen = []

    def own(logits, labels, vocab_size, **kwargs):
        seen.append(type(logits))
        return logits.float().view(-1, vocab_size).square().mean()

    for model in pair:
        model.loss_function = own
    check(pair, tokens(), labels=tokens())
    assert seen == [torch.Tensor, torch.Tensor]
    liger_patch.revert(pair[1])
    assert pair[1].loss_function is own


def test_a_model_that_asks_for_another_loss_than_its_caller(pair):
    """A forward that edits the labels on their way to the loss gets the loss of the edited labels."""
    stock, ours = pair
    ids = tokens()
    edited = ids.masked_fill(ids > 64, -100)
    got = ours.loss_function(ours(ids, labels=ids).logits, edited, VOCAB)
    torch.testing.assert_close(got, stock(ids, labels=edited).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("inner", [3, torch.tensor(3), None], ids=str)
@pytest.mark.parametrize("outer", [5, torch.tensor(5), None], ids=str)
def test_a_model_that_counts_its_items_itself(inner, outer, pair):
    """A forward that passes another number of items to its loss than its caller gave it."""

    class Counting(LlamaForCausalLM):
        def forward(self, *args, labels=None, num_items_in_batch=None, **kwargs):
            output = super().forward(*args, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs)
            output.loss = self.loss_function(output.logits, labels, VOCAB, num_items_in_batch=inner)
            return output

    for model in pair:
        liger_patch.revert(model)
        model.__class__ = Counting
    liger_patch.auto(pair[1], verify=False)
    check(pair, tokens(), labels=tokens(), num_items_in_batch=outer)


def test_what_logits_are_is_known_without_computing_them(pair):
    ids = tokens()
    for dtype in (None, torch.bfloat16, torch.float16):
        for model in pair:
            model.lm_head.weight.grad = None
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            expected, got = (model(ids, labels=ids).logits for model in pair)
        for want, have in ((expected, got), (expected.float(), got.float())):
            for name in ("dtype", "requires_grad", "device", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "ndim"):
                assert getattr(have, name) == getattr(want, name), name
            for name in ("element_size", "is_floating_point", "is_complex", "numel", "dim", "size"):
                assert getattr(have, name)() == getattr(want, name)(), name
            assert not hasattr(have, "ds_id")
            assert not hasattr(have, "keys")
            assert not have.source.touched
    with torch.no_grad():
        expected, got = (model(ids, labels=ids).logits for model in pair)
    assert got.requires_grad is expected.requires_grad is False


def test_an_error_in_forward_leaves_no_labels_behind(pair):
    ours, ids = pair[1], tokens()
    handle = ours.model.norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        ours(ids, labels=ids)
    handle.remove()
    assert ours.lm_head.forward.__self__.requests == []
    assert type(ours(ids).logits) is torch.Tensor
    assert type(ours.lm_head(torch.randn(1, 32))) is torch.Tensor


def test_a_model_inside_its_own_forward(pair):
    stock, ours = pair
    ids, inner = tokens(), tokens(seed=9, length=5)

    def run(model):
        def hook(module, args, output):
            handle.remove()
            within.append(model(inner, labels=inner))
            within.append(model(inner))

        within: list = []
        handle = model.model.norm.register_forward_hook(hook)
        return model(ids, labels=ids), *within

    for got, expected in zip(run(ours), run(stock), strict=True):
        torch.testing.assert_close(got.logits + 0, expected.logits)
        if expected.loss is not None:
            torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)


def test_the_head_by_itself_gives_logits(pair):
    x = torch.randn(3, 32)
    torch.testing.assert_close(pair[1].lm_head(x), pair[0].lm_head(x))


def test_training_computes_no_logits(pair):
    ids, ours = tokens(), pair[1]
    output = ours(ids, labels=ids)
    output.loss.backward()
    assert output.logits.source._logits is None
