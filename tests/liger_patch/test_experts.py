"""The experts of mixtures: whose choice counts, what the registry says of them, and models whose layers are called in other ways."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

import liger_fn
import liger_patch
from liger_patch import Arch, Experts, PatchError, _registry
from liger_patch._experts import ExpertsForward
from liger_patch._swap import installed
from tests.liger_patch import tiny
from tests.liger_patch.test_archs import inputs, logits_of, loss_of, same_gradients
from tests.liger_patch.tiny import PINNED, build

BARE = dict.fromkeys(("rms_norm", "layer_norm", "swiglu", "relu_squared", "rope", "linear_cross_entropy", "cross_entropy"), False)


def patched(model: PreTrainedModel) -> list[Any]:
    return [row for row in liger_patch.auto(model) if row.op == "experts"]


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(installed(module, "forward"), ExpertsForward)]


@pytest.mark.parametrize(
    "model_type",
    [
        *("mixtral", "qwen3_moe", "gpt_oss", "olmoe", "granitemoe", "flint", "qwen4_exp_text"),
        *("ernie4_5_vl_moe", "glm5_next", "qwen3_omni_moe_thinker"),  # of a language model within
    ],
)
def test_the_routers_loss_is_unchanged(model_type: str) -> None:
    """It comes from logits that stay as they were, and its gradient reaches the router beside that of the experts' weights."""
    if model_type == "granitemoe" and transformers.__version__ != PINNED:
        pytest.skip(f"the granitemoe of transformers {transformers.__version__} has no such loss")
    stock = build(model_type)
    stock.config.output_router_logits = stock.config.get_text_config().output_router_logits = True
    model = copy.deepcopy(stock)
    assert {row.status for row in liger_patch.auto(model, verify=False) if row.op == "experts"} == {"patched"}
    ours, theirs = (m(**inputs(m)) for m in (model, stock))
    assert float(theirs.aux_loss.detach()) > 0
    torch.testing.assert_close(ours.aux_loss, theirs.aux_loss)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=2e-6, atol=2e-6)
    same_gradients(model, ours.loss, stock, theirs.loss)


def test_a_layer_that_scales_its_inputs_chooses_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 chooses one expert; its code takes any number."""
    stock = build("llama4_text")
    for module in stock.modules():
        if hasattr(module, "top_k"):
            module.top_k = 3
    model, called = copy.deepcopy(stock), []
    monkeypatch.setattr(liger_fn, "moe_experts", lambda *args, original=liger_fn.moe_experts, **k: called.append(0) or original(*args, **k))
    rows = patched(model)
    called.clear()
    assert [(row.was, row.now, row.status) for row in rows] == [("Llama4TextMoe", "liger_fn.moe_experts", "patched")] * len(rows)
    same_gradients(model, loss_of(model, **inputs(model)), stock, loss_of(stock, **inputs(stock)))
    assert len(called) == len(rows) == 2


def test_a_choice_beyond_the_experts_adds_nothing() -> None:
    """Expert parallelism marks those so that live elsewhere."""
    if transformers.__version__ != PINNED:
        pytest.skip(f"the experts of transformers {transformers.__version__} know no such choice")
    model = build("mixtral")
    model.set_experts_implementation("eager")  # products in groups leave such rows as they find them
    experts = next(module for module in model.modules() if type(module).__name__ == "MixtralExperts")
    x, weight = torch.randn(5, experts.hidden_dim), torch.rand(5, 2)
    index = torch.tensor([[0, 1], [1, 4], [4, 4], [3, 2], [2, 4]])
    want = experts(x, index, weight)
    patched(model)
    assert layers(model)
    torch.testing.assert_close(experts(x, index, weight), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(experts(hidden_states=x, top_k_weights=weight, top_k_index=index), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(experts(x, index, weight)[2], torch.zeros(experts.hidden_dim))


def test_another_way_that_the_user_chose_is_left() -> None:
    """Before the patch it is left, after it the module runs as it was."""
    model = build("qwen3_moe")
    model.config._experts_implementation = "deepgemm"
    assert [(row.status, row.now) for row in patched(model)] == [("left", "Qwen3MoeExperts")] * 2
    assert "'deepgemm', as its configuration says" in next(row.why for row in liger_patch.auto(model) if row.op == "experts")

    model = build("qwen3_moe")
    patched(model)
    (first, *_) = layers(model)
    x, index, weight = torch.randn(3, first.hidden_dim), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    model.config._experts_implementation = "deepgemm"
    with pytest.raises(Exception, match=r"(?i)deepgemm|cuda|kernels"):
        first(x, index, weight)


def test_an_activation_that_is_exchanged_later_is_called() -> None:
    model = build("mixtral")
    patched(model)
    (first, *_) = layers(model)
    x, index, weight = torch.randn(3, first.hidden_dim), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    first.act_fn = nn.Tanh()
    gate, up = (x @ first.gate_up_proj[0].T).chunk(2, -1)
    torch.testing.assert_close(first(x, index, weight), (gate.tanh() * up) @ first.down_proj[0].T)


def test_experts_can_be_left_out_and_put_back() -> None:
    stock = build("qwen3_moe")
    model = copy.deepcopy(stock)
    report = liger_patch.auto(model, experts=False)
    assert {row.why for row in report if row.op == "experts"} == {"experts=False"}
    assert not layers(model)
    assert len(patched(model)) == len(layers(model)) == 2
    liger_patch.revert(model)
    assert torch.equal(logits_of(model, inputs(model)), logits_of(stock, inputs(stock)))


def test_copies_have_experts_of_their_own() -> None:
    model = build("gpt_oss")
    patched(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(module.forward.__self__.module is module for module in layers(twin))
        with torch.no_grad():
            layers(twin)[0].down_proj.zero_()
        assert not torch.equal(logits_of(twin, inputs(twin)), logits_of(model, inputs(model)))


def test_an_entry_that_describes_experts_wrongly_is_found_out() -> None:
    model = build("gpt_oss")
    known = _registry.entry("gpt_oss", "test")
    try:
        liger_patch.register(Arch("gpt_oss", experts=Experts("GptOssExperts", act="silu", limit="limit")), replace=True)
        with pytest.raises(PatchError, match=r"off by .* from the original in fp64"):
            liger_patch.auto(model, **BARE)
        assert not layers(model)
    finally:
        liger_patch.register(known, replace=True)


NAMED_OTHERWISE = {"Llama4TextExperts", "AriaSharedExpertsMLP", "InklingSharedExperts"}  # by the layer around; an MLP; of all tokens


@pytest.mark.skipif(transformers.__version__ != tiny.PINNED, reason="other releases have other types")
def test_every_class_of_experts_has_an_entry() -> None:
    """A new release's mixtures are not overlooked, nor is one taken out of an entry by mistake."""
    sources = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    found = {name for path in sources for name in re.findall(r"^class (\w*Experts\w*|\w*CDMoE|\w*NaiveMoe)\(", path.read_text(), re.M)}
    specs = [_registry.entry(name, "test").experts for name in liger_patch.supported()]
    assert found - {spec.class_name for spec in specs if spec} == NAMED_OTHERWISE


STOCK = [name for name in liger_patch.supported() if (spec := _registry.entry(name, "test").experts) and spec.stock]


@pytest.mark.parametrize("model_type", STOCK)
def test_what_no_function_computes_is_left_with_the_reason(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.SPECIAL, "doge", {"is_moe": True})
    model = build(model_type)
    rows, spec = patched(model), _registry.entry(model_type, "test").experts
    assert spec is not None
    assert {(row.was, row.now, row.status, row.why) for row in rows} == {(spec.class_name, spec.class_name, "left", spec.stock)}
    assert len(rows) == sum(type(module).__name__ == spec.class_name for module in model.modules())


def test_tokens_of_images_have_experts_of_their_own() -> None:
    """Ernie 4.5 VL sends them through other experts, of another width, in the same layer."""
    stock = build("ernie4_5_vl_moe_text")
    model = copy.deepcopy(stock)
    assert len(patched(model)) == len(layers(model)) == 2
    given = inputs(model) | {"moe_mm_token_type_ids": torch.arange(18).view(2, 9) % 3}
    want, loss = loss_of(stock, **given), loss_of(model, **given)
    torch.testing.assert_close(loss, want, rtol=2e-6, atol=2e-6)
    same_gradients(model, loss, stock, want)
    grads = torch.autograd.grad(loss_of(model, **given), [module.down_proj for module in layers(model)])
    assert all(grad.any() for grad in grads)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_the_kernels_train_a_mixture(model_type: str, device: torch.device) -> None:
    """By the interpreter on a CPU, loss and gradients are those of plain PyTorch."""
    stock = build(model_type).to(device)
    model = copy.deepcopy(stock)
    liger_patch.auto(model, verify=False, **BARE)
    given = {name: t.to(device) for name, t in inputs(model).items()}
    with liger_fn.use_backend("interpreter" if not torch.cuda.is_available() else "triton"):
        loss = loss_of(model, **given)
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    want = loss_of(stock, **given)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    for name, got, expected in zip(
        dict(model.named_parameters()), grads, torch.autograd.grad(want, list(stock.parameters()), allow_unused=True), strict=True
    ):
        if expected is not None:
            assert got is not None, name
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()) + 1e-8, msg=name)
