"""What every op must pass. An op's test file makes a class of it, and has it all:

    class TestRMSNorm(Contract):
        table = cases.RMS_NORM

The tests' arguments come from `parametrize`: `backend` (all that this machine has), `case` and `hostile` with `dtype` (the table's, each
in its dtypes), `layout`. Tests without a `case` run the table's typical one.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from itertools import combinations

import pytest
import torch
from torch import Tensor

import liger_fn

from .cases import BF16, FP16, FP32, FP64, Case
from .compose import Composes
from .numerics import assert_near, assert_same_bits, untouched
from .sample import Sample, gradients

LAYOUTS = ("transposed", "sliced", "stride-2")


class Contract(Composes):
    """The numerics rule, purity and autograd. Inherited: transforms, compilers, checkpointing, autocast."""

    @classmethod
    def parametrize(cls, metafunc: pytest.Metafunc, backends: Sequence[str]) -> None:
        names = metafunc.fixturenames
        if "backend" in names:
            metafunc.parametrize("backend", backends, indirect=True)
        for argument, table in (("case", cls.table.cases), ("hostile", cls.table.hostile)):
            if argument in names:
                every = [pytest.param(c, d, id=f"{c.name}-{str(d)[6:]}") for c in table for d in c.dtypes]
                metafunc.parametrize((argument, "dtype"), every)
        if "layout" in names:
            metafunc.parametrize("layout", LAYOUTS)
        if "half" in names:
            metafunc.parametrize("half", (BF16, FP16), ids=("bfloat16", "float16"))

    # --- numbers ----------------------------------------------------------------------------------------------------------------------

    def judge(self, samples: Sequence[Sample]) -> None:
        """The numerics rule over the values and the gradients of all samples together, and nobody's input written to."""
        found = []
        for s in samples:
            with untouched(s.all):
                found.append((s.ours(), s.naive(), s.truth()))
        s = samples[0]
        for part, names in ((0, [f"value {i}" for i in range(len(s.cots))]), (1, [f"gradient of {k}" for k in s.wrt])):
            for i, name in enumerate(names):
                ours, naive, truth = (torch.stack([sample[who][part][i] for sample in found]) for who in range(3))
                assert_near(ours, naive, truth, f"{self.table.op}, {name}")

    def test_numerics(self, backend: str, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.judge([Sample(self.table, case, dtype, device, seed) for seed in range(case.draws)])

    def test_hostile_values(self, backend: str, hostile: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.judge([Sample(self.table, hostile, dtype, device)])

    def test_strided_inputs(self, backend: str, layout: str, device: torch.device) -> None:
        """Any strides: the memory between the elements is NaN, so a kernel that assumes others reads it."""
        s = self.sample(device)
        s.inputs = {k: None if t is None else restride(t, layout) for k, t in s.inputs.items()}
        s.cots = tuple(restride(c, layout) for c in s.cots)
        self.judge([s])

    def test_expanded_cotangent(self, backend: str, device: torch.device) -> None:
        """What `.sum().backward()` sends: one number with all strides 0."""
        s = self.sample(device)
        s.cots = tuple(torch.full((), 0.75, dtype=c.dtype, device=device).expand(c.shape) for c in s.cots)
        self.judge([s])

    def test_float64_against_finite_differences(self, device: torch.device) -> None:
        s = Sample(self.table, self.table.sized(2), FP64, device)
        leaves = [t.requires_grad_() for t in s.tensors]
        assert liger_fn.backend(leaves[0]) == "reference"
        assert torch.autograd.gradcheck(s.f(), leaves)

    def test_float64_is_the_reference(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        if dtype is not FP32:
            pytest.skip("fp32 cases, made in fp64")
        s = Sample(self.table, case, FP64, device)
        for got, want in zip(s.ours(), s.naive(), strict=True):
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)

    # --- purity -----------------------------------------------------------------------------------------------------------------------

    def test_same_bits_every_time(self, backend: str, device: torch.device) -> None:
        torch.use_deterministic_algorithms(False)  # deterministic by itself, not because torch was asked to be
        s = self.sample(device)
        values, grads = s.ours()
        for _ in range(3):
            again, again_grads = s.ours()
            assert_same_bits(again, values, "value")
            assert_same_bits(again_grads, grads, "gradient")

    def test_inputs_untouched(self, backend: str, half: torch.dtype, device: torch.device) -> None:
        """With gradients and without, through autograd and through fwd and bwd; values are the same in all."""
        s = Sample(self.table, self.table.typical, half, device)
        with untouched(s.all):
            values, grads = s.ours()
            with torch.no_grad():
                assert_same_bits(s.call(s.op), values, "value under no_grad")
                assert_same_bits(s.f()(*(t.detach().requires_grad_() for t in s.tensors)), values, "value of leaves under no_grad")
            assert_same_bits(s.call(s.op), values, "value without gradients")
            with torch.inference_mode():
                assert_same_bits(s.call(s.op), values, "value in inference mode")
            y, residuals = s.op.fwd(**s.inputs, **s.options)
            made = [t for t in residuals if isinstance(t, Tensor) and all(t is not i for i in s.inputs.values())]
            with untouched([*made, *astuple(y)]):  # without `donate`, not even what fwd made
                assert_same_bits(self.bwd(s, residuals), grads, "gradient of bwd")
                assert_same_bits(self.bwd(s, residuals), grads, "gradient of a second bwd")
            assert_same_bits(astuple(y), values, "value of fwd")
            assert_same_bits(self.bwd(s, residuals, donate=True), grads, "gradient of bwd with donate")

    def bwd(self, s: Sample, residuals: object, **options: object) -> tuple[Tensor, ...]:
        grads = s.op.bwd(residuals, s.cots if len(s.cots) > 1 else s.cots[0], **options)
        assert len(grads) == len(self.table.diff)
        assert all((g is None) == (k not in s.wrt) for k, g in zip(self.table.diff, grads, strict=True))
        return tuple(g for g in grads if g is not None)

    def test_copies_and_pickles_as_a_function(self) -> None:
        op = getattr(liger_fn, self.table.op)
        assert copy.deepcopy(op) is op
        assert pickle.loads(pickle.dumps(op)) is op
        assert self.table.op in liger_fn.__all__
        assert f"liger_fn.{self.table.op}(" in repr(op)
        assert op.__doc__

    # --- autograd ---------------------------------------------------------------------------------------------------------------------

    def test_second_backward(self, backend: str, device: torch.device) -> None:
        """The same graph twice, with another cotangent between: peers scale twice, or read what the first one overwrote."""
        s = self.sample(device)
        _, want = s.ours()
        leaves = [t.detach().requires_grad_() for t in s.tensors]
        ys = s.f()(*leaves)
        doubled = [2 * c for c in s.cots]
        with untouched([*s.all, *ys]):
            assert_same_bits(torch.autograd.grad(ys, leaves, s.cots, retain_graph=True), want, "first gradient")
            twice = torch.autograd.grad(ys, leaves, doubled, retain_graph=True)
            assert_same_bits(torch.autograd.grad(ys, leaves, s.cots), want, "third gradient")
        assert_same_bits(twice, [2 * g for g in want], "gradient of the doubled cotangent")

    def test_second_derivative_is_refused(self, backend: str, device: torch.device) -> None:
        s = self.sample(device)
        leaves = [t.detach().requires_grad_() for t in s.tensors]
        grads = torch.autograd.grad(s.f()(*leaves), leaves, s.cots, create_graph=True)
        assert_same_bits(grads, s.ours()[1], "gradient with create_graph")
        for grad in grads:
            with pytest.raises(NotImplementedError, match=rf"^{self.table.op}: .*liger_fn\.{self.table.op}\.reference"):
                grad.sum().backward(retain_graph=True)
        with pytest.raises(NotImplementedError, match=rf"^{self.table.op}: "):
            torch.func.grad(lambda x: torch.func.grad(s.loss())(x, *s.tensors[1:]).sum())(s.tensors[0])

    def test_only_wanted_gradients(self, backend: str, device: torch.device) -> None:
        """Each subset of inputs that need gradients: those get theirs, bit for bit, and the others None."""
        s = self.sample(device)
        want = dict(zip(s.wrt, s.ours()[1], strict=True))
        for n in range(1, len(s.wrt) + 1):
            for wanted in combinations(s.wrt, n):
                leaves = {k: t.detach().requires_grad_(k in wanted) for k, t in zip(s.wrt, s.tensors, strict=True)}
                torch.autograd.backward(s.call(s.op, **leaves), s.cots)
                got = [t.grad for t in leaves.values()]
                assert_same_bits(got, [want[k] if k in wanted else None for k in s.wrt], f"gradients, {' and '.join(wanted)} wanted:")
                _, residuals = s.op.fwd(**s.inputs, **s.options)
                grads = s.op.bwd(residuals, s.cots if len(s.cots) > 1 else s.cots[0], needs=tuple(k in wanted for k in self.table.diff))
                assert_same_bits(grads, [want[k] if k in wanted else None for k in self.table.diff], f"bwd, {' and '.join(wanted)} wanted:")
        assert not any(y.requires_grad for y in s.call(s.op))

    def test_fwd_runs_where_bwd_did_not(self, device: torch.device) -> None:
        """Residuals are the op's, not the backend's: each backend's backward takes those of the other's forward."""
        s = self.sample(device)
        kernels = liger_fn.backend(s.tensors[0])
        truth, naive = s.truth()[1], s.naive()[1]
        for one, other in ((kernels, "reference"), ("reference", kernels)):
            with liger_fn.use_backend(one):
                _, residuals = s.op.fwd(**s.inputs, **s.options)
            with liger_fn.use_backend(other):
                grads = self.bwd(s, residuals)
            for k, g, n, t in zip(s.wrt, grads, naive, truth, strict=True):
                assert_near(g, n, t, f"{self.table.op}, gradient of {k}, {one} then {other}")


def astuple(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


def restride(t: Tensor, layout: str) -> Tensor:
    """The same numbers, other strides; what lies between them is poison."""
    poison = torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).min
    if t.dim() == 0:
        return t
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    wide = t.new_full((*t.shape[:-1], t.shape[-1] * 2 if layout == "stride-2" else t.shape[-1] + 5), poison)
    view = wide[..., ::2] if layout == "stride-2" else wide[..., 3:-2]
    return view.copy_(t)

