"""Every entry of the registry, on a tiny random model of its type: patched, it is the same model."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import liger_fn
import liger_patch
from liger_patch import _registry
from tests.liger_patch.tiny import PINNED, VOCAB, build

STEPS = 20
TYPES = tuple(liger_patch.supported())
UNABLE = ("blt", "blt_local_decoder", "blt_patcher", "git")  # by tokens alone, as the original
EMBEDDED = ("qwen3_omni_moe_talker_text",)  # given vectors, since the original has no embedding where it looks for one
OF_IMAGES = dict.fromkeys(("dots3_note", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text"), 1)  # layers of experts that only images go through
# One of each kind, of those that the compiler takes as they are; all are compiled on a GPU.
COMPILED = (
    *("llama", "gemma2", "qwen3", "cohere", "glm4", "phi3", "gpt_neox", "olmo2", "granite", "nemotron", "nanochat", "deepseek_v2"),
    *("qwen3_moe", "gpt_oss", "llama4_text"),  # mixtures, and other rotations
    *("recurrent_gemma", "falcon_h1", "lfm2"),  # states and convolutions
    *("gptj", "bloom", "falcon", "opt", "mpt", "stablelm", "olmo"),  # older decoders, and other heads
    *("modernbert", "xlm-roberta", "bart", "whisper"),  # encoders, and decoders of them
    *("gemma3", "gemma4_text", "qwen2_5_vl"),  # models of several
)
# One layer of each kind says all, but for: one after another; one without experts before those with them; one without a norm before it.
TWO_LAYERS = ("llama", "deepseek_v2", "modernbert")


def inputs(model: PreTrainedModel, seed: int = 1) -> dict[str, Tensor]:
    """Tokens, and their labels where the model takes any; nothing where it runs on other things."""
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type in EMBEDDED:
        return {"inputs_embeds": torch.randn(2, 9, model.config.hidden_size, generator=generator)}
    takes = inspect.signature(type(model).forward).parameters
    if "input_ids" not in takes or model.config.model_type in UNABLE:
        return {}
    ids = torch.randint(7, VOCAB, (2, 9), generator=generator)  # past the ids of images and padding
    labels = ids.clone()
    labels[0, :2] = -100
    given = {"input_ids": ids} | ({"labels": labels} if "labels" in takes else {})
    return given | ({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder and "decoder_input_ids" in takes else {})


def seed() -> None:
    """Of dropout. `torch.manual_seed` keeps a trace of its callers for every kind of device that is not here."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


def loss_of(model: PreTrainedModel, **given: Tensor) -> Tensor:
    """Its own, or a number that depends on all that it returns."""
    seed()
    output = model(**given)
    if getattr(output, "loss", None) is not None:
        return output.loss
    value = output[0]
    return (value * torch.linspace(-1, 1, value.numel(), device=value.device).view_as(value)).sum()


def logits_of(model: PreTrainedModel, given: dict[str, Tensor]) -> Tensor:
    seed()
    with torch.no_grad():
        return model.eval()(**{name: ids for name, ids in given.items() if name != "labels"})[0]


def train(model: PreTrainedModel) -> Tensor:
    """The losses of some steps."""
    # A gradient that is 0 but for rounding is no step.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, eps=1e-4, fused=True)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, **inputs(model, step % 3))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def same_gradients(model: PreTrainedModel, loss: Tensor, stock: PreTrainedModel, want: Tensor) -> None:
    theirs, ours = (dict(zip(dict(m.named_parameters()), _grads(y, m), strict=True)) for m, y in ((stock, want), (model, loss)))
    for name, grad in theirs.items():
        if grad is None or ours[name] is None:
            assert grad is ours[name], name
            continue
        distance = torch.linalg.vector_norm(ours[name] - grad)
        assert distance <= 1e-4 * torch.linalg.vector_norm(grad) + 1e-7, f"{name}: {float(distance):.3g}"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The functions of the library that were called, and how often."""
    names: Counter[str] = Counter()
    glus = ("swiglu", "geglu", "reglu", "relu_squared")
    for name in ("rms_norm", "layer_norm", *glus, "rope", "moe_experts", "linear_cross_entropy", "cross_entropy"):
        for variant in (name, f"{name}_packed", f"{name}_complex"):
            function = getattr(liger_fn, variant, None)
            if function is not None:
                wrapped = lambda *args, function=function, name=name, **kwargs: (names.update([name]), function(*args, **kwargs))[1]  # noqa: E731
                monkeypatch.setattr(liger_fn, variant, wrapped)
    return names


@pytest.mark.parametrize("model_type", TYPES)
def test_an_entry_is_the_model(model_type: str, called: Counter[str]) -> None:
    """Loss, logits and gradients are the original's, every operation is really in its place, and all of it can be undone."""
    stock = build(model_type)
    model = copy.deepcopy(stock)
    report = liger_patch.auto(model)
    entry = _registry.entry(model_type, "test")
    patched = {row.op for row in report.where("patched")}
    absent = {row.op for row in report.where("left") if row.why.startswith(("no module of class", "in this release"))}
    inner = [_registry.known(m.config.model_type) for m in model.modules() if isinstance(m, PreTrainedModel)]
    parts = {op for arch in inner if arch is not None for op in arch.ops()} - {"linear_cross_entropy", "cross_entropy"}
    assert {*entry.ops(), *parts} <= patched | absent, report
    assert patched, report
    experts = [row.status for row in report if row.op == "experts"]
    if "experts" in entry.ops() and transformers.__version__ == PINNED:
        assert set(experts) == {"patched"}, report  # a tiny model of a mixture has experts
    given = inputs(model)
    if not given:  # its swaps were proved when they were made
        liger_patch.revert(model)
        assert all("forward" not in vars(module) for module in model.modules())
        return

    called.clear()
    loss = loss_of(model, **given)
    if all(isinstance(m, type(model)) or not isinstance(m, PreTrainedModel) or m.config.model_type == model_type for m in model.modules()):
        # Towers do not run on tokens; the plain cross entropy only where there are logits.
        ran = {{"moe_experts": "experts"}.get(name, name) for name in called}
        assert ran >= patched - {"cross_entropy", "causal_mask"}, report
    assert called["moe_experts"] == experts.count("patched") - OF_IMAGES.get(model_type, 0), report
    want = loss_of(stock, **given)
    torch.testing.assert_close(loss, want, rtol=2e-6, atol=2e-6)
    same_gradients(model, loss, stock, want)
    torch.testing.assert_close(logits_of(model, given), logits_of(stock, given), rtol=1e-4, atol=1e-5)

    liger_patch.revert(model)
    assert torch.equal(logits_of(model, given), logits_of(stock, given))


@pytest.mark.parametrize("model_type", TYPES)
def test_training_is_that_of_the_original(model_type: str) -> None:
    stock = build(model_type)
    if not inputs(stock):
        return  # it does not run on tokens
    model = copy.deepcopy(stock)
    liger_patch.auto(model, verify=False)
    torch.testing.assert_close(train(model), train(stock), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama4", "bert", "roberta", "electra", "modernbert-decoder"])
def test_an_output_layer_deep_in_a_model_makes_no_logits(model_type: str) -> None:
    """It is in a model within, or other modules come before it; where another has taken it in, there are logits again."""

    def seeded(model: PreTrainedModel) -> Any:
        seed()
        return model(**inputs(model))

    stock = build(model_type)
    model = copy.deepcopy(stock)
    (row,) = (row for row in liger_patch.auto(model) if row.op == "linear_cross_entropy")
    assert row.status == "patched"
    output = seeded(model)
    assert not isinstance(output.logits, Tensor)
    assert not output.logits.source.touched
    torch.testing.assert_close(output.logits + 0, seeded(stock).logits, rtol=1e-4, atol=1e-5)
    where, _, name = row.path.rpartition(".")
    setattr(model.get_submodule(where), name, torch.nn.Sequential(model.get_submodule(row.path)))
    assert isinstance(seeded(model).logits, Tensor)


def _grads(loss: Tensor, model: PreTrainedModel) -> Any:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = iter(torch.autograd.grad(loss, parameters, allow_unused=True))
    return [next(found) if p.requires_grad else None for p in model.parameters()]


# What torch's compiler says while it traces the functions of autograd that some models have of their own.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("model_type", COMPILED)
def test_a_patched_model_compiles_as_the_stock_one_does(model_type: str) -> None:
    torch.compiler.reset()  # or the models count as one that changes too often
    stock, model = (build(model_type, layers=2 if model_type in TWO_LAYERS else 1) for _ in range(2))
    given = inputs(model)
    liger_patch.auto(model, verify=False)
    want = loss_of(stock, **given)
    try:
        got = loss_of(torch.compile(model, backend="aot_eager", fullgraph=True), **given)
    except Exception:
        try:
            loss_of(torch.compile(stock, backend="aot_eager", fullgraph=True), **given)
        except Exception as theirs:  # RecurrentGemma and OPT of older releases
            pytest.skip(f"the stock model does not compile here: {type(theirs).__name__}")
        raise
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    same_gradients(model, got, stock, want)
