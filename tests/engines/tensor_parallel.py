"""Engines in which all ranks have the same rows and parts of each matrix: torch's plans for them, and transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.llama import modeling_llama

import liger_fn
import liger_patch
from liger_patch._modules import NormForward
from liger_patch._sharded_head import split as parts
from liger_patch._spec import Norm
from tests.engines import memory
from tests.engines.ranks import Check, Rank
from tests.engines.training import (
    FUSED,
    LOGITS,
    SHARDED,
    STEPS,
    Share,
    alone,
    batch,
    losses_by,
    patched_and_wrapped,
    the_same,
    together,
    whole_of,
)
from tests.liger_patch.models import llama
from tests.memory import arguments, budget_in, failing, scarce, summed, trained

Plan = Callable[[], dict[str, ParallelStyle]]


def projections(**row_options: Any) -> dict[str, ParallelStyle]:
    """Heads and columns of each layer over the ranks."""
    row = partial(RowwiseParallel, **row_options)
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan: dict[str, ParallelStyle] = {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
    return plan | {"model.layers.*.self_attn.o_proj": row(), "model.layers.*.mlp.down_proj": row()}


def sequences(**row_options: Any) -> dict[str, ParallelStyle]:
    """Besides, tokens over the ranks where norms and sums run."""
    cut = {"output_layouts": Shard(1), "use_local_output": False}
    gathered = {"hidden_states": Replicate()}
    return projections(**cut) | {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), **cut),
        "model.layers.*.input_layernorm": SequenceParallel(),
        "model.layers.*.self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts=gathered
        ),
        "model.layers.*.post_attention_layernorm": SequenceParallel(),
        "model.layers.*.mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }


def dtensors_in_between(plan: Plan) -> dict[str, ParallelStyle]:
    """The same, and an MLP's middle of DTensors."""
    return plan() | {f"model.layers.*.mlp.{name}": ColwiseParallel(use_local_output=False) for name in ("gate_proj", "up_proj")}


def with_head(style: Callable[..., ParallelStyle], **options: Any) -> dict[str, ParallelStyle]:
    return projections() | {"lm_head": style(**options)}


def gathered() -> dict[str, ParallelStyle]:
    """The output layer split along the vocabulary, and its logits gathered."""
    return with_head(ColwiseParallel, output_layouts=Replicate())


class Engine(NamedTuple):
    """What is split, which function the loss comes from, and what is unlike other models."""

    plan: Plan
    loss: str = SHARDED
    options: dict[str, Any] = {}  # noqa: RUF012  (nobody changes it)


ENGINES = {
    "whole head": Engine(projections, FUSED),
    "whole head, DTensors in between": Engine(partial(dtensors_in_between, projections), FUSED),
    "split vocabulary": Engine(gathered),
    "split vocabulary, uneven": Engine(gathered, options={"vocab_size": 131}),
    "split vocabulary, logits left in parts": Engine(partial(with_head, ColwiseParallel, use_local_output=False)),
    "split vocabulary, tokens split": Engine(sequences),
    "split vocabulary, tokens split, DTensors in between": Engine(partial(dtensors_in_between, sequences)),
    "head split along its input": Engine(partial(with_head, RowwiseParallel, input_layouts=Replicate()), LOGITS),
}


def split(model: nn.Module, plan: Plan, mesh: Any = None) -> nn.Module:
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh, plan())


@contextmanager
def fused(model: Any, steps: int = STEPS) -> Iterator[None]:
    """In this block, the norms and MLPs of so many forwards are liger_fn's, on what the rank has of their inputs, and none its class's."""
    norms, mlps = 2 * len(model.model.layers) + 1, len(model.model.layers)
    calls = {"rms_norm": 0, "swiglu": 0, "LlamaRMSNorm": 0, "LlamaMLP": 0}

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            assert hasattr(modeling_llama, name) or not any(isinstance(value, DTensor) for value in args)
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rms_norm", "swiglu"):
            patch.setattr(liger_fn, name, counting(name, getattr(liger_fn, name)))
        for cls in (modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP):
            patch.setattr(cls, "forward", counting(cls.__name__, cls.forward))
        yield
    assert calls == {"rms_norm": steps * norms, "swiglu": steps * mlps, "LlamaRMSNorm": 0, "LlamaMLP": 0}


def trains_as_one_process(on: Rank, engine: Engine, when: str) -> None:
    model: Any = patched_and_wrapped(partial(split, plan=engine.plan), when, **engine.options)
    with losses_by(engine.loss), fused(model):
        got = together(model, Share())
    the_same(got, alone(**engine.options), **engine.options)
    weight = model.lm_head.weight
    assert isinstance(weight, DTensor) == (engine.loss != FUSED)
    if isinstance(weight, DTensor):
        assert weight.to_local().numel() <= (weight.numel() + 32) // 2


def logits_are_there_when_asked_for(on: Rank, plan: Plan) -> None:
    """Whole ones, and gradients through them: once each with no loss asked of them, and with the loss's own."""
    data, stock = batch(0), llama()
    model: Any = patched_and_wrapped(partial(split, plan=plan), "after")
    with losses_by(SHARDED):
        outputs = model(**data.arguments())
    expected = stock(**data.arguments())
    assert outputs.logits.shape == expected.logits.shape
    for each in (outputs, expected):
        (each.loss + each.logits.square().mean()).backward()
    torch.testing.assert_close(outputs.logits + 0, expected.logits, rtol=1e-5, atol=1e-6)  # fp32, near 1
    for name in ("lm_head", "model.embed_tokens"):
        grad, wanted = whole_of(model.get_submodule(name).weight.grad), stock.get_submodule(name).weight.grad
        assert torch.linalg.vector_norm(grad - wanted) <= 1e-5 * torch.linalg.vector_norm(wanted), name  # sums of fp32
    gone = model(**data.arguments()).logits
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(RuntimeError, match="weight has changed"):
        gone.sum()


def evaluation_and_own_means(on: Rank) -> None:
    """No `num_items_in_batch`; and no training, where logits are plain."""
    data, stock = batch(0), llama()
    model: Any = patched_and_wrapped(partial(split, plan=gathered), "before")
    call = {"input_ids": data.ids, "labels": data.labels, "use_cache": False}
    torch.testing.assert_close(model(**call).loss, stock(**call).loss, rtol=2e-6, atol=0)
    got, expected = model.eval()(**call), stock.eval()(**call)
    assert type(got.logits) is Tensor
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.loss, expected.loss, rtol=2e-6, atol=0)
    liger_patch.revert(model)
    assert not isinstance(model.train()(**call).logits.grad_fn, type(None))


def a_vocabulary_of_fewer_classes_than_ranks_can_share(on: Rank) -> None:
    """One class of two ranks: the second has none, and the layer's own code runs."""
    mesh = init_device_mesh("cpu", (on.size,))
    x = DTensor.from_local(torch.ones(2, 4), mesh, (Replicate(),))
    for classes, has in ((1, False), (on.size, True)):
        weight = torch.distributed.tensor.distribute_tensor(torch.ones(classes, 4), mesh, (Shard(0),))
        assert (parts(x, weight, None, replicated=False) is not None) == has
        assert parts(torch.ones(2, 4), weight, None, replicated=False) is None, "FSDP2's ranks have tokens of their own"
        assert parts(x.redistribute(mesh, (Shard(0),)), weight, None, replicated=True) is None


def takes_no_more_than_stock(on: Rank) -> None:
    """No rank has a tensor of the output layer's whole weight, nor of all rows' logits of its part of the vocabulary.

    The embedding is frozen: the gradient of one that is split, torch makes whole before it takes its part.
    """

    def frozen(model: Any) -> nn.Module:
        model.model.embed_tokens.requires_grad_(False)
        return split(model, sequences)

    stock, ours = memory.stock_and_ours(frozen)
    memory.within(stock, ours, logits=memory.LOGITS // on.size, largest=memory.WORDS // on.size)


def out_of_memory_says_what_to_do(on: Rank, name: str, when: str) -> None:
    """The budget that the note names is for all ranks, and is enough: of rows by 512 classes, each has the logits of 256."""
    options: dict[str, Any] = {} if when == "forward" or name.endswith("log_prob") else {"reduction": "none"}
    given = arguments(name)
    for key in ("weight", "weight_teacher"):
        if key in given:
            given[key] = given[key].detach().chunk(on.size)[on.rank].clone().requires_grad_(key == "weight")

    def loss(**more: Any) -> Tensor:
        return summed(name, given, **options, **more)

    expected = trained(loss, given)
    note = failing(loss, when, given, limit=20_000)
    assert note.startswith(f"{name}: out of memory in {when}, with ")
    assert "Call it on all ranks with memory_budget=" in note
    with scarce(20_000):
        got = trained(lambda: loss(memory_budget=budget_in(note)), given)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)  # sums of fp32 in another order, of numbers near 1


def as_transformers_loads_it(on: Rank) -> None:
    """`from_pretrained` splits all that the model's own plan names, embedding and output layer included."""
    where = on.where / "saved"
    if on.rank == 0:
        llama().save_pretrained(where)
    dist.barrier()
    model: Any = LlamaForCausalLM.from_pretrained(where, distributed_config=DistributedConfig(tp_size=on.size)).train()
    assert isinstance(model.lm_head.weight, DTensor)
    liger_patch.auto(model)
    with losses_by(SHARDED), fused(model):
        got = together(model, Share())
    the_same(got, alone())


def norms_are_of_the_whole(on: Rank, mesh: Callable[[], DeviceMesh], cuts: Iterable[tuple[Placement, ...]]) -> None:
    """Values and gradients, by the function where a rank's rows are whole, whatever their number, and by the norm's own code elsewhere.

    Of 5 tokens the ranks have unlike many, of one some have none.
    """
    over = mesh()
    for cut, tokens in product(cuts, (5, 1)):
        for name, make in (("rms_norm", modeling_llama.LlamaRMSNorm), ("layer_norm", nn.LayerNorm)):
            numbers = torch.Generator().manual_seed(0)
            draw = partial(torch.randn, generator=numbers)
            stock: Any = make(8)
            for key in dict(stock.named_parameters()):
                setattr(stock, key, nn.Parameter(draw(8)))
            ours: Any = deepcopy(stock)
            for key, p in stock.named_parameters():
                setattr(ours, key, nn.Parameter(distribute_tensor(p.detach(), over)))
            kind, eps = ("rms", "variance_epsilon") if name == "rms_norm" else ("layer", "eps")
            NormForward(ours, Norm(make.__name__, kind=kind), eps).install()  # type: ignore[arg-type]
            x, dy = draw(3, tokens, 8).requires_grad_(), draw(3, tokens, 8)
            mine: Any = distribute_tensor(x.detach(), over, cut).requires_grad_()
            with pytest.MonkeyPatch.context() as patch:
                calls: list[str] = []
                function, theirs = getattr(liger_fn, name), make.forward
                patch.setattr(liger_fn, name, lambda *a, f=function, c=calls, **k: (c.append("fused"), f(*a, **k))[1])
                patch.setattr(make, "forward", lambda *a, f=theirs, c=calls: (c.append("stock"), f(*a))[1])
                y = ours(mine)
            assert calls == ["stock" if Shard(2) in cut else "fused"], (cut, calls)
            y.backward(distribute_tensor(dy, over, cut))
            expected = stock(x)
            expected.backward(dy)
            close = partial(torch.testing.assert_close, rtol=1e-5, atol=5e-6)  # fp32, of sums of 15 numbers near 1
            close(y.full_tensor(), expected)
            close(mine.grad.full_tensor(), x.grad)
            for key, p in stock.named_parameters():
                close(getattr(ours, key).grad.full_tensor(), p.grad)


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


CHECKS: dict[str, Check] = {
    **{
        f"{name}, patched {when}": partial(trains_as_one_process, engine=engine, when=when)
        for name, engine in ENGINES.items()
        for when in ("before", "after")
    },
    "logits_are_there_when_asked_for": partial(logits_are_there_when_asked_for, plan=gathered),
    "tokens split: logits_are_there_when_asked_for": partial(logits_are_there_when_asked_for, plan=sequences),
    "evaluation_and_own_means": evaluation_and_own_means,
    "a_vocabulary_of_fewer_classes_than_ranks_can_share": a_vocabulary_of_fewer_classes_than_ranks_can_share,
    "tokens split: takes_no_more_than_stock": takes_no_more_than_stock,
    **{
        f"{name}: out of memory in {when}": partial(out_of_memory_says_what_to_do, name=f"vocab_parallel_{name}", when=when)
        for name in ("linear_cross_entropy", "linear_log_prob", "linear_distill")
        for when in ("forward", "backward")
    },
    "norms_are_of_the_whole": partial(norms_are_of_the_whole, mesh=line, cuts=[(Shard(1),), (Replicate(),), (Shard(2),)]),
    "as_transformers_loads_it": as_transformers_loads_it,
}
