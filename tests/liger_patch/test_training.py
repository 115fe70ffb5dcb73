"""Training: the same numbers, whatever trains the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import liger_patch
from liger_patch import _proof

from .models import agree, family, gradients, labels_of, llama, one_step, same_gradients, tokens

# PEFT reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def losses(model: nn.Module, steps: int = 4, **arguments: object) -> list[float]:
    """Losses of a few steps; the gradients of the last one stay on the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    for step in range(steps):
        ids = tokens(seed=step).to(next(model.parameters()).device)
        loss = model(input_ids=ids, labels=labels_of(ids), **arguments).loss
        optimizer.zero_grad()
        loss.backward()
        if step < steps - 1:
            optimizer.step()
        seen.append(loss.item())
    return seen


def close(got: list[float], expected: list[float]) -> None:
    assert len(set(expected)) == len(expected), "the model must have moved"
    assert got == pytest.approx(expected, rel=1e-5)


def test_training_is_the_same_on_every_backend(backend, device, monkeypatch):
    if backend == "interpreter":  # a proof over as many tokens as a GPU has takes it minutes
        monkeypatch.setattr(_proof, "BATCHES", 4)
        monkeypatch.setattr(_proof, "TOKENS", 5)
    stock, ours = llama().to(device), llama().to(device)
    liger_patch.auto(ours)
    close(losses(ours, steps=3), losses(stock, steps=3))
    # Adam turns rounding in a gradient near zero into a step, so gradients are compared from equal weights.
    stock.load_state_dict(ours.state_dict())
    for model in (stock, ours):
        losses(model, steps=1)
    same_gradients(ours, stock)


# Norms of both kinds and their casts; gates by gelu and silu, packed and not, and relu squared; rotations of each kind; caps and scales.
KERNELS = (
    *("gemma2", "qwen3_moe", "cohere", "gpt_neox", "phi3", "glm4", "nanochat", "nemotron", "gemma3", "falcon_h1", "gpt_oss"),
    *("deepseek_v2", "deepseek_v3", "gemma4_text", "gptj", "llama4_text"),
)


@pytest.mark.parametrize("model_type", KERNELS)
def test_a_step_of_each_family_is_the_same_on_every_backend(model_type, backend, device):
    stock, ours = (family(model_type).to(device) for _ in range(2))
    liger_patch.auto(ours, verify=False)
    agree(one_step(ours), one_step(stock))


def test_gradient_accumulation():
    stock, ours = llama(), llama()
    liger_patch.auto(ours)
    for model in (stock, ours):
        for seed in range(3):
            ids = tokens(seed=seed)
            model(ids, labels=labels_of(ids), num_items_in_batch=50).loss.backward()
    same_gradients(ours, stock)


def test_a_second_backward():
    model, ids = llama(), tokens()
    liger_patch.auto(model)
    loss = model(ids, labels=ids).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * once[name])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing(when, reentrant):
    stock, ours = llama(), llama()
    if when == "after":
        liger_patch.auto(ours)
    for model in (stock, ours):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if when == "before":
        liger_patch.auto(ours)
    for model in (stock, ours):
        model.enable_input_require_grads()
        ids = tokens()
        model(ids, labels=ids, use_cache=False).loss.backward()
    same_gradients(ours, stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    stock, ours, exact, ids = llama(), llama(), llama(), tokens()
    liger_patch.auto(ours)
    exact(ids, labels=ids).loss.backward()
    with torch.autocast("cpu", dtype):
        a, b = (model(ids, labels=ids) for model in (stock, ours))
    assert (b.logits.dtype, b.logits.float().dtype) == (a.logits.dtype, torch.float32)
    assert b.logits.source._logits is None
    torch.testing.assert_close(b.logits + 0, a.logits, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    # A loss is near ln(vocabulary) whatever the logits of a model that has learned nothing, and says little: gradients say more.
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-4, atol=0)
    for output in (a, b):
        output.loss.backward()
    assert ours.lm_head.weight.grad.dtype == torch.float32
    no_further(ours, stock, exact)


def no_further(ours: nn.Module, stock: nn.Module, exact: nn.Module) -> None:
    """All gradients together are no further from those in fp32 than the stock model's are; another order of roundings is allowed for."""
    mine, theirs, truth = (torch.cat([grad.flatten() for grad in gradients(model).values()]) for model in (ours, stock, exact))
    allowed = 1.1 * torch.linalg.vector_norm(theirs - truth)
    assert 0 < allowed < 0.05 * torch.linalg.vector_norm(truth)
    assert torch.linalg.vector_norm(mine - truth) <= allowed
    assert torch.linalg.vector_norm(mine - theirs) <= 2 * allowed


def test_compiled_training_starts_with_the_same_loss(fresh_compiler):
    model, other, ids = llama(), llama(), tokens()
    expected = model(ids, labels=ids).loss
    liger_patch.auto(model)
    liger_patch.auto(other)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(ids, labels=ids)
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0)
    assert not isinstance(output.logits, torch.Tensor)
    torch.testing.assert_close(output.logits[0], llama()(ids).logits[0])
    assert model.lm_head.forward.__self__.requests == []
    close(losses(compiled, steps=3), losses(other, steps=3))


def test_compiled_evaluation_and_other_arguments(fresh_compiler):
    model, ids = llama(), tokens()
    expected = llama()(ids, labels=ids, num_items_in_batch=torch.tensor(9)).loss
    liger_patch.auto(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, labels=ids, num_items_in_batch=torch.tensor(9)).loss, expected, rtol=1e-6, atol=0)
    model.eval()
    output = compiled(ids, labels=ids)
    assert isinstance(output.logits, torch.Tensor)
    torch.testing.assert_close(output.loss, llama().eval()(ids, labels=ids).loss, rtol=1e-6, atol=0)


def lora(model: nn.Module, **changes: object) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **changes}))
    return wrapped.train()


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when):
    targets = ["q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"]
    stock, ours = lora(llama(), target_modules=targets), llama()
    if when == "before":
        liger_patch.auto(ours)
    ours = lora(ours, target_modules=targets)
    report = liger_patch.auto(ours)
    assert {row.status for row in report} == {"already" if when == "before" else "patched"}
    close(losses(ours), losses(stock))
    same_gradients(ours, stock, rel=1e-3)
    assert not isinstance(ours(tokens(), labels=tokens()).logits, torch.Tensor)
    assert liger_patch.verify(ours).rows[-1].status == "proved"


@pytest.mark.parametrize("how", [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_adapter_on_the_head_leaves_the_head_stock(how, when, monkeypatch):
    import liger_fn

    stock, ours = lora(llama(), **how), llama()
    if when == "before":
        liger_patch.auto(ours)
    ours = lora(ours, **how)
    monkeypatch.setattr(liger_fn, "linear_cross_entropy", lambda *args, **kwargs: pytest.fail("a loss was computed for nothing"))
    report = liger_patch.auto(ours)
    (left,) = report.where("left")
    assert (left.path, left.op) == ("lm_head", "linear_cross_entropy")
    assert "peft" in left.why
    close(losses(ours), losses(stock))
    assert isinstance(ours(tokens(), labels=tokens()).logits, torch.Tensor)
    liger_patch.revert(ours)
    assert all(not hasattr(module.__dict__.get("forward"), "slot") for module in ours.modules())


@pytest.fixture
def accelerator():
    """Makes an Accelerator, and forgets it afterwards: its settings are the process's."""
    accelerate = pytest.importorskip("accelerate")
    yield lambda precision: accelerate.Accelerator(cpu=True, mixed_precision=precision)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def computed(monkeypatch):
    """Every time that logits are computed on demand."""
    from liger_patch._carrier import Source

    calls, original = [], Source._compute
    monkeypatch.setattr(Source, "_compute", lambda source: calls.append(source) or original(source))
    return calls


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_prepares_and_unwraps(precision, accelerator, computed):
    accelerator = accelerator(precision)
    stock, model, exact, ids = llama(), llama(), llama(), tokens()
    exact(ids, labels=ids).loss.backward()
    liger_patch.auto(model)
    computed.clear()  # what the proofs asked for
    prepared = [accelerator.prepare_model(each) for each in (stock, model)]
    expected, got = (each(ids, labels=ids, num_items_in_batch=None) for each in prepared)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-4 if precision == "bf16" else 1e-6, atol=0)
    for output in (expected, got):
        accelerator.backward(output.loss)
    assert computed == [], "a step must not compute logits"
    if precision == "bf16":
        no_further(model, stock, exact)
    else:
        same_gradients(model, stock)
    assert got.logits.dtype == expected.logits.dtype == torch.float32
    torch.testing.assert_close(got.logits + 0, expected.logits, rtol=0.05, atol=0.005)
    assert len(computed) == 1
    plain, bare = (accelerator.unwrap_model(each, keep_fp32_wrapper=False) for each in reversed(prepared))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids, labels=ids).loss, bare(ids, labels=ids).loss, rtol=1e-4, atol=0)
    liger_patch.revert(plain)
    assert "forward" not in plain.model.norm.__dict__
    assert {row.status for row in liger_patch.plan(plain)} == {"planned"}


def test_a_wrapped_model_cannot_be_reverted_under_its_wrapper(accelerator):
    model = llama()
    liger_patch.auto(model)
    accelerator("bf16").prepare_model(model)
    with pytest.raises(liger_patch.PatchError, match=r"wrapped since, on the model\. .*unwrap_model"):
        liger_patch.revert(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_trainer(tmp_path, bf16, computed):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    def train(model):
        options = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1, "eval_steps": 3}
        arguments = TrainingArguments(
            str(tmp_path), report_to=[], use_cpu=True, bf16=bf16, save_strategy="no", eval_strategy="steps", disable_tqdm=True, **options
        )
        data = [{"input_ids": row, "labels": row} for seed in range(6) for row in tokens(seed=seed)]
        trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:2])
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        return [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss", "grad_norm") if key in entry]

    ours = llama()
    liger_patch.auto(ours)
    computed.clear()  # what the proofs asked for
    got, expected = train(ours), train(llama())
    assert len(expected) >= 7
    # Losses that drift apart by rounding from step to step; one step's gradients are held against each other above.
    assert got == pytest.approx(expected, rel=2e-3 if bf16 else 1e-4)
    assert computed == [], "a step must not compute logits"


def test_sharded_training_gathers_the_heads_weight():
    """FSDP2 gathers a layer's weight again for its backward, by hooks on the tensors that the forward returned."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        stock, ours, late, ids = llama(), llama(), llama(), tokens()
        liger_patch.auto(ours)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for model in (ours, late):
            for layer in (*model.model.layers, model.lm_head, model):
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        assert {row.status for row in liger_patch.auto(late)} == {"patched"}
        stock(ids, labels=ids).loss.backward()
        for model in (ours, late):
            output = model(ids, labels=ids)
            torch.testing.assert_close(output.logits + 0, stock(ids).logits)
            output.loss.backward()
            for (name, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
                torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-6, msg=name)
        assert liger_patch.verify(ours).rows[-1].status == "not verified"
    finally:
        dist.destroy_process_group()
