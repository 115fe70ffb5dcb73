"""One rank of many on one GPU: FSDP2 over a process group that moves nothing, which allocates all that a rank allocates.

Weights and losses are meaningless, so only memory is read. `sharded` is what `examples/fsdp2_pretrain.py` does for a model that no single
device holds: made and patched without memory, sharded layer by layer, filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

import liger_patch

from .kept import Piece
from .shapes import OURS, Shape


@contextmanager
def pretended(world: int) -> Iterator[None]:
    """Rank 0 of `world`, whose collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def checkpoint(model: Any, on: bool = True) -> None:
    """Turn activation checkpointing on or off. Earlier releases of transformers know it by its second name alone."""
    if on:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)({"use_reentrant": False})
    else:
        (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()


def sharded(shape: Shape, world: int, provider: str, device: torch.device, checkpointing: bool = True) -> Any:
    """This rank's share of a model in fp32, that computes in bf16 and reduces gradients in fp32."""
    config = AutoConfig.for_model(
        "llama", **shape.cut(1), num_hidden_layers=shape.layers, use_cache=False, max_position_embeddings=131072
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()
    if provider == OURS:
        liger_patch.auto(model)
    if checkpointing:
        checkpoint(model)
    mesh = init_device_mesh(device.type, (world,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    with torch.no_grad():
        for weight in model.parameters():
            weight.to_local().zero_()
        for buffer in model.buffers():
            buffer.fill_(1)
    return model


def measure(shape: Shape, piece: Piece, device: torch.device) -> Piece:
    """The peak of a step that finds the optimizer's states there."""
    with pretended(piece.world):
        model = sharded(shape, piece.world, piece.provider, device, piece.checkpointing)
        adam = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.randint(shape.vocab, (piece.batch, piece.seq), device=device)
        for _ in range(2):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            model(input_ids=ids, labels=ids).loss.backward()
            adam.step()
            adam.zero_grad()
        return replace(piece, peak=torch.cuda.max_memory_allocated() if device.type == "cuda" else None)
