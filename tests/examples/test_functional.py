"""The functional examples: each computes what a plain model does, and runs from its options to its figures."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import dpo_functional
import functional_transformer as functional
import liger_fn
import medusa_heads
from _presets import PRESETS

# torch says of its own attention on a CPU that vmap runs it once for each element.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop.*scaled_dot_product:UserWarning")

TINY = replace(PRESETS["tiny"], hidden=32, heads=4, kv_heads=2, mlp=48, head=96, vocab=96, seq=16)
ALMOST: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-7}  # sums of a few hundred terms in fp32, in another order


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with liger_fn.use_backend("reference"):
        yield


def tokens(seed: int, batch: int = 2) -> Tensor:
    return torch.randint(TINY.head, (batch, TINY.seq), generator=torch.Generator().manual_seed(seed))


def params(seed: int = 0) -> functional.Params:
    """Larger than what training begins with, so that attention is no mean and norms scale."""
    made = functional.init(TINY, torch.Generator().manual_seed(seed))
    return {name: 0.5 + torch.rand_like(value) if value.dim() == 1 else 5 * value for name, value in made.items()}


# --- functional_transformer -------------------------------------------------------------------------------------------------------------

NAMES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj"}
NAMES |= {"up": "mlp.up_proj", "down": "mlp.down_proj", "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
OUTSIDE = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight", "norm": "model.norm.weight"}


def in_llama(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    layer, part = name.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.weight"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_transformer_is_llama(tied: bool) -> None:
    p, ids = params(), tokens(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TINY.head, hidden_size=TINY.hidden, intermediate_size=TINY.mlp, num_hidden_layers=TINY.layers,
            num_attention_heads=TINY.heads, num_key_value_heads=TINY.kv_heads, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    if tied:
        del p["head"]
    model.load_state_dict({in_llama(name): value for name, value in p.items()}, strict=not tied)
    grads, value = torch.func.grad_and_value(functional.loss)(p, ids, TINY.heads)
    expected = model(ids, labels=ids).loss
    expected.backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0)
    theirs = dict(model.named_parameters())
    assert grads.keys() == p.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, theirs[in_llama(name)].grad, msg=name, **ALMOST)


def test_adamw_is_torchs() -> None:
    state = functional.begin(params())
    leaves = {name: value.clone().requires_grad_() for name, value in state.params.items()}
    groups = [{"params": [p for p in leaves.values() if p.dim() == n], "weight_decay": 0.1 * (n > 1)} for n in (1, 2)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for seed in range(3):
        grads = {name: torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)) for name, value in leaves.items()}
        for name, value in leaves.items():
            value.grad = grads[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
        assert norm > 1
        optimizer.step()
        state = functional.adamw(state, functional.clip(grads, 1.0), 1e-2)
    for name, value in leaves.items():
        torch.testing.assert_close(state.params[name], value.detach(), msg=name, **ALMOST)


def test_a_compiled_step_is_the_step_and_compiles_once(fresh_compiler: None) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(functional.train_step, fullgraph=True, backend=counter)
    ours = stock = functional.begin(params())
    for seed in range(3):
        ours, got = compiled(ours, tokens(seed), TINY.heads, 1e-3, torch.float32)
        stock, expected = functional.train_step(stock, tokens(seed), TINY.heads, 1e-3, torch.float32)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert counter.frame_count == 1
    assert int(ours.step) == 3


def test_an_ensemble_and_per_sample_gradients() -> None:
    several, ids = [params(seed) for seed in range(3)], tokens(1, batch=3)
    each = [torch.func.grad_and_value(functional.loss)(p, ids, TINY.heads) for p in several]
    stacked = {name: torch.stack([p[name] for p in several]) for name in several[0]}
    grads, values = torch.func.vmap(torch.func.grad_and_value(functional.loss), in_dims=(0, None, None))(stacked, ids, TINY.heads)
    torch.testing.assert_close(values, torch.stack([value for _, value in each]), rtol=1e-6, atol=0)
    assert len(set(values.tolist())) == 3
    for name, grad in grads.items():
        torch.testing.assert_close(grad, torch.stack([g[name] for g, _ in each]), msg=name, **ALMOST)

    rows = torch.func.vmap(torch.func.grad(functional.loss), in_dims=(None, 0, None))(several[0], ids[:, None], TINY.heads)
    for name, grad in rows.items():  # every row has as many tokens: the batch's gradient is their mean
        torch.testing.assert_close(grad.mean(0), each[0][0][name], msg=name, **ALMOST)
        assert not torch.allclose(grad[0], grad[1])


# --- dpo_functional ---------------------------------------------------------------------------------------------------------------------


def dpo_by_logits(policy: LlamaForCausalLM, reference: LlamaForCausalLM, ids: Tensor, labels: Tensor, beta: float) -> Tensor:
    def log_prob(model: LlamaForCausalLM) -> Tensor:
        each = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (each * (labels[:, 1:] != dpo_functional.IGNORED)).sum(-1)

    (chosen, rejected), (before, after) = log_prob(policy).chunk(2), log_prob(reference).detach().chunk(2)
    return -F.logsigmoid(beta * ((chosen - before) - (rejected - after))).mean()


def test_dpo_is_dpo_of_logits() -> None:
    policy, reference = (dpo_functional.build(TINY, "cpu") for _ in range(2))
    stock = LlamaForCausalLM(policy.config)
    stock.load_state_dict(policy.state_dict())
    ids, labels = next(dpo_functional.pairs(iter([tokens(1)]), 4, seed=0))
    assert torch.equal(ids[:2], tokens(1))
    assert torch.equal(ids[2:, :4], ids[:2, :4])
    assert torch.equal(ids[2:].sort().values, ids[:2].sort().values)
    assert torch.equal(labels == dpo_functional.IGNORED, (torch.arange(TINY.seq) < 4).expand(4, -1))

    figures = dpo_functional.dpo(policy, reference, ids, labels, beta=0.5)
    expected = dpo_by_logits(stock, reference, ids, labels, beta=0.5)
    torch.testing.assert_close(figures.loss, expected, rtol=1e-6, atol=0)
    assert abs(expected.item() - 0.6931) > 1e-3, "policy and reference must differ"
    figures.loss.backward()
    expected.backward()
    assert all(p.grad is None for p in reference.parameters())
    for (name, p), q in zip(policy.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name, rtol=1e-4, atol=1e-7)
    equal = dpo_functional.dpo(policy, copy.deepcopy(policy), ids, labels, beta=0.5)
    assert equal.loss.item() == pytest.approx(0.693147, rel=1e-6)
    assert (equal.margin.item(), equal.accuracy.item()) == (0, 0)


# --- medusa_heads -----------------------------------------------------------------------------------------------------------------------


def test_each_head_looks_one_token_further() -> None:
    ids = torch.tensor([[10, 11, 12, 13]])
    rows = [medusa_heads.ahead(ids, by).tolist()[0] for by in (1, 2, 4, 9)]
    out = medusa_heads.IGNORED
    assert rows == [[11, 12, 13, out], [12, 13, out, out], [out] * 4, [out] * 4]


def test_heads_losses_are_those_of_logits() -> None:
    ids, sums = tokens(1), {}
    trunk, heads = medusa_heads.build(TINY, 3, "cpu")
    for p in heads.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = trunk(ids).last_hidden_state
    assert not x.requires_grad
    grads = {}
    for name, loss in medusa_heads.LOSSES.items():
        heads.zero_grad()
        total, sums[name] = medusa_heads.medusa_loss(heads, x, ids, loss)
        total.backward()
        grads[name] = {key: p.grad.clone() for key, p in heads.named_parameters()}
    torch.testing.assert_close(sums["fused"], sums["stock"], rtol=1e-6, atol=0)
    for key, grad in grads["stock"].items():
        torch.testing.assert_close(grads["fused"][key], grad, msg=key, **ALMOST)
    for i, (head, got) in enumerate(zip(heads, sums["fused"], strict=True), start=1):
        # Row t of head i against token t + 1 + i, written out.
        logits = head.project(head(x))[:, : -1 - i]
        torch.testing.assert_close(got, F.cross_entropy(logits.flatten(0, 1), ids[:, 1 + i :].flatten()), rtol=1e-6, atol=0)


# --- as programs ------------------------------------------------------------------------------------------------------------------------

EVERY = {"functional_transformer": functional, "dpo_functional": dpo_functional, "medusa_heads": medusa_heads}


@pytest.mark.parametrize("name", EVERY)
def test_a_tiny_run_learns_and_prints_its_figures(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = EVERY[name].main(["--preset", "tiny", "--steps", "8", "--out", str(tmp_path)])
    assert len(losses) == 8
    assert min(losses[4:]) < losses[0]
    printed = capsys.readouterr().out
    assert [word for word in (f"loss {losses[0]:.4f}", f"{losses[-1]:.4f}", "tokens/s") if word not in printed] == []


def test_both_losses_train_the_same_heads(tmp_path: Path) -> None:
    runs = [medusa_heads.main(["--loss", loss, "--steps", "4", "--out", str(tmp_path)]) for loss in ("stock", "fused")]
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("argv", "words"), [(["--steps", "1"], ["--steps 1", "2 or more"]), (["--batch", "0"], ["--batch 0", "1 or more"])]
)
def test_a_bad_option_names_itself(name: str, argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        EVERY[name].main(argv)
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []
