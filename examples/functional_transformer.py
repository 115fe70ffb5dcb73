"""A language model as pure functions: a dictionary of parameters in, a loss and a dictionary of gradients out, as one writes it in JAX.

    python examples/functional_transformer.py                     # seconds on a CPU
    python examples/functional_transformer.py --preset 1b --compile   # Llama-1B shapes in bf16, on a GPU
    python examples/functional_transformer.py --help

No module, no state, no `.backward()`: `torch.func.grad_and_value` differentiates `loss`, AdamW is a function from (parameters, moments,
gradients) to new ones, and `torch.compile` takes the whole step, transform and all. Because everything is a function of `Params`, `vmap`
over them is an ensemble, and `vmap` over the gradient's tokens gives per-sample gradients.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import liger_fn
from _corpus import batches, prepare
from _options import add_sizes, sized
from _presets import Preset
from _progress import Display

Params = dict[str, Tensor]


# --- the model: D hidden, B sequences of T tokens, N heads and K key-value heads of E channels, V words -----------------------------------


def init(preset: Preset, generator: torch.Generator) -> Params:
    """Weights in fp32: matrices `[out, in]` as `F.linear` takes them, norms' scales all 1."""
    d, e, f = preset.hidden, preset.hidden // preset.heads, preset.mlp
    matrices = {"embed": (preset.head, d), "head": (preset.head, d)}
    for i in range(preset.layers):
        matrices |= {f"{i}.q": (preset.heads * e, d), f"{i}.k": (preset.kv_heads * e, d), f"{i}.v": (preset.kv_heads * e, d)}
        matrices |= {f"{i}.o": (d, preset.heads * e), f"{i}.gate": (f, d), f"{i}.up": (f, d), f"{i}.down": (d, f)}
    if preset.tied:
        del matrices["head"]
    device = generator.device
    # What adds to the residual is smaller by the number of such sums, so that its size does not grow with the depth.
    scale = {"o": 0.02 / math.sqrt(2 * preset.layers), "down": 0.02 / math.sqrt(2 * preset.layers)}
    params = {
        name: torch.randn(shape, generator=generator, device=device) * scale.get(name.split(".")[-1], 0.02)
        for name, shape in matrices.items()
    }
    norms = [f"{i}.{which}_norm" for i in range(preset.layers) for which in ("attention", "mlp")] + ["norm"]
    return params | {name: torch.ones(d, device=device) for name in norms}


def angles(length: int, channels: int, device: torch.device, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin `[1, T, E]` of the rotary embedding."""
    frequency = theta ** -(torch.arange(0, channels, 2, device=device) / channels)
    angle = torch.outer(torch.arange(length, device=device), frequency).repeat(1, 2)[None]
    return angle.cos(), angle.sin()


def attention(p: Params, i: int, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Causal attention of layer i; `[B, T, D]` in and out."""
    e = cos.shape[-1]
    q, k, v = (F.linear(x, p[f"{i}.{name}"]).unflatten(-1, (-1, e)).transpose(1, 2) for name in "qkv")  # [B, N or K, T, E]
    q, k = liger_fn.rope(q, k, cos.to(x.dtype), sin.to(x.dtype))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return F.linear(y.transpose(1, 2).flatten(-2), p[f"{i}.o"])


def mlp(p: Params, i: int, x: Tensor) -> Tensor:
    """The gated unit of layer i."""
    return F.linear(liger_fn.swiglu(F.linear(x, p[f"{i}.gate"]), F.linear(x, p[f"{i}.up"])), p[f"{i}.down"])


def hidden(p: Params, ids: Tensor, heads: int) -> Tensor:
    """The last hidden state `[B, T, D]` of tokens `[B, T]`. Each norm but the first adds what the block before it made to the residual."""
    layers = sum(name.endswith(".q") for name in p)
    cos, sin = angles(ids.shape[1], p["embed"].shape[1] // heads, ids.device)
    residual = F.embedding(ids, p["embed"])
    x = liger_fn.rms_norm(residual, p["0.attention_norm"])
    for i in range(layers):
        x, residual = liger_fn.add_rms_norm(attention(p, i, x, cos, sin), residual, p[f"{i}.mlp_norm"])
        following = f"{i + 1}.attention_norm" if i + 1 < layers else "norm"
        x, residual = liger_fn.add_rms_norm(mlp(p, i, x), residual, p[following])
    return x


def loss(p: Params, ids: Tensor, heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mean cross entropy of each next token, in nats; computed in `dtype`, differentiated with regard to p in its own."""
    p = {name: value.to(dtype) for name, value in p.items()}
    return liger_fn.linear_cross_entropy(hidden(p, ids, heads), p.get("head", p["embed"]), ids, shift=True)


# --- training ---------------------------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """All that a training is: parameters, AdamW's moments, and the steps done, as a tensor so that no step compiles anew."""

    params: Params
    mean: Params
    square: Params
    step: Tensor


def begin(params: Params) -> State:
    """A training that has not begun."""
    mean, square = ({name: torch.zeros_like(value) for name, value in params.items()} for _ in range(2))
    return State(params, mean, square, torch.zeros((), device=params["embed"].device))


def adamw(s: State, grads: Params, lr: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, decay: float = 0.1) -> State:
    """One step of AdamW: a new state. Norms' scales do not decay."""
    b1, b2 = betas
    t = s.step + 1
    mean = {name: b1 * s.mean[name] + (1 - b1) * g for name, g in grads.items()}
    square = {name: b2 * s.square[name] + (1 - b2) * g * g for name, g in grads.items()}
    c1, c2 = 1 - b1**t, 1 - b2**t

    def moved(name: str, w: Tensor) -> Tensor:
        kept = w * (1 - lr * decay) if w.dim() > 1 else w
        return kept - lr * (mean[name] / c1) / ((square[name] / c2).sqrt() + eps)

    return State({name: moved(name, w) for name, w in s.params.items()}, mean, square, t)


def clip(grads: Params, most: float) -> Params:
    """Gradients whose norm, over all of them, is at most `most`."""
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    return {name: g * factor for name, g in grads.items()}


def train_step(s: State, ids: Tensor, heads: int, lr: float, dtype: torch.dtype) -> tuple[State, Tensor]:
    """The next state, and the loss of this one."""
    grads, value = torch.func.grad_and_value(loss)(s.params, ids, heads, dtype)
    return adamw(s, clip(grads, 1.0), lr), value


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, print the figures, and return the losses."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add_sizes(parser, "functional", "small" if gpu else "tiny")
    parser.add_argument("--compile", action="store_true", help="torch.compile the whole step")
    given = parser.parse_args(argv)
    preset = sized(parser, given)

    device = torch.device("cuda" if gpu else "cpu")
    state = begin(init(preset, torch.Generator(device).manual_seed(given.seed)))
    step = torch.compile(train_step, fullgraph=True) if given.compile else train_step
    losses: list[Tensor] = []
    with Display(Console(width=None if sys.stdout.isatty() else 110)) as display:
        corpus = prepare(preset, given.out / "corpus")
        size = sum(value.numel() for value in state.params.values())
        display.say(f"{size / 1e6:,.1f} M parameters, {preset.batch} × {preset.seq} tokens a step, {preset.dtype}, {device.type}")
        on_step, started = display.run("compiled" if given.compile else "eager", preset), 0.0
        for n, ids in enumerate(batches(corpus.folder, preset, given.seed, device.type), start=1):
            state, value = step(state, ids, preset.heads, preset.lr, preset.dtype)
            losses.append(value)
            if (n - 1) % preset.every == 0 or n == preset.steps:  # reading a loss makes the host wait for the device
                on_step(n, value.item())
            started = started or time.perf_counter()  # after the first step, which compiles kernels
        speed = (preset.steps - 1) * preset.batch * preset.seq / (time.perf_counter() - started)
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB peak" if gpu else ""
        figures = torch.stack(losses).tolist()
        display.say(f"loss {figures[0]:.4f} → {figures[-1]:.4f}, {speed:,.0f} tokens/s{memory}")
    return figures


if __name__ == "__main__":
    main()
