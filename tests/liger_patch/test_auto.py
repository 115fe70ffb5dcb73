"""`auto`: what it changes, what it says, and what it refuses."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama import modeling_llama

import liger_patch
from liger_patch import Arch, Norm, PatchError

from .models import config, dicts, llama, tokens

OPS = ("rms_norm", "swiglu", "rope", "causal_mask", "linear_cross_entropy", "cross_entropy")
FUNCTIONS = tuple(op for op in OPS if op != "causal_mask")


def namespace(module: object) -> dict[str, object]:
    """Everything another model could see of a module: its names, and the attributes of its classes and functions."""
    seen: dict[str, object] = {}
    for name, value in vars(module).items():
        seen[name] = id(value)
        if inspect.isclass(value):
            seen |= {f"{name}.{key}": id(item) for key, item in vars(value).items() if key not in ("__dict__", "__weakref__")}
        elif inspect.isfunction(value):
            seen[f"{name}()"] = (id(value.__code__), id(value.__globals__), value.__defaults__ and len(value.__defaults__))
    return seen


def test_only_this_instance_changes():
    other, ids = llama(), tokens()
    with torch.no_grad():
        expected = other(ids, labels=ids)
    modules = (modeling_llama, torch.nn, torch.nn.functional, torch.nn.Module, transformers.PreTrainedModel, torch.Tensor, torch)
    before, instance = [namespace(m) for m in modules], dicts(other)
    model = llama()
    liger_patch.auto(model)
    model(ids, labels=ids).loss.backward()
    assert [namespace(m) for m in modules] == before
    assert dicts(other) == instance
    with torch.no_grad():
        after = other(ids, labels=ids)
    assert torch.equal(after.logits, expected.logits)
    assert torch.equal(after.loss, expected.loss)


def test_every_function_is_called(monkeypatch):
    import liger_fn

    calls = dict.fromkeys(FUNCTIONS, 0)

    def counted(name):
        original = getattr(liger_fn, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    model, ids = llama(), tokens()
    liger_patch.auto(model)
    for name in FUNCTIONS:
        monkeypatch.setattr(liger_fn, name, counted(name))
    model(ids, labels=ids)
    assert calls == {"rms_norm": 5, "swiglu": 2, "rope": 2, "linear_cross_entropy": 1, "cross_entropy": 0}
    model.eval()(ids, labels=ids)
    assert calls == {"rms_norm": 10, "swiglu": 4, "rope": 4, "linear_cross_entropy": 1, "cross_entropy": 1}


def test_the_report_names_every_place_and_shares_lines_between_layers():
    report = liger_patch.auto(llama())
    assert (report.model_type, report.model_class) == ("llama", "LlamaForCausalLM")
    assert [(row.path, row.was, row.now) for row in report if row.op == "swiglu"] == [
        (f"model.layers.{i}.mlp", "LlamaMLP", "liger_fn.swiglu") for i in range(2)
    ]
    assert {row.status for row in report} == {"patched"}
    assert tuple(dict.fromkeys(row.op for row in report)) == OPS
    text = str(report)
    assert "model.layers.*.mlp  ×2" in text
    assert "liger_fn.linear_cross_entropy" in text
    assert len(text.splitlines()) == 10


def test_twice_is_once():
    model = llama()
    first = liger_patch.auto(model)
    state = dicts(model)
    second = liger_patch.auto(model)
    assert dicts(model) == state
    assert [(row.path, row.now) for row in second] == [(row.path, row.now) for row in first]
    assert {row.status for row in second} == {"already"}


def test_a_second_call_adds_what_the_first_left():
    model, ids = llama(), tokens()
    liger_patch.auto(model, cross_entropy=False, rope=False)
    report = liger_patch.auto(model)
    assert {row.op for row in report.where("patched")} == {"rope", "cross_entropy"}
    assert {row.status for row in liger_patch.plan(model)} == {"already"}
    expected = llama()(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids).loss, expected, rtol=1e-6, atol=0)
    before = dicts(llama_untouched := llama())
    liger_patch.auto(llama_untouched, cross_entropy=False)
    liger_patch.auto(llama_untouched)
    liger_patch.revert(llama_untouched)
    assert dicts(llama_untouched) == before


@pytest.mark.parametrize("op", OPS)
def test_an_operation_can_be_left_out(op):
    model, ids = llama(), tokens()
    report = liger_patch.auto(model, **{op: False})
    assert {(row.op, row.status) for row in report} == {(each, "left" if each == op else "patched") for each in OPS}
    assert all(row.why == f"{op}=False" for row in report.where("left"))
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.loss, llama()(ids, labels=ids).loss, rtol=1e-6, atol=0)
    assert isinstance(output.logits, torch.Tensor) == (op == "linear_cross_entropy")


def test_unknown_operations_are_type_errors():
    with pytest.raises(TypeError, match=r"'rmsnorm'.*rms_norm, layer_norm, .*, rope, causal_mask, experts, linear_cross_entropy"):
        liger_patch.auto(llama(), rmsnorm=True)
    with pytest.raises(TypeError, match="rope must be True or False, got 1"):
        liger_patch.plan(llama(), rope=1)


def test_an_unknown_model_type_says_what_is_known_and_how_to_add_one():
    model = llama()
    model.config.model_type = "lama"
    with pytest.raises(PatchError, match=r"'lama'. Near to it: llama.*python -m liger_patch.*liger_patch.suggest"):
        liger_patch.auto(model)


def test_something_that_is_no_transformers_model():
    with pytest.raises(PatchError, match=r"Linear holds no transformers model with a config.model_type"):
        liger_patch.auto(nn.Linear(2, 2))


def in_a_block(model, **which):
    with liger_patch.patched(model, **which):
        pass


@pytest.mark.parametrize(
    ("who", "call"),
    [("auto", liger_patch.auto), ("plan", liger_patch.plan), ("verify", liger_patch.verify), ("patched", in_a_block)],
)
def test_an_error_names_the_function_that_was_called(who, call):
    model = llama()
    with pytest.raises(TypeError, match=rf"^{who}: unknown operation 'ropes'"):
        call(model, ropes=False)
    with pytest.raises(TypeError, match=rf"^{who}: rope must be True or False, got 1"):
        call(model, rope=1)
    with pytest.raises(PatchError, match=rf"^{who}: Linear holds no"):
        call(nn.Linear(2, 2))
    with pytest.raises(PatchError, match=r"^revert: Linear holds no"):
        liger_patch.revert(nn.Linear(2, 2))
    model.config.model_type = "unheard-of"
    with pytest.raises(PatchError, match=rf"^{who}: no entry for model type 'unheard-of'"):
        call(model)
    broken = llama(hidden_act="tanh")
    if who != "plan":
        with pytest.raises(PatchError, match=rf"^{who}: LlamaForCausalLM of transformers \S+ is not what"):
            call(broken)


def test_several_models_in_one_wrapper_are_refused_by_name():
    pair = nn.ModuleDict({"student": llama(), "teacher": llama()})
    before = dicts(pair)
    for who in ("auto", "plan", "verify", "revert"):
        match = rf"^{who}: .* several .*: student \(LlamaForCausalLM\), teacher \(LlamaForCausalLM\)\. Pass the one"
        with pytest.raises(PatchError, match=match):
            getattr(liger_patch, who)(pair)
    assert dicts(pair) == before
    assert {row.status for row in liger_patch.auto(pair["student"])} == {"patched"}


def test_a_wrapper_that_holds_a_part_of_its_model_too():
    model = llama()
    wrapper = nn.ModuleDict({"body": model.model, "whole": model, "again": model})
    assert liger_patch.auto(wrapper).model_class == "LlamaForCausalLM"
    assert {row.status for row in liger_patch.plan(model)} == {"already"}


def test_plan_changes_nothing():
    model = llama()
    before = dicts(model)
    report = liger_patch.plan(model, swiglu=False)
    assert dicts(model) == before
    assert {(row.op, row.status) for row in report} == {(op, "left" if op == "swiglu" else "planned") for op in OPS}


def test_an_error_leaves_nothing_half_applied():
    model = llama()

    class LlamaRMSNorm(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states):
            return 1.01 * super().forward(hidden_states)

    model.model.norm.__class__ = LlamaRMSNorm
    before = dicts(model)
    with pytest.raises(
        PatchError, match=r"(?s)nothing was changed.*LlamaRMSNorm at model.norm:.*the output is off.*rms_norm=False or strict=False"
    ):
        liger_patch.auto(model)
    assert dicts(model) == before
    assert [row.path for row in liger_patch.plan(model).where("failed")] == ["model.norm"]

    report = liger_patch.auto(model, strict=False)
    (left,) = report.where("left")
    assert left.path == "model.norm"
    assert "liger_fn.rms_norm does not compute what LlamaRMSNorm does here" in left.why
    assert "forward" not in model.model.norm.__dict__
    assert "forward" in model.model.layers[0].input_layernorm.__dict__


def test_a_forward_that_someone_else_replaced_is_not_ours_to_replace():
    model = llama()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: x
    with pytest.raises(PatchError, match=r"LlamaMLP at model.layers.1.mlp: its forward was replaced on this instance"):
        liger_patch.auto(model)
    liger_patch.auto(model, strict=False)
    assert mlp.forward(3) == 3


def test_base_models_and_classifiers_have_no_head_to_replace():
    base = transformers.LlamaModel(config())
    report = liger_patch.auto(base)
    assert {(row.op, row.status) for row in report} == {(op, "left" if "entropy" in op else "patched") for op in OPS}
    assert all("has no lm_head" in row.why for row in report.where("left"))
    liger_patch.auto(transformers.LlamaForSequenceClassification(config()))


def test_an_entry_that_names_what_is_not_there():
    model = llama()
    model.config.model_type = "drifted"
    liger_patch.register(
        Arch("drifted", norm=Norm("DriftedRMSNorm"), rope=liger_patch.Rope("rotate"), head=liger_patch.Head("output")), replace=True
    )
    with pytest.raises(PatchError) as error:
        liger_patch.auto(model)
    text = str(error.value)
    assert "no module of class DriftedRMSNorm in LlamaForCausalLM" in text
    assert "no module's forward reads a global of this name (LlamaAttention.forward is transformers.models.llama" in text
    assert "LlamaForCausalLM has no output" in text
    assert "rms_norm=False, rope=False, linear_cross_entropy=False, cross_entropy=False or strict=False" in text


def test_before_and_after_a_change_of_dtype():
    ids = tokens()
    first, second = llama(), llama()
    liger_patch.auto(first)
    first.to(torch.bfloat16)
    second.to(torch.bfloat16)
    liger_patch.auto(second)
    assert torch.equal(first(ids, labels=ids).loss, second(ids, labels=ids).loss)


def test_on_the_meta_device():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config())
    assert {row.status for row in liger_patch.auto(model)} == {"patched"}


def test_the_signature_stays_readable():
    model = llama()
    expected = inspect.signature(model.forward)
    liger_patch.auto(model)
    assert inspect.signature(model.forward) == expected


def test_accelerate_hooks_before_and_after():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    ids, stock = tokens(), llama()
    expected = stock(ids, labels=ids).loss
    hooked = llama()
    for module in hooked.modules():
        add_hook_to_module(module, ModelHook())
    before = dicts(hooked)
    assert {row.status for row in liger_patch.auto(hooked)} == {"patched"}
    torch.testing.assert_close(hooked(ids, labels=ids).loss, expected, rtol=1e-6, atol=0)
    liger_patch.revert(hooked)
    assert dicts(hooked) == before

    model = llama()
    liger_patch.auto(model)
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    torch.testing.assert_close(model(ids, labels=ids).loss, expected, rtol=1e-6, atol=0)
    liger_patch.revert(model)
    remove_hook_from_module(model, recurse=True)
    assert {row.status for row in liger_patch.plan(model)} == {"planned"}
    assert torch.equal(model(ids, labels=ids).loss, expected)
