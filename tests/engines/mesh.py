"""FSDP2 and tensor parallelism on the two axes of one mesh: shares of the batch on one, parts of each matrix on the other."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.engines.ranks import Check, Rank
from tests.engines.tensor_parallel import ENGINES, Engine, fused, norms_are_of_the_whole, split
from tests.engines.training import Share, alone, losses_by, patched_and_wrapped, the_same, together


def both(model: Any, engine: Engine, mesh: DeviceMesh) -> nn.Module:
    split(model, engine.plan, mesh["tp"])
    for layer in (*model.model.layers, model.lm_head, model):
        fully_shard(layer, mesh=mesh["dp"])
    return model


def trains_as_one_process(on: Rank, engine: Engine, when: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model: Any = patched_and_wrapped(partial(both, engine=engine, mesh=mesh), when, **engine.options)
    with losses_by(engine.loss), fused(model):
        got = together(model, Share(mesh["dp"].get_local_rank(), 2, mesh["dp"].get_group()))
    the_same(got, alone(**engine.options), **engine.options)
    weight = model.lm_head.weight
    assert isinstance(weight, DTensor)
    parts = 4 if weight.device_mesh.ndim == 2 else 2
    assert parts * weight.to_local().numel() == weight.numel()


def square() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2))


CUTS = [(Shard(0), Shard(1)), (Shard(1), Replicate()), (Replicate(), Shard(0)), (Shard(0), Shard(2))]
CHECKS: dict[str, Check] = {
    **{
        f"{name}, patched {when}": partial(trains_as_one_process, engine=ENGINES[name], when=when)
        for name, when in (
            ("whole head", "before"),
            ("split vocabulary", "after"),
            ("split vocabulary, tokens split", "before"),
            ("split vocabulary, tokens split, DTensors in between", "after"),
            ("split vocabulary, logits left in parts", "after"),
        )
    },
    "norms_are_of_the_whole": partial(norms_are_of_the_whole, mesh=square, cuts=CUTS),
}
