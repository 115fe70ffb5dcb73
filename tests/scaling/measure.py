"""The terms of a training step on one GPU: layers by the difference of three and one, the head of a model without layers, the optimizer.

A rank of tensor parallelism computes what a whole layer with fewer heads and columns computes, so that its share is measured as one. What
it waits for is not.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import liger_patch

from . import rank
from .kept import EMBEDDING, HEAD, LAYERS, OPTIMIZER, RANK, Piece
from .shapes import BY_NAME, LLAMA_8B, LLAMA_70B, OURS, PROVIDERS, STOCK, Shape

SEQ, LONG = 4096, 32768  # lengths of a sequence; their difference tells attention's quadratic part
BATCHES = (1, 4)  # of SEQ
MOST = 3  # layers; a layer is half the difference from one
HEADS = {STOCK: (4096, 8192, 16384), OURS: (4096, 16384, 65536)}  # tokens: a stock head of more leaves a GPU no room
TIMED = 2  # steps, after one that is not counted
OPTIMIZED = 2**28  # parameters
RANKS = ((LLAMA_8B, 8, 8192), (LLAMA_8B, 512, 8192), (LLAMA_70B, 64, 4096))  # how many share the weights, and tokens


@dataclass(frozen=True)
class Times:
    """Medians of steps, and the memory of the last."""

    forward_ms: float
    backward_ms: float
    kept: int | None = None
    forward_peak: int | None = None
    backward_peak: int | None = None


def wanted(shapes: tuple[str, ...] = tuple(BY_NAME)) -> list[tuple[tuple[str, int, str], list[Piece]]]:
    """Every piece of `shapes`, in groups that one model serves: (shape, tp, provider)."""
    groups = []
    for shape in (BY_NAME[name] for name in shapes):
        for tp in shape.tp:
            for provider in PROVIDERS:
                about: dict[str, Any] = {"shape": shape.name, "tp": tp, "provider": provider}
                layers = [
                    Piece(LAYERS, **about, layers=n, batch=batch, seq=seq, checkpointing=checkpointing)
                    for checkpointing, batch, seq in (*((c, b, SEQ) for c in (True, False) for b in BATCHES), (True, 1, LONG))
                    for n in (1, MOST)
                ]
                heads = [Piece(HEAD, **about, batch=tokens // SEQ, seq=SEQ) for tokens in HEADS[provider]]
                groups.append(((shape.name, tp, provider), heads + layers))
    return groups


def alone(shapes: tuple[str, ...] = tuple(BY_NAME)) -> list[Piece]:
    """The pieces that need no such model."""
    found = [Piece(OPTIMIZER, dtype=dtype) for dtype in ("bfloat16", "float32")]
    found += [Piece(EMBEDDING, shape=name, batch=batch, seq=SEQ) for name in shapes for batch in BATCHES]
    return found + [
        Piece(RANK, shape=shape.name, provider=provider, world=world, layers=shape.layers, seq=tokens, checkpointing=True)
        for shape, world, tokens in RANKS
        if shape.name in shapes
        for provider in (OURS, STOCK)
    ]


def build(shape: Shape, tp: int, provider: str, device: torch.device) -> Any:
    """A model of `MOST` layers with random weights in bf16 (fp32 on a CPU)."""
    sizes = shape.cut(tp) | ({"vocab_size": shape.vocab} if provider == STOCK else {})  # the stock loss gathers its logits
    config = AutoConfig.for_model("llama", **sizes, num_hidden_layers=MOST, use_cache=False, max_position_embeddings=131072)
    torch.manual_seed(0)
    with device:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    if provider == OURS:
        liger_patch.auto(model)
    return model


@contextmanager
def cut_to(model: Any, layers: int, checkpointing: bool) -> Iterator[None]:
    """For a while, a model of its first layers alone."""
    model.config.num_hidden_layers = layers
    if checkpointing:
        rank.checkpoint(model)
    try:
        yield
    finally:
        model.config.num_hidden_layers = MOST
        if checkpointing:
            rank.checkpoint(model, on=False)


def of_model(model: Any, piece: Piece, device: torch.device) -> Piece:
    """A piece of a model that is there."""
    hidden, batch, seq = model.config.hidden_size, piece.batch, piece.seq
    dtype = model.lm_head.weight.dtype
    x = torch.randn(batch, seq, hidden, device=device, dtype=dtype, requires_grad=True)
    cotangent = torch.randn(batch, seq, hidden, device=device, dtype=dtype) / hidden
    labels = torch.randint(model.config.vocab_size, (batch, seq), device=device)

    def forward() -> tuple[Tensor, Tensor | None]:
        if piece.what == HEAD:
            return model(inputs_embeds=x, labels=labels).loss, None
        return model.model(inputs_embeds=x).last_hidden_state, cotangent

    def clear() -> None:
        model.zero_grad()
        x.grad = None

    with cut_to(model, piece.layers, piece.checkpointing):
        return replace(piece, **vars(timed(forward, clear, device)))


def _of_built(build_once: Callable[[Shape], Any], shape: Shape, piece: Piece, device: torch.device) -> Piece:
    return of_model(build_once(shape), piece, device)


def timed(forward: Callable[[], tuple[Tensor, Tensor | None]], clear: Callable[[], None], device: torch.device) -> Times:
    """Steps of forward and backward, between events on the device, after one that is not counted."""
    gpu, found = device.type == "cuda", []
    for _ in range(TIMED + 1):
        clear()
        _peak(gpu)
        marks, memory = [_mark(gpu)], [_allocated(gpu)]
        y, cotangent = forward()
        marks.append(_mark(gpu))
        memory += [_allocated(gpu), _peak(gpu)]
        y.backward(cotangent)
        marks.append(_mark(gpu))
        memory.append(_peak(gpu))
        if gpu:
            torch.cuda.synchronize()
        found.append([_elapsed(a, b) for a, b in pairwise(marks)])
        del y, cotangent
    clear()
    before, after, most, last = memory
    bytes_of = (after - before, most - before, last - after) if gpu else (None,) * 3
    return Times(*(median(ms) for ms in zip(*found[1:], strict=True)), *bytes_of)


def _mark(gpu: bool) -> Any:
    if not gpu:
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(a: Any, b: Any) -> float:
    return float(1e3 * (b - a)) if isinstance(a, float) else float(a.elapsed_time(b))


def _allocated(gpu: bool) -> int:
    return torch.cuda.memory_allocated() if gpu else 0


def _peak(gpu: bool) -> int:
    """Since the last call, and what is allocated now begins the next."""
    if not gpu:
        return 0
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most


def embedding(shape: Shape, piece: Piece, device: torch.device) -> Piece:
    """A look-up and its gradient, which is as large as the matrix."""
    weight = torch.zeros(shape.vocab, shape.hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(shape.vocab, (piece.batch, piece.seq), device=device)
    cotangent = torch.ones(piece.batch, piece.seq, shape.hidden, device=device, dtype=torch.bfloat16)

    def clear() -> None:
        weight.grad = None

    return replace(piece, **vars(timed(lambda: (torch.nn.functional.embedding(ids, weight), cotangent), clear, device)))


def optimizer(count: int, piece: Piece, device: torch.device) -> Piece:
    """Steps of the fused AdamW over `count` parameters."""
    dtype = getattr(torch, piece.dtype)
    weights = [torch.zeros(count // 16, device=device, dtype=dtype, requires_grad=True) for _ in range(16)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    adam, gpu, found = torch.optim.AdamW(weights, fused=True), device.type == "cuda", []
    for _ in range(TIMED + 1):
        begin = _mark(gpu)
        adam.step()
        end = _mark(gpu)
        if gpu:
            torch.cuda.synchronize()
        found.append(_elapsed(begin, end))
    return replace(piece, parameters=count, backward_ms=median(found[1:]))


def attempt(piece: Piece, work: Callable[[], Piece]) -> Piece:
    """`work`, or the piece with the reason why there is none."""
    try:
        return work()
    except torch.OutOfMemoryError:
        note = "out of memory"
    except Exception as error:
        note = f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]
    _release()
    return replace(piece, note=note)


def _release() -> None:
    """What nobody holds is free again."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(shapes: tuple[str, ...], device: torch.device, done: Callable[[Piece], bool], tiny: bool = False) -> Iterator[Piece]:
    """Every piece that is not `done`, as it is measured: the small ones, then the models, last the ranks, which take longest."""
    single = [piece for piece in alone(shapes) if not done(piece)]
    for piece in (p for p in single if p.what != RANK):
        if piece.what == OPTIMIZER:
            yield attempt(piece, partial(optimizer, 2**12 if tiny else OPTIMIZED, piece, device))
        else:
            yield attempt(piece, partial(embedding, *_small(piece, tiny), device))
    for (_, tp, provider), group in wanted(shapes):
        build_once = cache(partial(build, tp=tp, provider=provider, device=device))
        for piece in group:
            if not done(piece):
                shape, piece = _small(piece, tiny)
                yield attempt(piece, partial(_of_built, build_once, shape, piece, device))
        build_once.cache_clear()
        _release()
    for piece in (p for p in single if p.what == RANK):
        yield attempt(piece, partial(rank.measure, *_small(piece, tiny), device))
        _release()


def _small(piece: Piece, tiny: bool) -> tuple[Shape, Piece]:
    """The shape of a piece, and the piece; both as a CPU can run them where `tiny`."""
    shape = BY_NAME[piece.shape]
    if not tiny:
        return shape, piece
    return shape.tiny(), replace(piece, batch=min(piece.batch, 2), seq=16, layers=min(piece.layers, MOST))
