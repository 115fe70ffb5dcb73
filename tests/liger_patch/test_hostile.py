"""What users do to models and call them with, in one model of each kind: patched, it is the stock one in all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import cache_utils

import liger_patch
from tests.liger_patch.models import FAMILIES, agree, dicts, family, is_fused, one_step, pair, some_ignored
from tests.liger_patch.models import family_tokens as tokens
from tests.liger_patch.tiny import build

# PEFT reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

# --- arguments of a call ----------------------------------------------------------------------------------------------------------------

SHIFTED = F.pad(some_ignored(tokens()), (0, 1), value=-100)[:, 1:].contiguous()
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "items": {"num_items_in_batch": 13},
    "items in a tensor": {"num_items_in_batch": torch.tensor(13)},
    "shifted": {"shift_labels": SHIFTED},
    "kept": {"shift_labels": SHIFTED[:, -3:].contiguous(), "logits_to_keep": 3},
    "a tuple": {"return_dict": False},
    "padded": {"attention_mask": (torch.arange(9) >= torch.tensor([[2], [0]])).long()},
    "attentions": {"output_attentions": True, "output_hidden_states": True},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_call(model_type: str, call: str) -> None:
    stock, ours = pair(model_type)
    assert is_fused(ours)
    agree(one_step(ours, **CALLS[call]), one_step(stock, **CALLS[call]))
    try:
        agree(one_step(ours.eval(), **CALLS[call]), one_step(stock.eval(), **CALLS[call]))
    finally:
        ours.train(), stock.train()


@pytest.mark.parametrize("items", [None, 13, torch.tensor(13)], ids=str)
def test_the_loss_of_a_router_is_added(items: Any) -> None:
    call = {"output_router_logits": True, "num_items_in_batch": items}
    stock, ours = pair("qwen3_moe")
    without = one_step(ours)["loss"]
    for _ in range(2):  # a model adds it to its loss in place
        agree(got := one_step(ours, **call), one_step(stock, **call))
        assert abs(got["loss"] - without) > 1e-4
        assert torch.equal(one_step(ours)["loss"], without)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_label_counts(model_type: str) -> None:
    ignored = torch.full((2, 9), -100)
    for call in ({}, {"num_items_in_batch": 5}):
        got = one_step(pair(model_type)[1], labels=ignored, **call)
        assert got.pop("loss") == 0
        assert got
        assert not any(grad.any() for grad in got.values())
    mixture, ids = pair("qwen3_moe")[1], tokens()
    output = mixture(input_ids=ids, labels=ignored, output_router_logits=True)
    assert output.loss == mixture.router_aux_loss_coef * output.aux_loss > 0


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_are_kept_as_they_are_asked_for(model_type: str) -> None:
    ids = tokens()
    for keep in (0, 1, 4, torch.tensor([1, 5])):
        stock, ours = (m(input_ids=ids, logits_to_keep=keep).logits for m in pair(model_type))
        assert type(ours) is Tensor
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
        fused = pair(model_type)[1](input_ids=ids, labels=ids, shift_labels=ids[:, : stock.shape[1]].contiguous(), logits_to_keep=keep)
        torch.testing.assert_close(fused.logits + 0, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_loss_of_ones_own(model_type: str, when: str) -> None:
    def own(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        seen.append(type(logits))
        return logits.float().view(-1, vocab_size).square().mean() + labels.float().mean()

    seen: list[type] = []
    stock, ours = family(model_type), family(model_type)
    for model in (stock, ours):
        if when == "after" and model is ours:
            liger_patch.auto(model, verify=False)
        model.loss_function = own
    if when == "before":
        left = liger_patch.auto(ours, verify=False).where("left")
        assert {"linear_cross_entropy", "cross_entropy"} <= {row.op for row in left if "own" in row.why}
    agree(one_step(ours), one_step(stock))
    assert seen == [Tensor, Tensor]


# --- how a model is trained and run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_embeddings_tied_or_not(model_type: str, tied: bool) -> None:
    stock, ours = family(model_type, tied=tied), family(model_type, tied=tied)
    shared = ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert shared is tied
    liger_patch.auto(ours, verify=False)
    assert is_fused(ours)
    assert (ours.get_input_embeddings().weight is ours.get_output_embeddings().weight) is tied
    agree(one_step(ours), one_step(stock))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_layers_run_again_in_backward(model_type: str, reentrant: bool) -> None:
    stock, ours = family(model_type), family(model_type)
    liger_patch.auto(ours, verify=False)
    ids, seen = tokens(), {}
    for model in (stock, ours):
        runs: list[int] = []
        attention = [module for module in model.modules() if "Attention" in type(module).__name__]
        attention[-1].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()  # the reentrant kind knows no torch.autograd.grad
        assert len(runs) == 2
        seen[model] = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    agree(seen[ours], seen[stock])


# Those that are offloaded need a GPU in the stock model too.
CACHES: dict[str, dict[str, Any]] = {
    "none": {"use_cache": False},
    "dynamic": {},
    "static": {"cache_implementation": "static"},
}
if hasattr(cache_utils, "Fp8QuantizedLayer"):  # the other kinds need a package
    CACHES["quantized"] = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
WINDOWS = ("gemma2", "gemma3")  # their caches are of layers with a window and without; the quantized one knows none with it


@pytest.mark.parametrize(("model_type", "cache"), [(t, c) for t in FAMILIES for c in CACHES if c != "quantized" or t not in WINDOWS])
def test_generation(model_type: str, cache: str) -> None:
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    runs = []
    for model in pair(model_type):
        model.eval()
        try:
            runs.append(model.generate(tokens(), attention_mask=mask, return_dict_in_generate=True, **options, **CACHES[cache]))
        finally:
            model.train()
    stock, ours = runs
    assert ours.sequences.shape == (2, 21)
    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(stock.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_another_model_of_the_type_is_untouched(model_type: str) -> None:
    other, ids = family(model_type), tokens()
    with torch.no_grad():
        before, expected = dicts(other), other(input_ids=ids, labels=ids)
    ours = family(model_type)
    liger_patch.auto(ours, verify=False)
    one_step(ours)
    with torch.no_grad():
        after = other(input_ids=ids, labels=ids)
    assert dicts(other) == before
    assert torch.equal(after.loss, expected.loss)
    assert torch.equal(after.logits, expected.logits)
    assert not liger_patch.plan(other, verify=False).where("already")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_whole_is_proved(model_type: str) -> None:
    """Mixtures multiply by their experts in groups, which no fp64 has; models of several keep their vocabulary in one of them."""
    assert liger_patch.verify(pair(model_type)[1]).rows[-1].status == "proved"


@pytest.mark.parametrize(("model_type", "why"), [("xglm", "the original in fp64 does not run"), ("vit", "no attribute 'vocab_size'")])
def test_what_the_original_cannot_do_is_no_fault_of_ours(model_type: str, why: str) -> None:
    *swaps, whole = liger_patch.verify(build(model_type))
    assert {row.status for row in swaps} <= {"proved", "left"}
    assert whole.status == "not verified"
    assert why in whole.why


# --- what stands in a model, and where --------------------------------------------------------------------------------------------------


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Of the language model, which comes last."""
    return [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.get_text_config().num_hidden_layers][-1]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_weights_that_are_not_here(model_type: str) -> None:
    """On meta, as a whole or in some layers: proved as any other, and filled later."""
    here, expected = family(model_type), family(model_type)
    partly, nowhere = copy.deepcopy(here), copy.deepcopy(here).to("meta")
    layers_of(partly)[1].to("meta")
    why = [row.why for row in liger_patch.plan(here).where("left")]
    for model in (nowhere, partly):
        report = liger_patch.auto(model)
        assert {row.status for row in report} <= {"patched", "left"}
        assert [row.why for row in report.where("left")] == why
        assert liger_patch.verify(model).rows[-1].why == "weights are on the meta device"
    partly.load_state_dict(here.state_dict(), assign=True)
    partly.tie_weights()
    agree(one_step(partly), one_step(expected))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_weights_that_come_for_the_time_of_a_call(model_type: str, when: str) -> None:
    """accelerate keeps them elsewhere, leaves meta tensors in their place, and wraps every forward."""
    accelerate = pytest.importorskip("accelerate")
    stock, ours = (family(model_type).requires_grad_(False) for _ in range(2))
    if when == "after":
        liger_patch.auto(ours)
    accelerate.cpu_offload(ours, execution_device=torch.device("cpu"))
    assert ours.get_output_embeddings().weight.is_meta
    if when == "before":
        assert not liger_patch.auto(ours).where("failed")
    ids = tokens()
    for training in (True, False):
        expected, got = (model.train(training)(input_ids=ids, labels=ids) for model in (stock, ours))
        torch.testing.assert_close(got.loss, expected.loss, rtol=2e-6, atol=0)
        torch.testing.assert_close(got.logits + 0, expected.logits, rtol=1e-4, atol=1e-5)
    liger_patch.revert(ours)
    assert torch.equal(ours(input_ids=ids).logits, stock(input_ids=ids).logits)


FP32_NORMS = ("gemma2", "gemma3", "gpt_neox", "cohere")  # in the others the norms' results are fp32 then, which the next layer refuses


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_norms_in_fp32_in_a_model_of_less(model_type: str, dtype: torch.dtype, autocast: bool) -> None:
    stock, exact = family(model_type).to(dtype), family(model_type)
    for name, module in stock.named_modules():
        if "norm" in name.rsplit(".")[-1]:
            module.float()
    exact.load_state_dict(stock.state_dict())
    ours = copy.deepcopy(stock)
    liger_patch.auto(ours)
    if not autocast and model_type not in FP32_NORMS:
        for model in (stock, ours):
            with pytest.raises(RuntimeError, match="dtype"):
                one_step(model)
        return
    with torch.autocast("cpu", dtype, enabled=autocast):
        mine, theirs = one_step(ours), one_step(stock)
    truth = one_step(exact)
    assert {name: g.dtype for name, g in mine.items()} == {name: g.dtype for name, g in theirs.items()}
    mine, theirs, truth = (torch.cat([g.flatten().float() for g in each.values()]) for each in (mine, theirs, truth))
    # No further from fp32 than the stock model, but for another order of roundings.
    assert torch.linalg.vector_norm(mine - truth) <= 1.1 * torch.linalg.vector_norm(theirs - truth)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("head", [False, True], ids=["linears", "linears and head"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_adapter_on_every_linear(model_type: str, head: bool, when: str) -> None:
    peft = pytest.importorskip("peft")

    def adapted(model: nn.Module) -> nn.Module:
        name = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        linears = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and (n != name or head)]
        torch.manual_seed(3)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, target_modules=linears)).train()

    stock, ours = adapted(family(model_type, tied=False)), family(model_type, tied=False)
    if when == "after":
        liger_patch.auto(ours, verify=False)
    ours = adapted(ours)
    report = liger_patch.auto(ours)
    assert {row.op for row in report.where("left") if "peft" in row.why} == ({"linear_cross_entropy"} if head else set())
    assert is_fused(ours) is not head
    agree(one_step(ours), one_step(stock))
    for model in (ours, stock):
        model.merge_adapter()
    with torch.no_grad():
        merged, expected = (model(input_ids=tokens(), labels=tokens()).loss for model in (ours, stock))
    torch.testing.assert_close(merged, expected, rtol=2e-6, atol=0)
    liger_patch.revert(ours)
    ours, stock = ours.unload(), stock.unload()
    assert torch.equal(ours(input_ids=tokens()).logits, stock(input_ids=tokens()).logits)


class Packed(nn.Linear):
    """As libraries of 4 bits make it: an `nn.Linear` by its class, whose weight is bytes of two numbers each, and no matrix."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.bias = linear.bias
        weight = linear.weight.detach()
        self.scale = float(weight.abs().amax()) / 7
        levels = (weight / self.scale).round().to(torch.int8).flatten() + 8
        self.weight = nn.Parameter((levels[::2] * 16 + levels[1::2] % 16).to(torch.uint8)[:, None], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        bytes_ = self.weight.flatten().int()
        levels = torch.stack((bytes_ // 16, bytes_ % 16), -1) - 8
        return F.linear(x, self.scale * levels.view(self.out_features, self.in_features).to(x.dtype), self.bias)


class Int8(nn.Module):
    """As libraries of 8 bits make it: no `nn.Linear`, whose weight is a buffer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Quantised(Tensor):
    """As libraries that leave the layers alone make it: a weight that knows by itself how to be multiplied by."""

    @staticmethod
    def __new__(cls, levels: Tensor, scale: Tensor) -> Quantised:
        made: Quantised = Tensor._make_wrapper_subclass(cls, levels.shape, dtype=torch.float32, requires_grad=False)
        return made

    def __init__(self, levels: Tensor, scale: Tensor) -> None:
        self.levels, self.scale = levels, scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.levels.float() * weight.scale, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Quantised(args[0].levels, args[0].scale)
        raise NotImplementedError(f"{func} of a quantised weight")

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["levels", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> Quantised:
        return Quantised(inner["levels"], inner["scale"])


def in_place(linear: nn.Linear) -> nn.Linear:
    eight = Int8(linear)
    linear.weight = nn.Parameter(Quantised(eight.weight, eight.scale), requires_grad=False)
    return linear


def exchange(model: nn.Module, kind: Callable[[nn.Linear], nn.Module], head: bool) -> None:
    last = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and (head or child is not last):
                setattr(parent, name, kind(child))


EVERY = [("llama", kind, head, when) for kind in (Packed, Int8, in_place) for head in (False, True) for when in ("before", "after")]


@pytest.mark.parametrize(("model_type", "kind", "head", "when"), [*EVERY, *((t, Packed, True, "before") for t in FAMILIES[1:])])
def test_linears_of_fewer_bits(model_type: str, kind: Any, head: bool, when: str) -> None:
    stock, ours = family(model_type, tied=False), family(model_type, tied=False)
    if when == "after":
        liger_patch.auto(ours)
    for model in (stock, ours):
        exchange(model, kind, head)
    report = liger_patch.auto(ours)
    if not (kind is in_place and when == "after"):  # the same layer: each step sees for itself
        assert {row.op for row in report.where("left") if row.path == "lm_head"} == ({"linear_cross_entropy"} if head else set())
    assert is_fused(ours) is not head
    agree(one_step(ours), one_step(stock))
    if model_type == "llama":
        assert liger_patch.verify(ours).rows[-1].status == ("proved" if kind is Int8 else "not verified")
    liger_patch.revert(ours)
    assert torch.equal(ours(input_ids=tokens()).logits, stock(input_ids=tokens()).logits)
