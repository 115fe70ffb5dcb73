"""What every op must pass. An op's test file makes a class of it, and has it all:

    class TestRMSNorm(Contract):
        table = cases.RMS_NORM

The tests' arguments come from `parametrize`: `backend` (all that this machine has), `case` and `hostile` with `dtype` (the table's, each
in its dtypes), `layout`. Tests without a `case` run the table's typical one.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import liger_fn
from liger_fn import _launch

from .cases import BF16, FP16, FP32, FP64, Case
from .compose import Composes
from .numerics import assert_near, assert_same_bits, untouched
from .sample import Sample, flat

LAYOUTS = ("transposed", "sliced", "stride-2")


class Wrong(NamedTuple):
    """A call that must fail: with which error, whose message says what."""

    name: str
    call: Callable[[Any, dict[str, Any]], Any]
    error: type[Exception]
    says: tuple[str, ...]


def wrong(name: str, error: type[Exception], *says: str, **changed: Any) -> Wrong:
    """A right call with arguments changed: to a value, or by a function of what they were."""

    def call(op: Any, arguments: dict[str, Any]) -> Any:
        return op(**{**arguments, **{k: v(arguments[k]) if callable(v) else v for k, v in changed.items()}})

    return Wrong(name, call, error, says)


class Contract(Composes):
    """The numerics rule, errors, purity and autograd. Inherited: transforms, compilers, checkpointing, autocast."""

    wrong_calls: ClassVar[tuple[Wrong, ...]]

    @classmethod
    def parametrize(cls, metafunc: pytest.Metafunc, backends: Sequence[str]) -> None:
        names = metafunc.fixturenames
        if "backend" in names:
            metafunc.parametrize("backend", backends, indirect=True)
        for argument, table in (("case", cls.table.cases), ("hostile", cls.table.hostile), ("gpu_case", cls.table.on_gpu)):
            if argument in names:
                every = [pytest.param(c, d, id=f"{c.name}-{str(d)[6:]}") for c in table for d in c.dtypes]
                metafunc.parametrize((argument, "dtype"), every)
        if "wide_case" in names:
            metafunc.parametrize("wide_case", [pytest.param(c, id=c.name) for c in cls.table.cases if FP32 in c.dtypes])
        if "call" in names:
            metafunc.parametrize("call", [pytest.param(c, id=c.name) for c in cls.wrong_calls])
        if "layout" in names:
            metafunc.parametrize("layout", LAYOUTS)
        if "half" in names:
            metafunc.parametrize("half", (BF16, FP16), ids=("bfloat16", "float16"))

    # --- numbers ----------------------------------------------------------------------------------------------------------------------

    def samples(self, device: torch.device) -> list[Sample]:
        """Of the typical case, as many as its numerics are judged over."""
        return [self.sample(device, seed=seed) for seed in range(self.table.typical.draws)]

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
        self.judge([Sample(self.table, hostile, dtype, device, seed) for seed in range(hostile.draws)])

    def test_strided_inputs(self, backend: str, layout: str, device: torch.device) -> None:
        """Any strides: the memory between the elements is NaN, so a kernel that assumes others reads it."""
        samples = self.samples(device)
        for s in samples:
            s.inputs = {k: None if t is None else restride(t, layout) for k, t in s.inputs.items()}
            s.cots = tuple(restride(c, layout) for c in s.cots)
        self.judge(samples)

    def test_expanded_cotangent(self, backend: str, device: torch.device) -> None:
        """What `.sum().backward()` sends: one number with all strides 0."""
        samples = self.samples(device)
        for s in samples:
            s.cots = tuple(torch.full((), 0.75, dtype=c.dtype, device=device).expand(c.shape) for c in s.cots)
        self.judge(samples)

    def test_negative_views(self, backend: str, device: torch.device) -> None:
        """Tensors whose numbers have another sign in memory, as `z.conj().imag` has."""
        samples = self.samples(device)
        for s in samples:
            s.inputs = {k: torch._neg_view(-t) if t is not None and t.is_floating_point() else t for k, t in s.inputs.items()}
            s.cots = tuple(torch._neg_view(-c) for c in s.cots)
        s, plain = samples[0], self.sample(device)
        assert s.tensors[0].is_neg()
        self.judge(samples)
        _, residuals = s.op.fwd(**plain.inputs, **s.options)
        got, want = (s.op.bwd(residuals, cots if len(cots) > 1 else cots[0]) for cots in (s.cots, plain.cots))
        assert_same_bits(got, want, "gradients of a negative cotangent")

    def test_float64_against_finite_differences(self, device: torch.device) -> None:
        s = Sample(self.table, self.table.sized(2), FP64, device)
        leaves = [t.requires_grad_() for t in s.tensors]
        assert liger_fn.backend(leaves[0]) == "reference"
        assert torch.autograd.gradcheck(s.f(), leaves)

    def test_float64_is_the_reference(self, wide_case: Case, device: torch.device) -> None:
        s = Sample(self.table, wide_case, FP64, device)
        for got, want in zip(s.ours(), s.naive(), strict=True):
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)

    @pytest.mark.gpu
    def test_numerics_at_size(self, backend: str, gpu_case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.judge([Sample(self.table, gpu_case, dtype, device, seed) for seed in range(gpu_case.draws)])

    @pytest.mark.multi_gpu
    def test_a_device_that_is_not_current(self, backend: str) -> None:
        other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
        self.judge([self.sample(other)])
        assert torch.cuda.current_device() != other.index

    @pytest.mark.large
    def test_more_than_2_31_elements(self, backend: str, device: torch.device) -> None:
        """The numerics rule over the last two rows, whose offsets no 32-bit number holds."""
        if backend == "reference":
            pytest.skip("its offsets are torch's own")
        torch.cuda.empty_cache()  # what earlier tests left cached
        if torch.cuda.mem_get_info(device)[0] < 48 * 2**30:
            pytest.skip("needs 48 GiB of free device memory")
        s = Sample(self.table, self.table.large, BF16, device)
        assert max(t.numel() for t in s.all) > 2**31
        values, grads = s.ours()
        got = [v[-2:].clone() for v in values], {k: g[-2:].clone() for k, g in zip(s.wrt, grads, strict=True) if k in self.table.rows}
        del values, grads
        s.inputs = {k: t[-2:].clone() if t is not None and k in self.table.rows else t for k, t in s.inputs.items()}
        s.cots = tuple(c[-2:].clone() for c in s.cots)
        (naive, naive_grads), (truth, truth_grads) = s.naive(), s.truth()
        for i, y in enumerate(got[0]):
            assert_near(y, naive[i], truth[i], f"{self.table.op}, value {i}, last rows")
        for i, k in enumerate(s.wrt):
            if k in got[1]:
                assert_near(got[1][k], naive_grads[i], truth_grads[i], f"{self.table.op}, gradient of {k}, last rows")

    # --- errors -----------------------------------------------------------------------------------------------------------------------

    def test_wrong_cotangent(self, backend: str, device: torch.device) -> None:
        """`bwd` is the one place where autograd does not vouch for the shape, which kernels trust."""
        s = self.sample(device, FP32)
        _, residuals = s.op.fwd(**s.inputs, **s.options)
        bad = tuple(c.new_ones(*c.shape, 2) for c in s.cots)
        with pytest.raises(ValueError, match=rf"^{self.table.op}\.bwd: dy must have the shape .* got \["):
            s.op.bwd(residuals, bad if len(bad) > 1 else bad[0])
        with pytest.raises(TypeError, match=rf"^{self.table.op}\.bwd: dy must be {len(bad)} tensor"):
            s.op.bwd(residuals, None if len(bad) == 1 else bad[0])
        with pytest.raises(TypeError, match=rf"^{self.table.op}\.bwd: residuals must be what {self.table.op}\.fwd returned"):
            s.op.bwd(tuple(residuals), s.cots)

    def test_wrong_call(self, backend: str, call: Wrong, device: torch.device) -> None:
        """The message starts with the function's name, and says what came and what to do."""
        s = self.sample(device, FP32)
        with pytest.raises(call.error) as raised:
            call.call(s.op, {**s.options, **s.inputs})
        message = str(raised.value)
        assert type(raised.value) is call.error
        assert message.startswith(f"{self.table.op}: "), message
        for part in call.says:
            assert part in message, f"{part!r} is not in {message!r}"

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
            with untouched([*made, *flat(y)]):  # without `donate`, not even what fwd made
                assert_same_bits(self.bwd(s, residuals), grads, "gradient of bwd")
                assert_same_bits(self.bwd(s, residuals), grads, "gradient of a second bwd")
            assert_same_bits(flat(y), values, "value of fwd")
            assert_same_bits(self.bwd(s, residuals, donate=True), grads, "gradient of bwd with donate")

    def bwd(self, s: Sample, residuals: object, **options: object) -> tuple[Tensor, ...]:
        grads = s.op.bwd(residuals, s.cots if len(s.cots) > 1 else s.cots[0], **options)
        assert len(grads) == len(self.table.diff)
        assert all((g is None) == (k not in s.wrt) for k, g in zip(self.table.diff, grads, strict=True))
        return tuple(g for g in grads if g is not None)

    @pytest.mark.gpu
    @pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
    def test_the_host_never_waits(self, backend: str, device: torch.device) -> None:
        """Neither forward nor backward asks the GPU for a number, once its kernels are compiled."""
        for case in (self.table.typical, *self.table.on_gpu):
            s = Sample(self.table, case, BF16, device)
            s.ours()
            torch.cuda.set_sync_debug_mode("error")
            try:
                s.ours()
            finally:
                torch.cuda.set_sync_debug_mode("default")

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
        """With respect to the inputs and to the cotangents, eagerly and by torch.func; a linear op has but the latter."""
        s = self.sample(device)
        refusal = pytest.raises(NotImplementedError, match=rf"^{self.table.op}: .*liger_fn\.{self.table.op}\.reference")
        for cots in ([c.detach().requires_grad_() for c in s.cots], s.cots)[: 1 if self.table.linear else 2]:
            leaves = [t.detach().requires_grad_() for t in s.tensors]
            grads = torch.autograd.grad(s.f()(*leaves), leaves, cots, create_graph=True)
            assert_same_bits([g.detach() for g in grads], s.ours()[1], "gradient with create_graph")
            for grad in grads:
                with refusal:
                    grad.sum().backward(retain_graph=True)
        with refusal:
            torch.func.grad(lambda c: sum(g.sum() for g in torch.func.vjp(s.f(), *s.tensors)[1]((c, *s.cots[1:]))))(s.cots[0])
        if not self.table.linear:
            with refusal:
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

    def test_unwanted_gradients_cost_nothing(self) -> None:
        """At realistic sizes, on meta tensors: fewer gradients are smaller matrix products, or launches that touch less."""
        if not _launch.HAS_TRITON:
            pytest.skip("needs Triton")
        for case in self.table.launches:
            wrt = Sample(self.table, case, BF16, torch.device("meta")).wrt
            most = self.work(case, wrt)
            for n in range(len(wrt)):
                for wanted in combinations(wrt, n):
                    work = self.work(case, wanted)
                    fewer = all(a <= b for a, b in zip(work, most, strict=True)) and work != most
                    assert fewer, f"{case.name}: gradients of {wanted} take (products, elements) = {work}, of {wrt} {most}"

    def work(self, case: Case, wanted: Sequence[str]) -> tuple[int, int]:
        """(products of numbers in matrix products, elements handed to kernels) of a forward, and a backward for the gradients wanted."""
        s = Sample(self.table, case, BF16, torch.device("meta"))
        leaves = {k: t.detach().requires_grad_(k in wanted) for k, t in zip(s.wrt, s.tensors, strict=True)}
        kernels: Any = "interpreter" if _launch.INTERPRETED else "triton"
        with liger_fn.use_backend(kernels):
            with _launch.record():
                residuals = s.op.fwd(**s.inputs, **s.options)[1]
            with _launch.record() as launches, CountProducts() as products:
                s.call(s.op, **leaves)
                if wanted:  # directly: autograd would leave the counting mode
                    s.op.bwd(residuals, s.cots if len(s.cots) > 1 else s.cots[0], needs=tuple(k in wanted for k in self.table.diff))
        return products.count, sum(t.numel() for launch in launches for t in launch.args if isinstance(t, Tensor))

    def test_fwd_runs_where_bwd_did_not(self, device: torch.device) -> None:
        """Residuals are the op's, not the backend's: each backend's backward takes those of the other's forward."""
        s = self.sample(device)
        kernels: Any = liger_fn.backend(s.tensors[0])
        truth, naive = s.truth()[1], s.naive()[1]
        pairs: Any = ((kernels, "reference"), ("reference", kernels))
        for one, other in pairs:
            with liger_fn.use_backend(one):
                _, residuals = s.op.fwd(**s.inputs, **s.options)
            with liger_fn.use_backend(other):
                grads = self.bwd(s, residuals)
            for k, g, n, t in zip(s.wrt, grads, naive, truth, strict=True):
                assert_near(g, n, t, f"{self.table.op}, gradient of {k}, {one} then {other}")


class CountProducts(TorchFunctionMode):
    """Counts what matrix products multiply. (A dispatch mode would see them too, and would make ops take their other path.)"""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("mm", "addmm", "addmm_", "matmul", "__matmul__", "linear"):
            a, b = args[1:3] if name.startswith("addmm") else args[:2]
            self.count += a.numel() * b.shape[0 if name == "linear" else -1]
        return func(*args, **(kwargs or {}))


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
