"""Proofs: what they catch, and what they leave alone."""

from __future__ import annotations

import inspect
import re
import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

import liger_patch
from liger_patch import GLU, Arch, Head, Norm, PatchError, Rope, _registry

from .models import config, dicts, llama, tokens


def renamed(base: type, **methods: object) -> type:
    """A class of the same name with other methods, as another release of transformers would have it."""
    return type(base.__name__, (base,), {**methods, "__module__": base.__module__})


def norm(cast_last: bool = False, offset: float = 0.0, eps: float = 0.0):
    def forward(self, hidden_states):
        x = hidden_states.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon + eps)
        if cast_last:
            return (x * (self.weight.float() + offset)).to(hidden_states.dtype)
        return (self.weight + offset) * x.to(hidden_states.dtype)

    return renamed(modeling_llama.LlamaRMSNorm, forward=forward)


def with_norm(cls: type, dtype: torch.dtype) -> LlamaForCausalLM:
    model = llama().to(dtype)
    for module in model.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            module.__class__ = cls
            nn.init.ones_(module.weight)
    return model


def refused(model: nn.Module, op: str, match: str) -> None:
    before = dicts(model)
    with pytest.raises(PatchError, match=rf"(?s){op}: .*{match}.*{op}=False"):
        liger_patch.auto(model)
    assert dicts(model) == before
    with pytest.raises(PatchError, match=match):
        liger_patch.verify(model)
    report = liger_patch.auto(model, strict=False)
    assert {row.op for row in report.where("left")} == {op}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "changes", [{"offset": 1.0}, {"eps": 1e-6}, {"eps": 1e-5}], ids=lambda changes: next(f"{k}={v}" for k, v in changes.items())
)
def test_a_norm_of_another_release(changes, dtype):
    refused(with_norm(norm(**changes), dtype), "rms_norm", "LlamaRMSNorm at .*the output is off")


def test_a_norm_of_another_cast():
    entry = Arch("llama-like", norm=Norm("LlamaRMSNorm", cast="gemma"))
    liger_patch.register(entry, replace=True)
    again = with_norm(norm(cast_last=True), torch.bfloat16)
    again.config.model_type = "llama-like"
    assert liger_patch.auto(again).where("patched")


def test_an_activation_that_is_not_the_entrys():
    why = r"LlamaMLP at .* and 1 more: its act_fn is .*hidden_act='tanh'.*there are functions for silu"
    refused(llama(hidden_act="tanh"), "swiglu", why)


def test_an_mlp_of_another_release():
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))

    model = llama()
    for layer in model.model.layers:
        layer.mlp.__class__ = renamed(modeling_llama.LlamaMLP, forward=forward)
    refused(model, "swiglu", "the output is off")


def attention_over(**names: object) -> type:
    """Attention whose module has other globals."""
    original = modeling_llama.LlamaAttention.forward
    module = types.ModuleType("another_release")
    module.__dict__.update(original.__globals__, __name__="another_release", **names)
    forward = types.FunctionType(original.__code__, module.__dict__, "forward", original.__defaults__)
    return renamed(modeling_llama.LlamaAttention, forward=forward)


def interleaved(q, k, cos, sin, unsqueeze_dim=1):
    def rotate(x):
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def reordered(q, k, sin, cos, unsqueeze_dim=1):
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


@pytest.mark.parametrize(("function", "match"), [(interleaved, "the queries is off|queries is off"), (reordered, "takes .q, k, sin, cos")])
def test_a_rotary_function_of_another_release(function, match):
    model, cls = llama(), attention_over(apply_rotary_pos_emb=function)
    for layer in model.model.layers:
        layer.self_attn.__class__ = cls
    refused(model, "rope", match)


def test_post_processing_that_the_entry_does_not_know():
    """A soft cap between the output layer and the loss: the model's own forward runs, and the proof sees the difference."""

    class LlamaForCausalLM(modeling_llama.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            output = super().forward(input_ids=input_ids, **kwargs)
            output.logits = 2 * torch.tanh(output.logits / 2)
            if labels is not None:
                output.loss = self.loss_function(output.logits, labels, self.config.vocab_size)
            return output

    torch.manual_seed(0)
    model, ids = LlamaForCausalLM(config()).train(), tokens()
    expected = model(input_ids=ids, labels=ids).loss
    liger_patch.auto(model, verify=False)
    # Anything done to the carrier but a cast makes it logits, so even an unknown post-processing gives the right loss.
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected, rtol=1e-6, atol=0)


def test_a_loss_that_is_not_the_declared_one():
    """A causal LM that does to its loss what the replaced parts cannot know of."""

    class LlamaForCausalLM(modeling_llama.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
            if labels is not None and type(output.logits) is not torch.Tensor:
                output.loss = output.loss * 1.001
            return output

    model = LlamaForCausalLM(config()).train()
    before = dicts(model)
    with pytest.raises(PatchError, match=r"linear_cross_entropy: Linear at lm_head: .*the loss is off"):
        liger_patch.auto(model)
    assert dicts(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("first", [True, False], ids=["patched", "stock"])
def test_verify_proves_swaps_and_the_whole_model(first, dtype):
    model = llama().to(dtype)
    if first:
        liger_patch.auto(model)
    before = dicts(model)
    report = liger_patch.verify(model)
    assert {row.status for row in report} == {"proved"}
    assert report.rows[-1].path == "the whole model"
    assert dicts(model) == before
    assert all(p.grad is None for p in model.parameters())


def gated(self, hidden_states, gate=None):
    return hidden_states


def unlabelled(self, input_ids=None):
    return self.lm_head(self.model(input_ids)[0])


# What another release may have changed: in a class of the code, or (an entry that still speaks of the past) by taking it away.
DRIFTS = {
    "a norm of two inputs": ("LlamaRMSNorm", gated, "rms_norm", "LlamaRMSNorm at .*more: its forward takes more than one input"),
    "an MLP of two inputs": ("LlamaMLP", gated, "swiglu", "LlamaMLP at .*more: its forward takes more than one input"),
    "no labels": ("LlamaForCausalLM", unlabelled, "linear_cross_entropy", "LlamaForCausalLM.forward takes no labels"),
    "no norm": (Arch("llama", norm=Norm("LlamaOldNorm")), None, "rms_norm", "no module of class LlamaOldNorm in LlamaForCausalLM"),
    "no MLP": (Arch("llama", mlp=GLU("LlamaOldMLP")), None, "swiglu", "no module of class LlamaOldMLP in LlamaForCausalLM"),
    "no eps": (Arch("llama", norm=Norm("LlamaRMSNorm", eps="old")), None, "rms_norm", "LlamaRMSNorm at .*it has no eps under the name old"),
    "no up": (Arch("llama", mlp=GLU("LlamaMLP", up="old")), None, "swiglu", "LlamaMLP at .*it has no old"),
    "no rotation": (Arch("llama", rope=Rope("turn")), None, "rope", "turn: no module's forward reads a global .*LlamaAttention.forward is"),
    "no head": (Arch("llama", head=Head("old")), None, "linear_cross_entropy", "LlamaForCausalLM has no old"),
    "no cap": (
        *(Arch("llama", head=Head(softcap="config.old")), None, "linear_cross_entropy"),
        "Linear at lm_head: .*AttributeError: 'LlamaConfig' object has no attribute 'old'",
    ),
}


@pytest.mark.parametrize("name", DRIFTS)
def test_an_error_of_another_release_says_what_one_needs(name, monkeypatch):
    """Which entry, which class, of which transformers, and what to do; where parts may stay stock, the same is a line of the report."""
    what, forward, op, why = DRIFTS[name]
    model = llama()
    if isinstance(what, Arch):
        monkeypatch.setitem(_registry._entries, "llama", what)
    else:
        for module in model.modules():
            if type(module).__name__ == what:
                module.__class__ = renamed(type(module), forward=forward)
    before = dicts(model)
    with pytest.raises(PatchError) as error:
        liger_patch.auto(model)
    assert dicts(model) == before
    version = transformers.__version__.replace(".", r"\.")
    first = rf"auto: LlamaForCausalLM of transformers {version} is not what the entry for 'llama' describes, and nothing was changed\.\n"
    last = rf"\nLeave it stock with .*{op}=False.* or strict=False, or describe the model as it is with liger_patch\.register\("
    assert re.search(rf"(?s)^{first}.*  {op}: .*{why}.*{last}", str(error.value)), str(error.value)
    report = liger_patch.auto(model, strict=False)
    assert op in {row.op for row in report.where("left") if row.why and row.was == row.now}
    assert not report.where("failed")


def test_verify_finds_a_wrong_function(monkeypatch):
    import liger_fn

    model = llama()
    liger_patch.auto(model)
    monkeypatch.setattr(liger_fn, "swiglu", lambda gate, up, **_: F.silu(gate) * up * (1 + 1e-5))
    with pytest.raises(PatchError, match=r"verify: .*(?s:.*)swiglu: LlamaMLP at model.layers.0.mlp and 1 more: .*the output is off by"):
        liger_patch.verify(model)


def test_verify_finds_a_wrong_gradient(monkeypatch):
    import liger_fn

    def leaky(x, weight, eps, **kwargs):
        y = original(x, weight, eps, **kwargs)
        return y + 1e-4 * (x - x.detach())

    original = liger_fn.rms_norm
    monkeypatch.setattr(liger_fn, "rms_norm", leaky)
    with pytest.raises(PatchError, match=r"the gradient of input is off"):
        liger_patch.auto(llama())


def test_verify_finds_what_only_the_whole_model_shows(monkeypatch):
    """Proofs run on stand-ins; a fault that they cannot see is left to the run end to end."""
    from liger_patch import _proof

    model = llama()
    monkeypatch.setattr(_proof, "prove_norm", lambda swap, at: None)
    for module in model.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            module.__class__ = norm(offset=0.01)
    with pytest.raises(PatchError, match=r"the whole model: the loss is off"):
        liger_patch.verify(model)


def test_what_cannot_be_run_is_reported():
    with torch.device("meta"):
        model = LlamaForCausalLM(config())
    last = liger_patch.verify(model).rows[-1]
    assert (last.status, last.why) == ("not verified", "weights are on the meta device")


def test_a_model_too_large_to_copy_is_reported(monkeypatch):
    from liger_patch import _verify

    monkeypatch.setattr(_verify, "MEMORY_LIMIT", 1000)
    last = liger_patch.verify(llama()).rows[-1]
    assert last.status == "not verified"
    assert "a copy in fp64 takes" in last.why


def test_random_state_and_modes_are_left_alone():
    model = llama()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        liger_patch.auto(model)
        liger_patch.verify(model)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert liger_patch.plan(model.eval()).where("already")
    assert not any(module.training for module in model.modules())


def test_without_proofs_nothing_runs(monkeypatch):
    from liger_patch import _proof

    monkeypatch.setattr(_proof, "compare", lambda *args, **kwargs: pytest.fail("a proof ran"))
    liger_patch.auto(llama(), verify=False)
    liger_patch.plan(llama(), verify=False)


def test_equal_layers_are_proved_once(monkeypatch):
    from liger_patch import _proof

    calls = []
    original = _proof.prove_norm
    monkeypatch.setattr(_proof, "prove_norm", lambda swap, at: calls.append(original(swap, at)))
    model = llama()
    liger_patch.plan(model)
    assert len(calls) == 1
    model.model.norm.variance_epsilon = 1e-3
    liger_patch.plan(model)
    assert len(calls) == 3


def test_entries_are_checked():
    with pytest.raises(TypeError, match=r"expected a liger_patch.Arch, got dict"):
        liger_patch.register({"model_type": "x"})
    with pytest.raises(ValueError, match=r"'llama' has an entry already; pass replace=True"):
        liger_patch.register(Arch("llama"))
    with pytest.raises(ValueError, match=r"act must be one of silu, .*, got 'swish'"):
        liger_patch.GLU("LlamaMLP", act="swish")


def test_supported_lists_operations():
    liger_patch.register(Arch("half-known", norm=Norm("X"), head=Head()), replace=True)
    table = liger_patch.supported()
    assert table["llama"] == ("rms_norm", "swiglu", "rope", "linear_cross_entropy", "cross_entropy")
    assert table["half-known"] == ("rms_norm", "linear_cross_entropy", "cross_entropy")
    assert list(table) == sorted(table)


def test_the_public_names():
    assert all(hasattr(liger_patch, name) for name in liger_patch.__all__)
    for name in ("auto", "plan", "revert", "patched", "verify", "supported", "register"):
        assert name in liger_patch.__all__
        assert inspect.getdoc(getattr(liger_patch, name))


@pytest.mark.parametrize("vocab", [4096, 8192])
def test_a_head_is_proved_whatever_the_threads(vocab):
    """The order in which a library sums depends on them, and on how many rows count."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert liger_patch.auto(llama(vocab_size=vocab)).where("patched")
    finally:
        torch.set_num_threads(before)
