"""Checks of lesson 9: patching one instance, rebinding a name, proving a replacement, and an entry."""

from __future__ import annotations

import copy
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

import liger_fn
import liger_patch
from course import Wrong, exercise, near
from course.exercises import Answer
from course.models09 import CourseMLP, CourseNorm, course_model

_numbers = count(1)


class Scale(nn.Module):
    """Something to patch."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, plus: float = 0.0) -> Tensor:
        return self.factor * x + plus


def _negative(module: Any, x: Tensor, plus: float = 0.0) -> Tensor:
    return -module.factor * x + plus


@exercise(
    "9.1",
    "patching one instance",
    hint="module.forward = MethodType(function, module); undo restores module.__dict__['forward'] if there was one, and deletes it otherwise",
)
def patch(answer: Answer) -> str | None:
    ours, other, x = Scale(), Scale(), torch.ones(2)
    original, keys, kind = Scale.forward, set(ours.state_dict()), type(ours)
    try:
        undo = answer(ours, _negative)
        if not callable(undo):
            raise Wrong(f"return a function that undoes it, got {type(undo).__name__}")
        if Scale.forward is not original or not torch.equal(other(x), 2 * x):
            raise Wrong("another instance changed: the class was patched")
        if set(ours.state_dict()) != keys or type(ours) is not kind:
            raise Wrong("the state dict or the type of the module changed: leave both, and put a forward into its __dict__")
        try:
            got = ours(x, plus=1.0)
        except TypeError as error:
            raise Wrong(f"the patched instance does not call function(module, *args, **kwargs): {error}. Is the module passed?") from error
        if not torch.equal(got, 1 - 2 * x):
            raise Wrong("the patched instance does not compute function(module, *args, **kwargs)")
        _check_copy(ours, x)
        undo()
        if "forward" in ours.__dict__:
            raise Wrong("after undo the instance still has a forward of its own in its __dict__")
        if not torch.equal(ours(x), 2 * x):
            raise Wrong("after undo it does not compute what it did")
        mine = lambda x: x  # noqa: E731
        ours.forward = mine
        answer(ours, _negative)()
        if ours.__dict__.get("forward") is not mine:
            raise Wrong("the instance had a forward of its own before (a hook of somebody else's): undo must bring that back")
    finally:
        Scale.forward = original
    return "This instance alone, its copies too, and nothing is left behind."


def _check_copy(ours: nn.Module, x: Tensor) -> None:
    twin: Any = copy.deepcopy(ours)
    with torch.no_grad():
        twin.factor.fill_(5.0)
    got = twin(x)
    if torch.equal(got, -2 * x):
        raise Wrong(
            "a deep copy computes with the original's parameters: its forward closes over the original module. A bound method is copied with it"
        )
    if not torch.equal(got, -5 * x):
        raise Wrong("a deep copy of a patched module is not patched")


LIMIT = 10


def double(x: int) -> int:
    """The global that is to mean something else."""
    return 2 * x


def _within(shift: int) -> Any:
    def function(x: int, times: int = 3, *, more: int = 7) -> tuple[int, int, int, int, int]:
        return double(x), times, more, shift, LIMIT

    return function


def triple(x: int) -> int:
    return 3 * x


def quadruple(x: int) -> int:
    return 4 * x


@exercise(
    "9.2",
    "another meaning for one name",
    hint="FunctionType(f.__code__, {**f.__globals__, name: replacement}, f.__name__, f.__defaults__, f.__closure__), then its __kwdefaults__",
)
def rebind(answer: Answer) -> str | None:
    function, before = _within(100), double
    want = (2, 3, 7, 100, LIMIT)
    try:
        first = answer(function, "double", triple)
        if globals()["double"] is not before:
            raise Wrong(
                "the module's own global was changed: everybody who calls it by that name gets the replacement. Copy the dictionary"
            )
        if not isinstance(first, FunctionType):
            raise Wrong(f"return a function, got {type(first).__name__}")
        if first.__code__ is not function.__code__:
            raise Wrong("it is not the same code over other globals: a wrapper around the function still looks names up in the old ones")
        second = answer(function, "double", quadruple)
        for made, value in ((first, 3), (second, 4), (function, 2)):
            _check_parts(made, (value, *want[1:]))
    finally:
        globals()["double"] = before
    return "One code object, and each function has its own meaning of the name."


def _check_parts(made: Any, want: tuple[int, ...]) -> None:
    try:
        got = made(1)
    except NameError as error:
        raise Wrong(f"{error}: the other globals must be there too") from error
    except TypeError as error:
        why = "the keyword-only arguments' defaults, __kwdefaults__," if "keyword-only" in str(error) else "the arguments' defaults"
        raise Wrong(f"{error}: {why} were not kept") from error
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        what = ("the name", "the default of an argument", "the keyword-only default", "the variable in the closure", "another global")[
            place
        ]
        if a != b:
            raise Wrong(f"{what} gives {a}, expected {b}")


def _rms(offset: float, eps: float = 1e-5) -> Any:
    return lambda m, x: liger_fn.rms_norm.reference(x, m.scale, eps, offset=offset, cast="gemma")


@exercise(
    "9.3",
    "a proof",
    hint="deepcopy the module to fp64, give its parameters random values, compare outputs and torch.autograd.grad of both; rows of several sizes",
)
def proved(answer: Answer) -> str | None:
    norm, mlp = CourseNorm(12), CourseMLP(12, 20)
    before = copy.deepcopy(norm.state_dict())
    forgets = lambda m, x: liger_fn.rms_norm.reference(x, None, 1e-5)  # noqa: E731
    right = (
        ("the norm by rms_norm with offset 1", norm, _rms(1.0)),
        ("the MLP by swiglu", mlp, lambda m, x: m.w2(liger_fn.swiglu.reference(m.w1(x), m.w3(x)))),
    )
    wrong = (
        ("rms_norm with another epsilon", norm, _rms(1.0, 1e-3)),
        ("rms_norm that forgets the weight: the parameters were at the values they start from", norm, forgets),
        ("gate and up exchanged", mlp, lambda m, x: m.w2(liger_fn.swiglu.reference(m.w3(x), m.w1(x)))),
        ("the right values without a gradient", norm, lambda m, x: _rms(1.0)(m, x.detach()) + 0 * x),
        ("an epsilon off by one part in a million: only fp64 shows that", norm, _rms(1.0, 1.000001e-5)),
    )
    for what, module, function in right:
        if answer(module, function, 12) is not True:
            raise Wrong(f"it refuses {what}, which is right")
    for what, module, function in wrong:
        try:
            accepted = answer(module, function, 12) is not False
        except RuntimeError as error:
            raise Wrong(f"it raises on {what}: {error}") from error
        if accepted:
            raise Wrong(f"it accepts {what}")
    if norm.scale.dtype is not torch.float32 or any(not torch.equal(before[k], v) for k, v in norm.state_dict().items()):
        raise Wrong("the module's parameters were changed: work on a copy")
    return "It takes what is right, and no more."


@exercise(
    "9.4",
    "an entry",
    hint='Norm("CourseNorm", weight="scale", eps="epsilon", offset=1.0, cast="gemma"), GLU("CourseMLP", act="silu", gate="w1", up="w3", down="w2")',
)
def entry(answer: Answer) -> str | None:
    name = f"course_{next(_numbers)}"
    arch = answer(name)
    if not isinstance(arch, liger_patch.Arch):
        raise Wrong(f"return a liger_patch.Arch, got {type(arch).__name__}")
    if arch.model_type != name:
        raise Wrong(f"the entry is for {arch.model_type!r}, asked was one for {name!r}: pass model_type on")
    liger_patch.register(arch)
    model = course_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    stock, ids = copy.deepcopy(model), torch.randint(64, (2, 10))
    with liger_fn.use_backend("reference"):  # in plain PyTorch: interpreted kernels would take half a minute
        try:
            report = str(liger_patch.auto(model))
        except liger_patch.PatchError as error:
            raise Wrong(f"liger_patch refuses it: {str(error)[:600]}") from error
        for what, word in (("the norms", "rms_norm"), ("the MLPs", "liger_fn.swiglu"), ("the head", "linear_cross_entropy")):
            if word not in report:
                raise Wrong(f"with this entry nothing replaces {what}; the report:\n{report}")
        losses = [m(input_ids=ids, labels=ids).loss for m in (stock.double(), model)]
    # What the entry got wrong, the proof has refused: these are fp32's roundings through two layers, so a few dozen of them.
    near("the loss", losses[1], losses[0].detach(), rounding=64)
    for loss in losses:
        loss.backward()
    for (key, a), b in zip(stock.named_parameters(), model.parameters(), strict=True):
        near(f"the gradient of {key}", b.grad, a.grad, rounding=512)
    return f"\n{report}"
