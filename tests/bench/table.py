"""What is measured, as data: each function at the sizes of real models, and the least work that any implementation of it must do.

A row of ALL is a function; its `sizes` are what `make` takes. A row of SWEEPS is a function along one of its sizes, for plots. A function
that liger_fn does not have is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

import liger_fn
from tests.cases import Inputs, Maker

Sizes = tuple[int, ...]
FORWARD, BOTH, HOST, SWEEP = "forward", "forward + backward", "host", "by size: forward + backward"
MODES = (FORWARD, BOTH)
# Of the heads, see `heads`: all gradients, half the targets ignored, no gradients at all, none of the weight; by tokens; against fp64.
HEAD_BOTH, HEAD_HALF, HEAD_FORWARD, HEAD_FROZEN = "head", "head: half ignored", "head: forward, no_grad", "head: frozen weight"
HEAD_SWEEP, HEAD_ERRORS = "head: by tokens", "head: errors"
HEAD_MODES = (HEAD_BOTH, HEAD_HALF, HEAD_FORWARD, HEAD_FROZEN)
# Of the experts, see `experts`: all gradients, and the same where one expert has far more tokens than the others.
EXPERTS_BOTH, EXPERTS_SKEWED = "experts", "experts: skewed"
EXPERT_MODES = (EXPERTS_BOTH, EXPERTS_SKEWED)


def _elements(*sizes: int) -> int:
    return prod(sizes)


def _no_options(*sizes: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Bench:
    """One function. What comes in pairs is for the forward and for forward + backward."""

    op: str
    make: Callable[..., Callable[[Maker], Inputs]]  # its arguments, in order
    sizes: tuple[Sizes, ...]
    tiny: Sizes  # for the host's cost, and for everything where there is no GPU
    passes: tuple[int, int] = (0, 0)  # how often an array of `elements` numbers must at least be read or written
    products: tuple[int, int] = (0, 0)  # matrix products of `elements` multiply-adds
    elements: Callable[..., int] = _elements
    label: str = ""  # how sizes are written, where not AxBxC
    gate_rows: int = 256  # the gate runs at each of the sizes, with at most as many rows
    draws: int = 1  # how many inputs the gate is judged over: the rounding of a single loss is luck
    options: Callable[..., dict[str, Any]] = _no_options  # arguments that are no tensors, by name

    def shape(self, sizes: Sizes) -> str:
        return self.label.format(*sizes) if self.label else "x".join(map(str, sizes))

    def gate_sizes(self, sizes: Sizes) -> Sizes:
        return min(sizes[0], self.gate_rows), *sizes[1:]

    def least_bytes(self, sizes: Sizes, mode: str) -> int:
        """Bytes that must be moved, in bf16; weights, targets and statistics are not counted."""
        return 2 * self.passes[MODES.index(mode)] * self.elements(*sizes)

    def least_flops(self, sizes: Sizes, mode: str) -> int:
        return 2 * self.products[MODES.index(mode)] * self.elements(*sizes)


@dataclass(frozen=True)
class Sweep:
    """One function, from small to large: `sizes` differ in the number at `at`, which is called `along`, and perhaps in one that makes up
    for it.
    """

    op: str
    along: str
    at: int
    sizes: tuple[Sizes, ...]
    tiny: tuple[Sizes, ...]

    @property
    def bench(self) -> Bench:
        return next(b for b in ALL if b.op == self.op)


def _norm(*names: str) -> Callable[[int, int], Callable[[Maker], Inputs]]:
    """A row-wise function of `names[0]` with the weights in the rest."""

    def sized(n: int, h: int) -> Callable[[Maker], Inputs]:
        return lambda m: {name: m.normal(h, shift=1.0) if i else m.normal(n, h) for i, name in enumerate(names)}

    return sized


def _add_norm(n: int, h: int) -> Callable[[Maker], Inputs]:
    return lambda m: {"x": m.normal(n, h), "residual": m.normal(n, h), "weight": m.normal(h, shift=1.0)}


def _group_norm(b: int, c: int, h: int, w: int, groups: int) -> Callable[[Maker], Inputs]:
    return lambda m: {"x": m.normal(b, c, h, w), "weight": m.normal(c, shift=1.0), "bias": m.normal(c)}


def _packed(n: int, h: int) -> Callable[[Maker], Inputs]:
    return lambda m: {"gate_up": m.normal(n, 2 * h)}


def _mlp(n: int, h: int, inner: int) -> Callable[[Maker], Inputs]:
    return lambda m: {
        "x": m.normal(n, h),
        "w_gate": m.normal(inner, h, scale=h**-0.5),
        "w_up": m.normal(inner, h, scale=h**-0.5),
        "w_down": m.normal(h, inner, scale=inner**-0.5),
    }


def _glu(n: int, h: int) -> Callable[[Maker], Inputs]:
    return lambda m: {"gate": m.normal(n, h), "up": m.normal(n, h)}


def _rope(b: int, t: int, heads: int, k_heads: int, d: int) -> Callable[[Maker], Inputs]:
    """Queries and keys as attention has them: views of [B, T, heads, D]."""

    def make(m: Maker) -> Inputs:
        angle = torch.outer(torch.arange(t, device=m.device), 1e4 ** (-torch.arange(0, d, 2, device=m.device) / d))
        table = torch.cat((angle, angle), -1)[None].expand(b, -1, -1)
        q, k = (m.normal(b, t, h, d).transpose(1, 2) for h in (heads, k_heads))
        return {"q": q, "k": k, "cos": table.cos().to(m.dtype), "sin": table.sin().to(m.dtype)}

    return make


def _loss(n: int, v: int) -> Callable[[Maker], Inputs]:
    return lambda m: {"logits": m.normal(n, v), "target": m.targets(n, classes=v, every=0)}


def _head(n: int, h: int, v: int) -> Callable[[Maker], Inputs]:
    return lambda m: {"x": m.normal(n, h), "weight": m.normal(v, h, scale=h**-0.5), "target": m.targets(n, classes=v, every=0)}


ALL = (
    Bench(
        op="rms_norm", make=_norm("x", "weight"), tiny=(8, 256), passes=(2, 5),
        sizes=((8192, 4096), (16384, 2048), (4096, 8192), (2048, 16384), (65536, 128)),
    ),
    # forward: x, residual, their sum, y; backward: dy, the sum's cotangent, the sum, dx
    Bench(op="add_rms_norm", make=_add_norm, tiny=(8, 256), passes=(4, 8), sizes=((8192, 4096),)),
    Bench(op="layer_norm", make=_norm("x", "weight", "bias"), tiny=(8, 256), passes=(2, 5), sizes=((8192, 4096),)),
    Bench(
        op="group_norm", make=_group_norm, tiny=(2, 8, 4, 4, 4), passes=(2, 5), sizes=((8, 320, 64, 64, 32), (64, 512, 8, 8, 32)),
        elements=lambda b, c, h, w, groups: b * c * h * w, label="{}x{}x{}x{} g{}",
        options=lambda b, c, h, w, groups: {"num_groups": groups},
    ),
    Bench(op="softmax", make=_norm("x"), tiny=(8, 256), passes=(2, 5), sizes=((8192, 4096),)),
    Bench(op="swiglu", make=_glu, tiny=(8, 256), passes=(3, 8), sizes=((8192, 14336),)),
    Bench(op="geglu", make=_glu, tiny=(8, 256), passes=(3, 8), sizes=((8192, 14336),)),
    Bench(op="swiglu_packed", make=_packed, tiny=(8, 256), passes=(3, 8), sizes=((8192, 14336),)),
    Bench(op="relu_squared", make=_norm("x"), tiny=(8, 256), passes=(2, 5), sizes=((8192, 14336),)),
    Bench(op="swiglu_mlp", make=_mlp, tiny=(8, 32, 64), products=(3, 9), sizes=((8192, 4096, 14336),)),
    Bench(
        op="rope", make=_rope, tiny=(1, 4, 4, 2, 16), passes=(2, 4), sizes=((4, 4096, 32, 8, 128),), gate_rows=1,
        elements=lambda b, t, q, k, d: b * t * (q + k) * d, label="{}x{} q{} k{} d{}",
    ),
    Bench(
        op="cross_entropy", make=_loss, tiny=(8, 100), passes=(1, 3), sizes=((8192, 128256), (8192, 32000)), draws=8,
    ),
    Bench(
        op="linear_cross_entropy", make=_head, tiny=(8, 32, 100), products=(1, 3), draws=8,
        sizes=((16384, 2048, 32000),), gate_rows=4500,  # more than one chunk; the sizes of real models: `heads`
    ),
)  # fmt: skip


SWEEPS = (
    Sweep("rms_norm", "width, at 2²⁵ elements", 1, tuple((2**25 // h, h) for h in (2**i for i in range(10, 17))), ((4, 64), (2, 128))),
    Sweep("cross_entropy", "vocabulary, at 4096 rows", 1, tuple((4096, 2**i) for i in range(12, 19)), ((4, 50), (4, 100))),
    Sweep("swiglu", "rows of 14336", 0, tuple((2**i, 14336) for i in range(9, 15)), ((2, 64), (4, 64))),
)


def present() -> tuple[Bench, ...]:
    """The rows whose function liger_fn has."""
    return tuple(b for b in ALL if hasattr(liger_fn, b.op))


def sweeps() -> tuple[Sweep, ...]:
    """Those whose function liger_fn has."""
    return tuple(s for s in SWEEPS if hasattr(liger_fn, s.op))


def sizes(bench: Bench | Sweep, device: torch.device) -> tuple[Sizes, ...]:
    """What is measured on `device`: without a GPU only that the harness works."""
    if device.type == "cuda":
        return bench.sizes
    return (bench.tiny,) if isinstance(bench, Bench) else bench.tiny
