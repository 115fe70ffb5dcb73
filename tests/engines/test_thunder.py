"""liger_fn's functions, modules and patched models under Lightning Thunder: the bits of eager PyTorch."""

# ruff: noqa: E402  Thunder is imported first, with what it lacks lent to torch; a test asks for the fixtures imported here

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@contextmanager
def named_tensors() -> Iterator[None]:
    """Lend `torch.Tensor` the methods that torch 2.13 has no more and Thunder 0.2.6 lists when it is imported; it calls none."""
    absent = [name for name in ("align_as", "align_to", "has_names", "refine_names", "rename") if not hasattr(torch.Tensor, name)]
    for name in absent:
        setattr(torch.Tensor, name, type(name, (), {"__name__": name, "__call__": None})())
    try:
        yield
    finally:
        for name in absent:
            delattr(torch.Tensor, name)


with named_tensors():
    thunder = pytest.importorskip("thunder")
    pytest.importorskip("transformers")
    from thunder.dynamo import thunderfx

import liger_fn
import liger_fn.thunder
import liger_nn
import liger_patch
from tests.cases import BF16, FP32, TABLES
from tests.liger_patch.models import llama
from tests.numerics import assert_same_bits
from tests.sample import Sample, gradients
from tests.tiny_models import one_thread, reference_backend  # noqa: F401  fixtures

# Thunder looks for an absent package when its executors are first listed, asks for the state of autocast by torch's older names, and for
# the `.grad` of tensors that have none.
pytestmark = [
    pytest.mark.filterwarnings("ignore:transformer_engine module not found:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:torch\..*autocast.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
PAGE = Path(__file__).parents[2] / "docs" / "thunder.md"


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    liger_fn.thunder.register()


def program(compiled: Callable[..., Any]) -> str:
    """What Thunder made of the last call: its forward and its backward, as text."""
    return "\n".join(map(str, thunder.last_traces(compiled)[-1:] + thunder.last_backward_traces(compiled)[-1:]))


def operators(compiled: Callable[..., Any]) -> set[str]:
    return set(re.findall(r"liger_fn_(\w+)\(", program(compiled)))


class Compiled:
    """A sample's op in `thunder.jit`, called with all its tensors as arguments: those that a closure holds would be constants."""

    def __init__(self, sample: Sample) -> None:
        self.sample, op, options = sample, sample.op, sample.options

        def opened(**inputs: Tensor) -> list[Any]:
            out = op(**inputs, **options)
            parts = [part if isinstance(part, tuple) else (part,) for part in (out if isinstance(out, tuple) else (out,))]
            return [t for part in parts for t in part]

        self.fn = thunder.jit(opened)
        self.inputs = {k: t for k, t in sample.inputs.items() if t is not None}

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        made = self.fn(**self.inputs | dict(zip(self.sample.wrt, tensors, strict=True)))
        return tuple(t for t in made if t.is_floating_point())


@pytest.mark.parametrize("name", TABLES)
def test_function(name: str, device: torch.device):
    s = Sample(TABLES[name], TABLES[name].typical, FP32, device)
    compiled = Compiled(s)
    for got, want, what in zip(gradients(compiled, s.tensors, s.cots), s.ours(), ("value", "gradient"), strict=True):
        assert_same_bits(got, want, what)
    assert operators(compiled.fn) == {f"{name}_fwd", f"{name}_bwd"}


@pytest.mark.parametrize("name", [t.op for t in TABLES.values() if t.autocast])
def test_autocast(name: str, device: torch.device):
    """Thunder runs what it compiled without autocast: the casts are part of the program."""
    s = Sample(TABLES[name], TABLES[name].typical, FP32, device)
    compiled = Compiled(s)
    with torch.autocast(device.type, BF16):
        dys = [torch.ones_like(y) for y in s.f()(*s.tensors)]
        got, want = (gradients(f, s.tensors, dys) for f in (compiled, s.f()))
    assert_same_bits(got[0], want[0], "value under autocast")
    assert_same_bits(got[1], want[1], "gradient under autocast")


def normed_unit(x: Tensor, weight: Tensor) -> Tensor:
    return liger_fn.swiglu(liger_fn.rms_norm(x, weight), 2.0 * x)


def test_gradients_that_nobody_wants_are_not_computed():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8)
    compiled = thunder.jit(normed_unit)
    got = torch.autograd.grad(compiled(x, weight).sum(), x)
    assert_same_bits(got, torch.autograd.grad(normed_unit(x, weight).sum(), x), "gradient of x alone")
    text = program(compiled)
    assert "rms_norm_bwd('reference', (True, False)," in text  # the weight asks for none
    assert "swiglu_bwd('reference', (True, True)," in text  # what was computed of x does


def test_without_gradients_a_call_is_one_operation():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    compiled = thunder.jit(normed_unit)
    with torch.no_grad():
        assert_same_bits([compiled(x, weight)], [normed_unit(x, weight)], "value under no_grad")
    assert operators(compiled) == {"rms_norm", "swiglu"}


@pytest.mark.parametrize("graded", [False, True])
def test_nothing_is_donated(graded: bool):
    """Not even what eager PyTorch would give away: logits that are no leaf, which are read again here."""

    def twice(x: Tensor, target: Tensor) -> Tensor:
        logits = 1.0 * x
        return liger_fn.cross_entropy(logits, target, donate=True) + logits.square().sum()

    x, target = torch.randn(4, 8), torch.tensor([0, 3, 7, 1])
    compiled = thunder.jit(twice)
    if not graded:
        assert_same_bits([compiled(x, target)], [twice(x, target)], "value")
        return
    x.requires_grad_()
    want = torch.autograd.grad(liger_fn.cross_entropy(1.0 * x, target), x)[0] + 2.0 * x.detach()
    torch.testing.assert_close(torch.autograd.grad(compiled(x, target), x)[0], want, rtol=1e-6, atol=1e-7)  # one sum, in another order


def test_named_fields_inside():
    def entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        log_prob, aux = liger_fn.linear_log_prob(x, weight, target)
        return aux.entropy + 0.5 * aux.lse - log_prob

    x, weight, target = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True), torch.tensor([0, 3, 8, 1])
    compiled, dy = thunder.jit(entropy), [torch.randn(4)]
    got, want = (gradients(lambda *t, f=f: (f(*t, target),), (x, weight), dy) for f in (compiled, entropy))
    assert_same_bits((*got[0], *got[1]), (*want[0], *want[1]), "of fields by name")
    assert_same_bits([compiled(x.detach(), weight.detach(), target)], [entropy(x.detach(), weight.detach(), target)], "without gradients")


def test_queries_alone():
    q, angle = torch.randn(1, 2, 5, 8), torch.randn(1, 5, 8)
    fs = [lambda q, a: liger_fn.rope(q, None, a.cos(), a.sin())]
    fs.append(thunder.jit(fs[0]))
    got, want = (gradients(lambda q, f=f: (f(q, angle),), [q], [q]) for f in fs)
    assert_same_bits((*got[0], *got[1]), (*want[0], *want[1]), "rope of q alone")


def test_errors_are_the_functions_own():
    with pytest.raises(ValueError, match=r"^rms_norm: weight must have shape \[8\]"):
        thunder.jit(normed_unit)(torch.randn(3, 8), torch.randn(7))


# --- models -------------------------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A residual unit and a head, of liger_nn and liger_fn."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(32, 16), liger_nn.RMSNorm(16), nn.Linear(16, 32, bias=False)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(32, 16)
        self.loss = liger_nn.LinearCrossEntropyLoss()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(liger_fn.swiglu_packed(self.up(self.norm(x))))
        return self.loss(self.head.weight, x[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def losses(model: nn.Module, loss_of: Callable[[Tensor], Tensor], vocabulary: int) -> list[float]:
    """Of three steps on three batches."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.5), []
    for step in range(3):
        loss = loss_of(torch.randint(vocabulary, (2, 11), generator=torch.Generator().manual_seed(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_module_trains():
    torch.manual_seed(0)
    model = Small()
    twin = copy.deepcopy(model)
    compiled = thunder.jit(twin)
    assert losses(twin, compiled, 32) == losses(model, model, 32)
    assert operators(compiled) == {f"{op}_{way}" for op in ("rms_norm", "swiglu_packed", "linear_cross_entropy") for way in ("fwd", "bwd")}


def test_patched_layer():
    """A layer with its norms, its rotary embedding and its gated unit swapped. Thunder 0.2.6 knows no grouped queries in SDPA."""
    model = llama(attn_implementation="eager")
    liger_patch.auto(model)
    layer, x = model.model.layers[0], torch.randn(2, 11, 32)
    turn = model.model.rotary_emb(x, torch.arange(11)[None])
    compiled = thunder.jit(layer)
    leaves = (x.requires_grad_(), *layer.parameters())
    got, want = (torch.autograd.grad((f(x, position_embeddings=turn) * x.detach()).sum(), leaves) for f in (compiled, layer))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)  # Thunder adds up a gradient's parts, and softmax's, in its own order
    assert operators(compiled) == {f"{op}_{way}" for op in ("rms_norm", "rope", "swiglu") for way in ("fwd", "bwd")}


@pytest.mark.usefixtures("fresh_compiler")
def test_patched_model_trains():
    """By way of torch.compile, whose graph Thunder takes in parts: liger_fn's functions are between them."""
    model = llama(num_hidden_layers=1, attn_implementation="eager")
    liger_patch.auto(model)
    twin = llama(num_hidden_layers=1, attn_implementation="eager")
    liger_patch.auto(twin)
    with torch._dynamo.config.patch(use_lazy_graph_module=False):  # which writes its code when called: Thunder would trace that
        compiled = thunderfx(twin)
        found = losses(twin, lambda ids: compiled(input_ids=ids, labels=ids, use_cache=False).loss, 128)
    assert found == losses(model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, 128)
    assert sum(len(graph.thunder_compiled_fns) for graph in compiled._backend.subgraph_infos) > 0


def test_page():
    """Its program runs."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), {})
