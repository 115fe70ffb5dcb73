"""Which functions run on the parts of DTensors, and what comes back: on one rank of four that only seem to be there.

What all ranks make together is tested in tests/engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import liger_fn

pytest.importorskip("transformers")
if not dist.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from liger_patch._dtensor import CUTS, in_parts
from liger_patch._modules import GLUForward, NormForward
from liger_patch._rope import KINDS
from liger_patch._spec import GLU, Norm

R, P = Replicate(), Partial()
ROWS, ELEMENTS = [op for op, cut in CUTS.items() if cut == "rows"], [op for op, cut in CUTS.items() if cut == "elements"]
PLACEMENTS = {  # of three axes over a mesh of two by two; whether that suits functions of rows, and of elements
    (R, R): (True, True),
    (Shard(0), R): (True, True),
    (R, Shard(1)): (True, True),
    (Shard(0), Shard(1)): (True, True),
    (Shard(1), Shard(1)): (True, True),
    (R, Shard(2)): (False, True),
    (Shard(2), Shard(1)): (False, True),
    (P, R): (False, False),
    (Shard(1), P): (False, False),
    (R, Partial("avg")): (False, False),
    (R, _StridedShard(1, split_factor=2)): (False, False),
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dist.destroy_process_group()


def placed(mesh: DeviceMesh, placements: Any, *shape: int, seed: int = 0) -> Any:
    """What this rank has of a tensor of that shape, with numbers of its own."""
    local = list(shape)
    for i, p in enumerate(placements):
        if isinstance(p, Shard):
            local[p.dim] = -(-local[p.dim] // mesh.size(i))
    numbers = torch.randn(local, generator=torch.Generator().manual_seed(seed))
    strides = torch.empty(shape).stride()
    return DTensor.from_local(numbers, mesh, placements, shape=torch.Size(shape), stride=strides).requires_grad_()


@pytest.mark.parametrize("placements", PLACEMENTS, ids=str)
def test_which_placements_suit_which_functions(placements: Any, mesh: DeviceMesh):
    x = placed(mesh, placements, 4, 4, 8)
    rows, elements = PLACEMENTS[placements]
    assert {op: in_parts(op, (x,)) for op in CUTS} == {**dict.fromkeys(ROWS, rows), **dict.fromkeys(ELEMENTS, elements)}
    assert {op: in_parts(op, (x, x)) for op in ELEMENTS} == dict.fromkeys(ELEMENTS, elements)
    assert not in_parts("softmax", (x,)), "a function that nobody has looked at"


def test_inputs_are_alike_and_weights_whole(mesh: DeviceMesh):
    make = partial(placed, mesh, (R, Shard(1)))
    x, weight = make(4, 4, 8), placed(mesh, (R, R), 8)
    assert in_parts("layer_norm", (x,), (weight, None))
    assert in_parts("layer_norm", (x,), (None, None))
    assert in_parts("swiglu", (x, make(4, 4, 8)))
    elsewhere = init_device_mesh("cpu", (1, 4))
    for other in (x.to_local(), make(4, 8, 8), placed(mesh, (Shard(1), R), 4, 4, 8), placed(elsewhere, (R, Shard(1)), 4, 4, 8)):
        assert not in_parts("swiglu", (x, other))
    for other in (weight.to_local(), placed(mesh, (R, Shard(0)), 8), placed(mesh, (R, P), 8), placed(elsewhere, (R, R), 8)):
        assert not in_parts("rms_norm", (x,), (other,))
        assert not in_parts("layer_norm", (x,), (weight, other))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Which functions were called, with inputs of which shapes; and "stock", where the norm's own forward was."""
    seen: list[tuple[str, Any]] = []

    def spy(of: Any, attribute: str, name: str) -> None:
        original = getattr(of, attribute)

        def call(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if of is liger_fn else args[1]
            seen.append((name, tuple(x.shape)))
            assert of is not liger_fn or not isinstance(x, DTensor)
            return original(*args, **kwargs)

        call.reference = getattr(original, "reference", None)  # type: ignore[attr-defined]
        monkeypatch.setattr(of, attribute, call)

    for op in CUTS:
        spy(liger_fn, op, op)
    spy(LlamaRMSNorm, "forward", "stock")
    return seen


def rms_norm(mesh: DeviceMesh, weight: Any = None) -> Any:
    norm: Any = LlamaRMSNorm(8)
    norm.weight = nn.Parameter(placed(mesh, (R, R), 8, seed=1).detach() if weight is None else weight)
    NormForward(norm, Norm("LlamaRMSNorm"), "variance_epsilon").install()
    return norm


@pytest.mark.parametrize(
    ("placements", "local", "of_weight"),
    [
        ((R, Shard(1)), (3, 4, 8), (R, P)),
        ((Shard(0), Shard(1)), (2, 4, 8), (P, P)),
        ((Shard(0), R), (2, 7, 8), (P, R)),
        ((R, R), (3, 7, 8), (R, R)),
    ],
    ids=str,
)
def test_a_norm_of_parts(placements: Any, local: Any, of_weight: Any, mesh: DeviceMesh, calls: list[Any]):
    """Also where the ranks' parts are unlike: 3 rows and 7 tokens of two ranks each."""
    norm, x = rms_norm(mesh), placed(mesh, placements, 3, 7, 8)
    y = norm(x)
    assert calls == [("rms_norm", local)]
    assert (y.placements, y.shape, y.stride()) == (placements, (3, 7, 8), (56, 8, 1))
    mine, w = (t.to_local().detach().requires_grad_() for t in (x, norm.weight))
    expected = F.rms_norm(mine, (8,), w, norm.variance_epsilon)
    torch.testing.assert_close(y.to_local(), expected)
    dy = placed(mesh, placements, 3, 7, 8, seed=2).detach()
    # Not .grad: where a leaf's parts are unlike, earlier PyTorch gathers what it puts there.
    dx, dw = torch.autograd.grad(y, (x, norm.weight), dy)
    expected.backward(dy.to_local())
    assert (dx.placements, dw.placements) == (placements, of_weight)
    torch.testing.assert_close(dx.to_local(), mine.grad)
    torch.testing.assert_close(dw.to_local(), w.grad)  # this rank's rows' part of the sum


def test_a_layer_norm_of_parts(mesh: DeviceMesh, calls: list[Any]):
    """Its bias too; and an offset of the weight, which is of the whole one."""
    norm: Any = nn.LayerNorm(8)
    norm.weight, norm.bias = (nn.Parameter(placed(mesh, (R, R), 8, seed=s).detach()) for s in (1, 2))
    NormForward(norm, Norm("LayerNorm", kind="layer", offset=1.0), "eps").install()
    x = placed(mesh, (Shard(0), Shard(1)), 4, 4, 8)
    y = norm(x)
    y.sum().backward()
    assert calls == [("layer_norm", (2, 2, 8))]
    torch.testing.assert_close(y.to_local(), F.layer_norm(x.to_local(), (8,), norm.weight.to_local() + 1, norm.bias.to_local(), norm.eps))
    assert norm.weight.grad.placements == norm.bias.grad.placements == (P, P)


@pytest.mark.parametrize(
    "placements", [p for p, suits in PLACEMENTS.items() if not suits[0] and not any(isinstance(q, _StridedShard) for q in p)], ids=str
)
def test_other_norms_run_as_they_did(placements: Any, mesh: DeviceMesh, calls: list[Any]):
    x = placed(mesh, placements, 4, 4, 8)
    assert rms_norm(mesh)(x).shape == x.shape
    assert calls == [("stock", (4, 4, 8))]


def test_a_plain_weight_is_refused_as_it_was(mesh: DeviceMesh, calls: list[Any]):
    """Nobody would sum its gradient over the ranks."""
    norm = rms_norm(mesh, weight=torch.ones(8))
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        norm(placed(mesh, (R, Shard(1)), 4, 4, 8))
    assert calls == [("stock", (4, 4, 8))]


class Placed(nn.Module):
    """Stands where a projection would, and makes a DTensor of that kind."""

    def __init__(self, t: Tensor) -> None:
        super().__init__()
        self.t = t

    def forward(self, x: Tensor) -> Tensor:
        return self.t


class MLP(nn.Module):
    def __init__(self, act_fn: nn.Module, **projections: Tensor) -> None:
        super().__init__()
        self.act_fn = act_fn
        for name, t in projections.items():
            self.add_module(name, Placed(t))
        self.down_proj = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("only the middle is replaced")


def the_middle(act: str, spec: GLU, *inputs: Tensor) -> Any:
    act_fn = {"silu": nn.SiLU(), "gelu_tanh": nn.GELU("tanh"), "relu_squared": nn.ReLU()}[act]
    mlp = MLP(act_fn, **dict(zip(spec.projections, inputs, strict=False)))
    GLUForward(mlp, spec, act).install()
    return mlp(inputs[0])


SEPARATE, PACKED, ONE = GLU("MLP"), GLU("MLP", packed="gate_up_proj"), GLU("MLP", gate="", act="relu_squared")


@pytest.mark.parametrize("placements", [(R, Shard(2)), (Shard(0), Shard(1)), (P, R), (R, Partial("avg"))], ids=str)
@pytest.mark.parametrize(
    ("act", "spec"),
    [("silu", SEPARATE), ("gelu_tanh", SEPARATE), ("silu", PACKED), ("relu_squared", ONE)],
    ids=["swiglu", "geglu", "swiglu_packed", "relu_squared"],
)
def test_a_gated_unit_of_parts(act: str, spec: GLU, placements: Any, mesh: DeviceMesh, calls: list[Any]):
    """Where no rank can do its part alone, the definition runs, which DTensor knows how to bring together."""
    inputs = [placed(mesh, placements, 4, 4, 8, seed=seed) for seed in range(2 if spec is SEPARATE else 1)]
    y = the_middle(act, spec, *inputs)
    op = {"silu": "swiglu", "gelu_tanh": "geglu"}.get(act, act) + ("_packed" if spec.packed else "")
    on_its_own = PLACEMENTS[placements][CUTS[op] == "elements"]
    assert y.shape == (4, 4, 4 if spec.packed else 8)
    assert [name for name, _ in calls] == ([op] if on_its_own else [])
    y.sum().backward()
    assert all(t.grad.shape == t.shape for t in inputs)
    if on_its_own:
        assert y.placements == placements
        options = {"approximate": "tanh"} if act == "gelu_tanh" else {}
        torch.testing.assert_close(y.to_local(), getattr(liger_fn, op)(*(t.to_local() for t in inputs), **options))


@pytest.mark.parametrize("name", KINDS)
def test_a_rotation_of_parts(name: str, mesh: DeviceMesh):
    """By its definition, which DTensor divides; tables are whole on each rank, as attention's own code would need them."""
    kind = KINDS[name]
    heads = 2 if kind.by_tokens else 1
    shape, placements = ((4, 5, 6, 8) if kind.by_tokens else (4, 6, 5, 8)), (Shard(0), Shard(heads))
    q, k = (placed(mesh, placements, *shape, seed=seed) for seed in (1, 2))
    angles = torch.linspace(-3, 3, 20).reshape(1, 5, 4)
    if name.startswith("as_complex"):
        tables: tuple[Tensor, ...] = (torch.polar(torch.ones(1, 5, 4), angles),)
    else:
        held = angles[0] if name == "of_tokens" else angles
        tables = kind.tables(held.cos()), kind.tables(held.sin())
    whole = [DTensor.from_local(t, mesh, (R, R)) for t in tables]
    turned = (q,) if name.startswith("one") else (q, k)
    mine = [t.to_local().detach().requires_grad_() for t in turned]
    got, expected = (y if isinstance(y, tuple) else (y,) for y in (kind.function(*turned, *whole), kind.function(*mine, *tables)))
    for y, of in zip(got, expected, strict=True):
        assert y.placements == placements
        torch.testing.assert_close(y.to_local(), of)
    sum(y.square().sum() for y in got).backward()
    sum(y.square().sum() for y in expected).backward()
    for t, of in zip(turned, mine, strict=True):
        torch.testing.assert_close(t.grad.to_local(), of.grad)


def test_a_norm_of_parts_is_compiled_whole(mesh: DeviceMesh):
    norm = rms_norm(mesh)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    x = placed(mesh, (R, Shard(1)), 4, 4, 8)
    compiled(x).sum().backward()
    got, x.grad, norm.weight.grad = (x.grad, norm.weight.grad), None, None
    norm(x).sum().backward()
    assert got[1].placements == norm.weight.grad.placements == (R, P)
    for one, other in zip(got, (x.grad, norm.weight.grad), strict=True):
        torch.testing.assert_close(one.to_local(), other.to_local())
