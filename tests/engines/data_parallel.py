"""Engines in which each rank has its share of the batch: DistributedDataParallel, FSDP2 and FSDP1."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import liger_fn
import liger_patch
from tests.engines import memory
from tests.engines.ranks import Check, Rank
from tests.engines.training import (
    FUSED,
    Batch,
    Named,
    Share,
    alone,
    batch,
    losses_by,
    own_name,
    patched_and_wrapped,
    the_same,
    together,
    whole,
    whole_of,
)
from tests.liger_patch.models import VOCAB, llama

Wrap = Callable[[Any], nn.Module]


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=False)


def fsdp2(model: Any, *, own_group: bool = False, checkpoint: str = "", **options: Any) -> nn.Module:
    """A group for each layer, and one for all else; the output layer in a group of its own if asked for."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if checkpoint == "transformers":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for i, layer in enumerate(model.model.layers):
        if checkpoint == "torch":
            layer = model.model.layers[i] = checkpoint_wrapper(layer)
        fully_shard(layer, mesh=mesh, **options)
    if own_group:
        fully_shard(model.lm_head, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp1(model: nn.Module) -> nn.Module:
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    return FullyShardedDataParallel(model, use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu"))


class Engine(NamedTuple):
    """How it has the model, and what else is not as usual."""

    wrap: Wrap
    tied: bool = False
    parts: int = 1


ENGINES = {
    "ddp": Engine(ddp),
    "ddp, tied": Engine(ddp, tied=True),
    "ddp, two parts of each batch": Engine(ddp, parts=2),
    "fsdp2": Engine(fsdp2),
    "fsdp2, head in its own group": Engine(partial(fsdp2, own_group=True)),
    "fsdp2, head in its own group, nothing resharded": Engine(partial(fsdp2, own_group=True, reshard_after_forward=False)),
    "fsdp2, all resharded": Engine(partial(fsdp2, reshard_after_forward=True)),
    "fsdp2, offloaded": Engine(partial(fsdp2, own_group=True, offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "fsdp2, layers checkpointed by torch": Engine(partial(fsdp2, own_group=True, checkpoint="torch")),
    "fsdp2, layers checkpointed by transformers": Engine(partial(fsdp2, checkpoint="transformers")),
    "fsdp2, tied": Engine(fsdp2, tied=True),
    "fsdp1": Engine(fsdp1),
    "fsdp1, tied": Engine(fsdp1, tied=True),
}


def share(on: Rank) -> Share:
    return Share(on.rank, on.size)


def trains_as_one_process(on: Rank, engine: Engine, when: str) -> None:
    model = patched_and_wrapped(engine.wrap, when, tie_word_embeddings=engine.tied)
    with losses_by(FUSED):
        got = together(model, share(on), parts=engine.parts)
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            got = got._replace(parameters=whole(model))
    elif engine.wrap is not ddp:
        sharded(model.lm_head.weight)
    the_same(got, alone(tie_word_embeddings=engine.tied), tie_word_embeddings=engine.tied)


def sharded(weight: Any) -> None:
    """A rank has its half of the rows, and no more."""
    assert isinstance(weight, DTensor)
    assert 2 * weight.to_local().numel() == weight.numel()


def the_head_is_whole_in_its_own_call_alone(on: Rank) -> None:
    """Before it runs, between its forward and its backward, and after that."""
    model: Any = patched_and_wrapped(partial(fsdp2, own_group=True, reshard_after_forward=True), "before")
    weight, seen = model.lm_head._parameters, []

    def look(where: str) -> None:
        seen.append(where)
        sharded(weight["weight"])

    model.model.norm.register_forward_hook(lambda *_: look("before"))
    model.model.layers[0].register_full_backward_pre_hook(lambda *_: look("after its backward"))
    fused = liger_fn.linear_cross_entropy

    def looking(x: Tensor, head: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert not isinstance(head, DTensor)
        assert head.shape[0] == VOCAB
        seen.append("in its forward")
        return fused(x, head, *args, **kwargs)

    liger_fn.linear_cross_entropy = looking
    try:
        loss = model(**batch(0).part(on.rank, on.size).arguments()).loss
    finally:
        liger_fn.linear_cross_entropy = fused
    look("after its forward")
    loss.backward()
    look("after the step")
    assert seen == ["before", "in its forward", "after its forward", "after its backward", "after the step"]


def one_layer_is_whole_at_a_time(on: Rank, **options: Any) -> None:
    """And the output layer when none is. Where nothing is given back all layers are, and a head of no group of its own is so throughout."""
    own = partial(fsdp2, own_group=True, **options)
    for wrap, most in (
        (own, memory.Whole(1, head_besides=False)),
        (partial(own, reshard_after_forward=False), memory.Whole(memory.LAYERS, head_besides=False)),
        (partial(fsdp2, **options), memory.Whole(1, head_besides=True)),
    ):
        model: Any = patched_and_wrapped(wrap, "before", **memory.SIZES)
        assert memory.most_whole(model, memory.step_of(model, 1), lambda p: not isinstance(p, DTensor)) == most


def takes_no_more_than_stock(on: Rank, wrap: Wrap, largest: int) -> None:
    """Nor has it a tensor of all logits: its largest is what the engine gathers at a time."""
    stock, ours = memory.stock_and_ours(wrap)
    memory.within(stock, ours, logits=memory.LOGITS, largest=largest)


NORM = 4 * memory.H
MEASURED = {  # the largest tensor: a matrix of all words, with what is gathered beside it
    "ddp": memory.WORDS,
    "fsdp2, head in its own group": memory.WORDS + NORM,
    "fsdp2, layers checkpointed by torch": memory.WORDS + NORM,
    "fsdp1": 2 * memory.WORDS + NORM,
}


def mixed_precision_is_as_near_to_fp32_as_stock(on: Rank) -> None:
    """All parameters together are no further from those trained in fp32 than the stock model's are; another order is allowed for."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    stock, ours = (patched_and_wrapped(partial(fsdp2, own_group=True, mp_policy=policy), when) for when in ("never", "before"))
    with losses_by():
        theirs = together(stock, share(on))
    with losses_by(FUSED):
        mine = together(ours, share(on))
    start, exact, a, b = (flat(named) for named in (whole(llama()), alone().parameters, theirs.parameters, mine.parameters))
    off = torch.linalg.vector_norm(a - exact)
    assert 0 < off < 0.1 * torch.linalg.vector_norm(exact - start)
    assert torch.linalg.vector_norm(b - exact) <= 1.1 * off
    torch.testing.assert_close(mine.losses, theirs.losses, rtol=2**-9, atol=0)  # half a rounding of bf16, in means of many


def flat(named: Named) -> Tensor:
    return torch.cat([t.flatten() for t in named.values()])


def lopsided(step: int) -> Batch:
    """The second rank has not one label that counts."""
    ids, labels, _ = batch(step)
    labels = labels.clone()
    labels[1::2] = -100
    return Batch(ids, labels, int((labels[:, 1:] != -100).sum()))


def a_rank_without_labels(on: Rank, wrap: Wrap) -> None:
    model = patched_and_wrapped(wrap, "before")
    with losses_by(FUSED):
        got = together(model, share(on), batch=lopsided)
    the_same(got, alone(lopsided))


def a_rank_without_labels_where_nobody_counts(on: Rank, wrap: Wrap) -> None:
    """Each rank's own mean, which is 0 of no label: the mean of the ranks' gradients is half of the other's."""
    model = patched_and_wrapped(wrap, "before")
    mine, theirs = (lopsided(0).part(rank, on.size) for rank in (on.rank, 0))
    loss = model(mine.ids, labels=mine.labels, use_cache=False).loss
    loss.backward()
    stock = llama()
    expected = stock(theirs.ids, labels=theirs.labels, use_cache=False).loss
    (expected / on.size).backward()
    assert abs(loss.item() - (expected.item() if on.rank == 0 else 0.0)) <= 2e-6 * expected.item()
    wanted = dict(stock.named_parameters())
    for name, p in model.named_parameters():
        grad = wanted[own_name(name)].grad
        assert torch.linalg.vector_norm(whole_of(p.grad) - grad) <= 1e-5 * torch.linalg.vector_norm(grad), name  # sums of fp32


def a_rank_with_a_nan(on: Rank, wrap: Wrap) -> None:
    """Its loss says so, the other's does not; the gradients, which are of all ranks, do. No rank is left waiting."""
    bare = llama()
    liger_patch.auto(bare)
    bare.model.embed_tokens.register_forward_hook(lambda *call: call[-1].index_fill(1, torch.tensor([3]), torch.nan if on.rank else 0.0))
    model = wrap(bare)
    loss = model(**batch(0).part(on.rank, on.size).arguments()).loss
    loss.backward()
    assert bool(loss.isnan()) == (on.rank == 1)
    for name, p in model.named_parameters():
        assert whole_of(p.grad).isnan().any(), name


FAULTS = (a_rank_without_labels, a_rank_without_labels_where_nobody_counts, a_rank_with_a_nan)
CHECKS: dict[str, Check] = {
    **{
        f"{name}, patched {when}": partial(trains_as_one_process, engine=engine, when=when)
        for name, engine in ENGINES.items()
        for when in ("before", "after")
    },
    **{f"{name}: {fault.__name__}": partial(fault, wrap=wrap) for name, wrap in (("ddp", ddp), ("fsdp2", fsdp2)) for fault in FAULTS},
    "fsdp2: the_head_is_whole_in_its_own_call_alone": the_head_is_whole_in_its_own_call_alone,
    "fsdp2: one_layer_is_whole_at_a_time": one_layer_is_whole_at_a_time,
    "fsdp2, layers checkpointed by torch: one_layer_is_whole_at_a_time": partial(one_layer_is_whole_at_a_time, checkpoint="torch"),
    **{
        f"{name}: takes_no_more_than_stock": partial(takes_no_more_than_stock, wrap=ENGINES[name].wrap, largest=n)
        for name, n in MEASURED.items()
    },
    "fsdp2: mixed_precision_is_as_near_to_fp32_as_stock": mixed_precision_is_as_near_to_fp32_as_stock,
}
