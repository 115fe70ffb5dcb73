"""Checks of lesson 6: gated units."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from course import DEVICE, Wrong, exercise, near, same
from course.exercises import Answer


@exercise("6.1", "what MLPs keep", hint="eager keeps gate, up, silu(gate) and h; fused three of them; the whole MLP two; 2 bytes a number")
def bytes_kept(answer: Answer) -> str | None:
    for n, i, layers in ((8, 4, 1), (8192, 14336, 32)):
        for how, arrays in (("fused", 3), ("mlp", 2), ("eager", 4)):
            got = answer(n, i, layers, how)
            if got == arrays * n * i * layers:
                raise Wrong(f"for {how!r} that is a count of numbers: in bf16 each is 2 bytes")
            if got == 2 * (arrays - 2) * n * i * layers:
                raise Wrong(f"for {how!r} gate and up are missing: they are kept too")
            same(f"bytes for N={n}, I={i}, {layers} layers, {how!r}", got, 2 * arrays * n * i * layers, f"{arrays} arrays of [N, I]")
    return f"Llama 8B, 8192 tokens: eager {8 * 8192 * 14336 * 32 / 2**30:.0f} GiB, as one function {4 * 8192 * 14336 * 32 / 2**30:.0f} GiB."


@exercise("6.2", "GEGLU backward", hint="Φ = 0.5 (1 + erf(a / √2)), φ = exp(−a²/2) / √(2π); dup = dy a Φ; dgate = dy up (Φ + a φ)")
def geglu_backward(answer: Answer) -> str | None:
    for n in (64, 37, 200):
        gate, up, dy = torch.randn(3, n, device=DEVICE) * 2
        a, u, d = gate.double(), up.double(), dy.double()
        phi, density = 0.5 * (1 + torch.erf(a / 2**0.5)), torch.exp(-a * a / 2) / (2 * torch.pi) ** 0.5
        got = answer(gate, up, dy)
        same("the number of gradients", len(got), 2)
        why = ""
        if isinstance(got[0], torch.Tensor) and got[0].shape == a.shape:
            if torch.allclose(got[0].double(), d * u * phi, atol=1e-4):
                why = "The product rule's second term, a φ(a), is missing."
            elif torch.allclose(got[0].double(), _tanh_slope(a) * d * u, atol=2e-5):
                why = "That is the slope of the tanh approximation; the exact one is asked for."
        near("dgate", got[0], d * u * (phi + a * density), rounding=64, why=why)
        near("dup", got[1], d * a * phi, rounding=64, why="dup = dy gelu(gate)")
    return None


def _tanh_slope(a: torch.Tensor) -> torch.Tensor:
    leaf = a.clone().requires_grad_()
    return torch.autograd.grad(F.gelu(leaf, approximate="tanh").sum(), leaf)[0]


class _Concatenations(TorchDispatchMode):
    """Counts calls of torch.cat and its kind."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += "cat" in str(func) or "stack" in str(func)
        return func(*args, **(kwargs or {}))


@exercise(
    "6.3",
    "a packed gradient",
    hint="out = torch.empty_like(gate_up); dgate, dup = out.chunk(2, -1); then torch.mul(..., out=dgate), or dgate.copy_(...)",
)
def packed_backward(answer: Answer) -> str | None:
    for n, i in ((3, 4), (5, 7)):
        packed, dy = torch.randn(n, 2 * i, dtype=torch.float64), torch.randn(n, i, dtype=torch.float64)
        kept = packed.clone()
        leaf = packed.clone().requires_grad_()
        gate, up = leaf.chunk(2, -1)
        (truth,) = torch.autograd.grad(F.silu(gate) * up, leaf, dy)
        watch = _Concatenations()
        with watch:
            got = answer(packed, dy)
        if not torch.equal(packed, kept):
            raise Wrong("gate_up was overwritten: allocate a new array")
        swapped = torch.cat(truth.chunk(2, -1)[::-1], -1)
        why = (
            "The halves are exchanged: gate is first."
            if isinstance(got, torch.Tensor) and got.shape == truth.shape and torch.allclose(got, swapped)
            else ""
        )
        near(f"dgate_up of {n} x {2 * i}", got, truth, rounding=64, why=why)
        if watch.calls:
            raise Wrong("right numbers, but by a concatenation: it writes both halves once more. Write into views of one array")
    return "Each number is written once."
