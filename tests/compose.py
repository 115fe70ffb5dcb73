"""The part of the contract that is about others: torch.func, compilers, export, checkpointing, autocast.

An op is opaque to all of them, so each must return the very bits that eager autograd returns.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .cases import BF16, FP32, Table
from .numerics import assert_same_bits
from .sample import Sample, Tensors, flat, gradients

COMPILER = "inductor" if torch.cuda.is_available() else "aot_eager"  # on a CPU inductor is slow: one test of each op has it


class Composes:
    """Tests of one op, whose subclass names its table."""

    table: ClassVar[Table]

    def sample(self, device: torch.device, dtype: torch.dtype = BF16, seed: int = 0) -> Sample:
        return Sample(self.table, self.table.typical, dtype, device, seed)

    # --- torch.func -------------------------------------------------------------------------------------------------------------------

    def test_func_grad_and_vjp(self, backend: str, device: torch.device) -> None:
        s = self.sample(device)
        values, grads = s.ours()
        every = tuple(range(len(s.wrt)))
        assert_same_bits(grad(s.loss(), argnums=every)(*s.tensors), grads, "func.grad")
        for i, name in enumerate(s.wrt):
            assert_same_bits(grad(s.loss(), argnums=(i,))(*s.tensors), grads[i : i + 1], f"func.grad of {name} alone")
        ys, pull = vjp(s.f(), *s.tensors)[:2]
        assert_same_bits(ys, values, "value of func.vjp")
        assert_same_bits(pull(s.cots), grads, "func.vjp")

    def test_tensors_that_left_their_transform(self, backend: str, device: torch.device) -> None:
        """As PyTorch's own functions take them: as constants."""
        s, left = self.sample(device), []

        def leak(*tensors: Tensor) -> Tensor:
            left.extend(t.clone() for t in tensors)
            return sum((t.sum() for t in tensors), torch.zeros((), device=device))

        grad(leak, argnums=tuple(range(len(s.wrt))))(*s.tensors)
        values, grads = s.ours()
        assert_same_bits([y.detach() for y in s.f()(*left)], values, "value of tensors from func.grad")
        leaf = s.tensors[0].detach().requires_grad_()
        ys = s.f()(leaf, *left[1:])
        assert_same_bits(torch.autograd.grad(ys, [leaf], s.cots), grads[:1], "gradient beside tensors from func.grad")

    def test_vmap(self, backend: str, device: torch.device) -> None:
        """Every tensor batched, then only the first; the batch axis first, then last."""
        many = [self.sample(device, seed=i) for i in range(3)]
        s = many[0]
        names = [k for k, t in s.inputs.items() if t is not None]
        for axis in (0, -1):
            stacked = [torch.stack([m.inputs[k] for m in many], axis) for k in names]  # type: ignore[misc]
            got = vmap(s.f(names=names), in_dims=axis)(*stacked)
            assert_same_bits(got, stack([m.call(m.op) for m in many]), f"vmap over axis {axis}")
            first = stacked[0]
            got = vmap(s.f(names=names[:1]), in_dims=axis)(first)
            assert_same_bits(got, stack([s.call(s.op, **{names[0]: m.inputs[names[0]]}) for m in many]), "vmap over the first argument")

    def test_vmap_of_grad_and_grad_of_vmap(self, backend: str, device: torch.device) -> None:
        many = [self.sample(device, seed=i) for i in range(3)]
        s = many[0]
        every = tuple(range(len(s.wrt)))
        stacked = [torch.stack(ts) for ts in zip(*(m.tensors for m in many), strict=True)]
        want = stack([gradients(s.f(), m.tensors, s.cots)[1] for m in many])
        assert_same_bits(vmap(grad(s.loss(), argnums=every))(*stacked), want, "vmap of grad")
        assert_same_bits(grad(lambda *ts: vmap(s.loss())(*ts).sum(), argnums=every)(*stacked), want, "grad of vmap")

    def test_batched_cotangents(self, backend: str, device: torch.device) -> None:
        """What a vectorized jacobian sends through an eager graph: the backward under vmap, several cotangents at once."""
        s = self.sample(device)
        leaves = [t.detach().requires_grad_() for t in s.tensors]
        many = [tuple((i + 1) * c for c in s.cots) for i in range(3)]
        ys = s.f()(*leaves)
        got = torch.autograd.grad(ys, leaves, stack(many), is_grads_batched=True, retain_graph=True)
        assert_same_bits(got, stack([torch.autograd.grad(ys, leaves, c, retain_graph=True) for c in many]), "gradients, batched")
        assert_same_bits(torch.autograd.grad(ys, leaves, stack(many), is_grads_batched=True), got, "gradients, batched, the graph freed")

    def test_forward_mode_is_refused(self, backend: str, device: torch.device) -> None:
        """A tangent that a kernel would drop is an error, not a zero."""
        s = self.sample(device, FP32)
        first, *rest = s.tensors
        with forward_ad.dual_level():
            assert not any(y.requires_grad for y in s.f()(*s.tensors))  # with no tangent about, nothing is refused
            dual = forward_ad.make_dual(first, torch.ones_like(first))
            with pytest.raises(NotImplementedError, match=rf"^{self.table.op}: has no forward-mode derivative; .*reference"):
                s.f()(dual, *rest)

    # --- compilers --------------------------------------------------------------------------------------------------------------------

    def compiled_equals_eager(self, s: Sample, compiler: str) -> None:
        compiled = torch.compile(s.f(), fullgraph=True, backend=compiler, dynamic=False)
        values, grads = s.ours()
        got, got_grads = gradients(compiled, s.tensors, s.cots)
        assert_same_bits(got, values, f"value compiled by {compiler}")
        assert_same_bits(got_grads, grads, f"gradient compiled by {compiler}")
        with torch.no_grad():
            assert_same_bits(compiled(*s.tensors), values, f"value compiled by {compiler} under no_grad")

    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile_the_explicit_pair(self, backend: str, device: torch.device) -> None:
        """`op.fwd` and `op.bwd` in compiled code: a training step written without autograd."""
        s = self.sample(device)

        def pair(*tensors: Tensor) -> tuple[Any, Any]:
            inputs = s.inputs | dict(zip(s.wrt, tensors, strict=True))
            y, residuals = s.op.fwd(**inputs, **s.options)
            return y, s.op.bwd(residuals, s.cots if len(s.cots) > 1 else s.cots[0])

        values, grads = s.ours()
        y, got = torch.compile(pair, fullgraph=True, backend="aot_eager", dynamic=False)(*s.tensors)
        assert_same_bits(flat(y), values, "value of the compiled pair")
        assert_same_bits([g for g in got if g is not None], grads, "gradients of the compiled pair")

    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile(self, backend: str, device: torch.device) -> None:
        self.compiled_equals_eager(self.sample(device), COMPILER)

    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile_inductor(self, device: torch.device) -> None:
        self.compiled_equals_eager(self.sample(device), "inductor")

    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile_without_some_gradients(self, backend: str, device: torch.device) -> None:
        s = self.sample(device)
        for i, name in enumerate(s.wrt):

            def one(x: Tensor, i: int = i) -> Tensors:
                return s.f()(*s.tensors[:i], x, *s.tensors[i + 1 :])

            got = gradients(torch.compile(one, fullgraph=True, backend=COMPILER), s.tensors[i : i + 1], s.cots)
            assert_same_bits(got[1], s.ours()[1][i : i + 1], f"compiled gradient of {name} alone")

    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile_dynamic(self, backend: str, device: torch.device) -> None:
        """Three sizes cost two compilations at most: one for the first, one for every other."""
        from torch._dynamo.testing import CompileCounterWithBackend

        counter = CompileCounterWithBackend(COMPILER)
        samples = [Sample(self.table, self.table.sized(n), BF16, device) for n in (5, 7, 11, 4)]
        op, options = samples[0].op, samples[0].options
        names = [k for k, t in samples[0].inputs.items() if t is not None]

        @torch.compile(fullgraph=True, backend=counter)
        def compiled(*tensors: Tensor) -> Any:
            return op(**dict(zip(names, tensors, strict=True)), **options)

        for s in samples:
            leaves = {k: s.inputs[k].detach().requires_grad_(k in s.wrt) for k in names}  # type: ignore[union-attr]
            y = compiled(*leaves.values())
            ys = flat(y)
            values, grads = s.ours()
            assert_same_bits([y.detach() for y in ys], values, "value")
            assert_same_bits(torch.autograd.grad(ys, [leaves[k] for k in s.wrt], s.cots), grads, "gradient")
        assert counter.frame_count <= 2, f"compiled {counter.frame_count} times for {len(samples)} sizes"

    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile_of_func_grad(self, backend: str, device: torch.device) -> None:
        s = self.sample(device)
        every = tuple(range(len(s.wrt)))
        compiled = torch.compile(lambda *ts: grad(s.loss(), argnums=every)(*ts), fullgraph=True, backend=COMPILER)
        assert_same_bits(compiled(*s.tensors), s.ours()[1], "compiled func.grad")

    @pytest.mark.usefixtures("fresh_compiler")
    def test_export(self, backend: str, device: torch.device) -> None:
        s = self.sample(device)

        class Model(torch.nn.Module):
            def forward(self, *tensors: Tensor) -> Tensors:
                return s.f()(*tensors)

        program = torch.export.export(Model(), s.tensors)
        assert_same_bits(program.module()(*s.tensors), s.call(s.op), "value exported")

    # --- checkpointing and autocast -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoint(self, backend: str, reentrant: bool, device: torch.device) -> None:
        s = self.sample(device)
        leaves = [t.detach().requires_grad_() for t in s.tensors]
        ys = checkpoint(s.f(), *leaves, use_reentrant=reentrant)
        values, grads = s.ours()
        assert_same_bits([y.detach() for y in ys], values, "value under checkpoint")
        torch.autograd.backward(ys, s.cots)
        assert_same_bits([t.grad for t in leaves], grads, "gradient under checkpoint")

    def test_checkpoint_with_create_graph(self, backend: str, device: torch.device) -> None:
        """Checkpointing makes saved tensors anew at each reading, and allows one."""
        s = self.sample(device)
        leaves = [t.detach().requires_grad_() for t in s.tensors]
        ys = checkpoint(s.f(), *leaves, use_reentrant=False)
        got = torch.autograd.grad(ys, leaves, s.cots, create_graph=True)
        assert_same_bits([g.detach() for g in got], s.ours()[1], "gradient, checkpointed, with create_graph")
        ys = s.f()(*leaves)
        got = torch.autograd.grad(ys, leaves, s.cots, create_graph=True, retain_graph=False)
        assert_same_bits([g.detach() for g in got], s.ours()[1], "gradient with create_graph, the graph freed")

    @pytest.mark.parametrize("saved", [True, False])
    def test_selective_checkpoint(self, backend: str, saved: bool, device: torch.device) -> None:
        """A policy names the operator; the forward then runs once where its outputs are saved, and twice where they are not."""
        s = self.sample(device)
        operator = getattr(torch.ops.liger_fn, f"{self.table.op}_fwd").default

        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if saved and op is operator else CheckpointPolicy.PREFER_RECOMPUTE

        def f(*tensors: Tensor) -> Tensors:
            return checkpoint(s.f(), *tensors, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))

        with CountCalls(operator) as calls:
            got = gradients(f, s.tensors, s.cots)
        assert calls.count == (1 if saved else 2)
        for a, b, what in zip(got, s.ours(), ("value", "gradient"), strict=True):
            assert_same_bits(a, b, f"{what} under selective checkpoint")

    @pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
    def test_autocast(self, backend: str, dtype: torch.dtype, device: torch.device) -> None:
        """Autocast changes nothing, but for an op that holds a matrix product: that takes its inputs in autocast's dtype, as torch's do."""
        s = self.sample(device, dtype)
        f = s.f()
        cast = (lambda *ts: f(*(t.to(BF16) for t in ts))) if self.table.autocast else f
        values, grads = gradients(cast, s.tensors, s.cots)
        with torch.autocast(device.type, BF16):
            inside = gradients(f, s.tensors, s.cots)
            leaves = [t.detach().requires_grad_() for t in s.tensors]
            ys = f(*leaves)
            through = vjp(f, *s.tensors)[1](s.cots)
        outside = torch.autograd.grad(ys, leaves, s.cots)
        assert_same_bits(inside[0], values, "value in autocast")
        for got, where in ((inside[1], "in autocast"), (outside, "of a forward in autocast"), (through, "of func.vjp in autocast")):
            assert_same_bits(got, grads, f"gradient {where}")
        assert [g.dtype for g in outside] == [t.dtype for t in s.tensors]


class CountCalls(TorchDispatchMode):
    """Counts how often an operator runs, below the modes entered later: those that answer from what they saved are not counted."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.operator, self.count = operator, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is self.operator
        return func(*args, **(kwargs or {}))


def stack(samples: list[Tensors]) -> Tensors:
    return tuple(torch.stack(ts) for ts in zip(*samples, strict=True))
