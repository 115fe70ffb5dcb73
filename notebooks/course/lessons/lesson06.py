"""Checks of lesson 6: gated units."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from course import DEVICE, Wrong, exercise, near
from course.exercises import Answer


def _is(got: object, wrong: torch.Tensor, atol: float = 1e-4) -> bool:
    return isinstance(got, torch.Tensor) and got.shape == wrong.shape and torch.allclose(got.double(), wrong.double(), atol=atol)


def _tuple(got: object, count: int) -> None:
    if not isinstance(got, tuple | list) or len(got) != count:
        raise Wrong(f"the result must be {count} tensors, got {type(got).__name__}")


# --- 6.1 --------------------------------------------------------------------------------------------------------------------------------


@exercise("6.1", "GEGLU backward", hint="Φ = 0.5 (1 + erf(a / √2)), φ = exp(−a²/2) / √(2π); dup = dy a Φ; dgate = dy up (Φ + a φ)")
def geglu_backward(answer: Answer) -> str | None:
    for n in (64, 37, 200):
        gate, up, dy = torch.randn(3, n, device=DEVICE) * 2
        kept = gate.clone(), up.clone(), dy.clone()
        a, u, d = (t.double() for t in kept)
        phi, density = 0.5 * (1 + torch.erf(a / 2**0.5)), torch.exp(-a * a / 2) / (2 * torch.pi) ** 0.5
        got = answer(gate, up, dy)
        _tuple(got, 2)
        if not all(torch.equal(t, k) for t, k in zip((gate, up, dy), kept, strict=True)):
            raise Wrong("an input was overwritten: the results are new memory here")
        why = ""
        if _is(got[0], d * u * phi):
            why = "The product rule's second term, a φ(a), is missing."
        elif _is(got[0], _tanh_slope(a) * d * u, 2e-5):
            why = "That is the slope of the tanh approximation; the exact one is asked for."
        elif _is(got[0], d * (phi + a * density)):
            why = "The factor up is missing."
        near("dgate", got[0], d * u * (phi + a * density), rounding=64, why=why)
        near("dup", got[1], d * a * phi, rounding=64, why="dup = dy gelu(gate)")
    return "For every length, masks included."


def _tanh_slope(a: torch.Tensor) -> torch.Tensor:
    leaf = a.clone().requires_grad_()
    return torch.autograd.grad(F.gelu(leaf, approximate="tanh").sum(), leaf)[0]


# --- 6.2 --------------------------------------------------------------------------------------------------------------------------------


def _kept(answer: Answer, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """What the answer returns, and how many numbers it saves beyond its inputs, each memory once."""
    own, found = {t.untyped_storage().data_ptr() for t in inputs}, {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = answer(*inputs)
    return y, sum(t.untyped_storage().nbytes() // t.element_size() for t in found.values())


def _attributes(y: torch.Tensor) -> list[str]:
    """The names of tensors that stand on the contexts of y's graph."""
    todo, names = [y.grad_fn], []
    while todo:
        node = todo.pop()
        names += [name for name, value in getattr(node, "__dict__", {}).items() if isinstance(value, torch.Tensor)]
        todo += [before for before, _ in getattr(node, "next_functions", ()) if before is not None]
    return names


@exercise(
    "6.2",
    "an MLP that keeps two arrays",
    hint="forward: save x, the weights, g and u. backward: s = sigmoid(g), a = g s; dh = dy @ w_down; dg = dh u (s + a (1 − s)), du = dh a; "
    "h = a u once more, for dw_down = dy.T @ h",
)
def mlp(answer: Answer) -> str | None:
    names = ("x", "w_gate", "w_up", "w_down")
    for n, wide, inner in ((3, 4, 7), (5, 6, 11)):
        shapes = ((n, wide), (inner, wide), (inner, wide), (wide, inner))
        inputs = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
        dy = torch.randn(n, wide, dtype=torch.float64)
        x, w_gate, w_up, w_down = inputs
        gate, up = x @ w_gate.T, x @ w_up.T
        truth = (F.silu(gate) * up) @ w_down.T
        want = torch.autograd.grad(truth, inputs, dy)
        y, numbers = _kept(answer, inputs)
        near("y", y, truth.detach(), rounding=64)
        if y.grad_fn is None:
            raise Wrong("y is not differentiable: call your Function by .apply")
        if attributes := _attributes(y):
            raise Wrong(f"ctx.{attributes[0]} is a tensor: hooks cannot see it, nor can autograd free it. Use ctx.save_for_backward")
        arrays = numbers / (n * inner)
        if arrays > 2:
            what = {3: "h has to go: make it again from g and u", 4: "as eager does: silu(g) and h have to go"}.get(int(arrays), "")
            raise Wrong(f"y is right, but {arrays:.3g} arrays of [N, I] are kept, where 2 are enough{': ' + what if what else ''}")
        grads = torch.autograd.grad(y, inputs, dy, allow_unused=True)
        for name, got, true in zip(names, grads, want, strict=True):
            if got is None:
                raise Wrong(f"the gradient of {name} is None: backward returns one for each input of forward, in the same order")
            why = ""
            if name == "x" and _is(got, (dy @ w_down * up * _silu_slope(gate)) @ w_gate):
                why = "x went into two products: dx = dg W_g + du W_u is a sum of both."
            elif name == "w_gate" and _is(got, (dy @ w_down * up * torch.sigmoid(gate)).T @ x):
                why = "The product rule's second term, a σ (1 − σ), is missing."
            near(f"the gradient of {name}", got, true, rounding=256, why=why)
    return "Right in all four, and h is forgotten."


def _silu_slope(a: torch.Tensor) -> torch.Tensor:
    s = torch.sigmoid(a)
    return s + a * s * (1 - s)


# --- 6.3 --------------------------------------------------------------------------------------------------------------------------------


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
        with _Concatenations() as watch:
            got = answer(packed, dy)
        if not torch.equal(packed, kept):
            raise Wrong("gate_up was overwritten: allocate a new array")
        swapped = torch.cat(truth.chunk(2, -1)[::-1], -1)
        why = "The halves are exchanged: gate is first." if _is(got, swapped) else ""
        near(f"dgate_up of {n} x {2 * i}", got, truth, rounding=64, why=why)
        if watch.calls:
            raise Wrong("right numbers, but by a concatenation: it writes both halves once more. Write into views of one array")
    return "Each number is written once."


# --- 6.4 --------------------------------------------------------------------------------------------------------------------------------


@exercise("6.4", "gradients over their inputs", hint="load gate, up and dh; compute all three results; only then store the first of them")
def in_place(answer: Answer) -> str | None:
    names = ("dgate", "dup", "h")
    for n in (64, 37, 200):
        memory = torch.randn(3, n + 64, device=DEVICE)
        before, inputs = memory.clone(), [row[:n] for row in memory]
        a, u, d = before[:, :n].double()
        value = F.silu(a)
        want = d * u * _silu_slope(a), d * value, value * u
        got = answer(*inputs)
        _tuple(got, 3)
        late = F.silu(want[0])  # where gate had been overwritten before it was read again
        for name, out, true, its, over in zip(names, got, want, inputs, ("gate", "up", "dh"), strict=True):
            why = ""
            if name == "dup" and (_is(out, d * late) or _is(out, want[0] * late)):
                why = "It was made of what dgate left in gate's memory: load all inputs before the first store."
            elif name == "h" and (_is(out, late * u) or _is(out, value * want[1]) or _is(out, late * want[1])):
                why = "It was made of gate or up after they had been overwritten: load all inputs before the first store."
            elif isinstance(out, torch.Tensor) and out.data_ptr() == its.data_ptr() and torch.equal(out, before[names.index(name), :n]):
                why = f"It is {over} as it came: nothing was written there."
            near(f"{name} of {n}", out, true, rounding=64, why=why)
        for name, out, its, over in zip(names, got, inputs, ("gate", "up", "dh"), strict=True):
            if out.data_ptr() != its.data_ptr():
                raise Wrong(f"right numbers, but {name} is not in the memory of {over}: new memory was taken, or they are exchanged")
        if not torch.equal(memory[:, n:], before[:, n:]):
            raise Wrong(f"elements beyond the {n} were written: the stores need a mask")
    return "Three results, and no memory of its own."
