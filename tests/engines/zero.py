"""DeepSpeed's ZeRO on CPUs. The library changes torch when it is imported, so that its ranks run nothing else."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

os.environ["DS_ACCELERATOR"] = "cpu"  # read at import
import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

import liger_fn
import liger_patch
from tests.engines import memory
from tests.engines.ranks import Check, Rank
from tests.engines.training import FUSED, LR, STEPS, Named, Trained, alone, batch, losses_by, the_same, whole
from tests.liger_patch.models import VOCAB, llama

ONE_GROUP = True
# Its own sums through shared memory are compiled when first wanted. Gloo's do.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Engine(NamedTuple):
    """What ZeRO shards (optimizer's state, gradients, parameters), and what else is not as usual."""

    stage: int
    tied: bool = False
    parts: int = 1
    born_sharded: bool = False
    when: tuple[str, ...] = ("before", "after")


ENGINES = {
    "stage 1": Engine(1),
    "stage 2": Engine(2),
    "stage 2, two parts of each batch": Engine(2, parts=2, when=("before",)),
    "stage 3": Engine(3),
    "stage 3, tied": Engine(3, tied=True, when=("before",)),
    "stage 3, two parts of each batch": Engine(3, parts=2, when=("before",)),
    "stage 3, never whole": Engine(3, born_sharded=True),
}


def engine_of(on: Rank, engine: Engine, when: str, **sizes: int) -> Any:
    """DeepSpeed's engine around a tiny Llama, patched before it was made, or after."""
    os.environ |= {"RANK": str(on.rank), "LOCAL_RANK": str(on.rank), "WORLD_SIZE": str(on.size), "LOCAL_SIZE": str(on.size)}
    zero: dict[str, Any] = {"stage": engine.stage}
    if engine.stage == 3:  # parameters this small would otherwise never be taken apart
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
        zero["reduce_bucket_size"] = memory.V * memory.H  # elements of gradients that wait for one another; by default more than all
    config = {
        "train_micro_batch_size_per_gpu": 2 // engine.parts,
        "gradient_accumulation_steps": engine.parts,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # 1 by default
        "zero_optimization": zero,
    }
    values = llama(tie_word_embeddings=engine.tied).state_dict() if engine.born_sharded else None
    with deepspeed.zero.Init(config_dict_or_path=config) if engine.born_sharded else nullcontext():
        model = llama(tie_word_embeddings=engine.tied, **sizes)
    if values is not None:
        with deepspeed.zero.GatheredParameters([*model.parameters()], modifier_rank=0):
            if on.rank == 0:
                model.load_state_dict(values)
    if when == "before":
        liger_patch.auto(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    wrapped: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    if when == "after":
        liger_patch.auto(wrapped)
    return wrapped


def trained(on: Rank, wrapped: Any, parts: int) -> Trained:
    """As `training.together`. The engine divides by parts and by ranks what it sums over them."""
    losses = []
    for step in range(STEPS):
        total = torch.zeros(())
        for i in range(parts):
            mine = batch(step).part(on.rank, on.size).part(i, parts)
            loss = wrapped(**mine.arguments()).loss
            wrapped.backward(loss * on.size * parts)
            wrapped.step()
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(total.item())
    return Trained(losses, everything(wrapped.module))


def everything(model: Any) -> Named:
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext():
        return whole(model)


def trains_as_one_process(on: Rank, engine: Engine, when: str) -> None:
    wrapped = engine_of(on, engine, when)
    with losses_by(FUSED):
        got = trained(on, wrapped, engine.parts)
    the_same(got, alone(tie_word_embeddings=engine.tied), tie_word_embeddings=engine.tied)


def the_head_is_whole_in_its_own_call_alone(on: Rank) -> None:
    wrapped = engine_of(on, ENGINES["stage 3"], "before")
    weight, seen, fused = wrapped.module.lm_head.weight, [], liger_fn.linear_cross_entropy

    def looking(x: Tensor, head: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(head.shape[0])
        return fused(x, head, *args, **kwargs)

    liger_fn.linear_cross_entropy = looking
    try:
        for step in range(2):  # the second follows the order of modules that the first has shown
            assert weight.numel() == 0
            assert 2 * weight.ds_tensor.numel() == weight.ds_numel
            outputs = wrapped(**batch(step).part(on.rank, on.size).arguments())
            assert weight.numel() == 0, "after its forward"
            wrapped.backward(outputs.loss)
            wrapped.step()
    finally:
        liger_fn.linear_cross_entropy = fused
    assert seen == [VOCAB, VOCAB]


def takes_no_more_than_stock(on: Rank) -> None:
    """Nor has it a tensor of all logits: its largest is a matrix of all words.

    One layer is whole at a time, and the output layer when none is.
    """
    stock, ours = (engine_of(on, ENGINES["stage 3"], when, **memory.SIZES) for when in ("never", "before"))
    liger_patch.auto(ours, verify=False, memory_budget=memory.BUDGET)
    steps = [memory.step_of(each, memory.ROWS, each.backward) for each in (stock, ours)]
    memory.within(*map(memory.taken, steps), logits=memory.LOGITS, largest=memory.WORDS)
    had = memory.most_whole(ours.module, steps[1], lambda p: p.numel() > 0)
    assert had == memory.Whole(1, head_besides=False), had


def logits_are_there_when_asked_for(on: Rank) -> None:
    wrapped, mine = engine_of(on, ENGINES["stage 3"], "after"), batch(0).part(on.rank, on.size)
    logits = wrapped(**mine.arguments()).logits
    torch.testing.assert_close(logits + 0, llama()(**mine.arguments()).logits, rtol=1e-5, atol=1e-6)  # fp32, near 1


CHECKS: dict[str, Check] = {
    **{
        f"{name}, patched {when}": partial(trains_as_one_process, engine=engine, when=when)
        for name, engine in ENGINES.items()
        for when in engine.when
    },
    "the_head_is_whole_in_its_own_call_alone": the_head_is_whole_in_its_own_call_alone,
    "takes_no_more_than_stock": takes_no_more_than_stock,
    "logits_are_there_when_asked_for": logits_are_there_when_asked_for,
}
