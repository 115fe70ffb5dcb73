"""Checks of lesson 9: patching one instance, proving it, and an entry."""

from __future__ import annotations

import copy
from itertools import count

import torch
from torch import Tensor, nn

import liger_fn
import liger_patch
from course import Wrong, exercise, near
from course.exercises import Answer
from course.models09 import CourseMLP, CourseNorm, course_model

_numbers = count(1)


class Twice(nn.Module):
    """Something to patch."""

    def forward(self, x: Tensor, plus: float = 0.0) -> Tensor:
        return 2 * x + plus


@exercise(
    "9.1",
    "patching one instance",
    hint="module.forward = MethodType(function, module); undo restores module.__dict__['forward'] if there was one, and deletes it otherwise",
)
def patch(answer: Answer) -> str | None:
    ours, other, x = Twice(), Twice(), torch.ones(2)
    original, keys = Twice.forward, set(ours.state_dict())
    try:
        undo = answer(ours, lambda module, x, plus=0.0: 3 * x + plus)
        if not callable(undo):
            raise Wrong(f"return a function that undoes it, got {type(undo).__name__}")
        if Twice.forward is not original or not torch.equal(other(x), 2 * x):
            raise Wrong("another instance changed: the class was patched")
        if not torch.equal(ours(x, plus=1.0), 3 * x + 1):
            raise Wrong("the patched instance does not call function(module, *args, **kwargs)")
        if set(ours.state_dict()) != keys:
            raise Wrong("the state dict changed: do not put modules in its place")
        undo()
        if "forward" in ours.__dict__:
            raise Wrong("after undo the instance still has a forward of its own in its __dict__")
        if not torch.equal(ours(x), 2 * x):
            raise Wrong("after undo it does not compute what it did")
        mine = lambda x: x  # noqa: E731
        ours.forward = mine
        answer(ours, lambda module, x: 3 * x)()
        if ours.__dict__.get("forward") is not mine:
            raise Wrong("the instance had a forward of its own before (a hook of somebody else's): undo must bring that back")
    finally:
        Twice.forward = original
    return None


def _rms(offset: float, eps: float = 1e-5):
    return lambda m, x: liger_fn.rms_norm.reference(x, m.scale, eps, offset=offset, cast="gemma")


@exercise(
    "9.2",
    "a proof",
    hint="deepcopy the module to fp64, give its parameters random values, compare outputs and torch.autograd.grad of both with torch.allclose",
)
def proved(answer: Answer) -> str | None:
    norm, mlp = CourseNorm(12), CourseMLP(12, 20)
    before = copy.deepcopy(norm.state_dict())
    right = (
        ("the norm by rms_norm with offset 1", norm, _rms(1.0)),
        ("the MLP by swiglu", mlp, lambda m, x: m.w2(liger_fn.swiglu.reference(m.w1(x), m.w3(x)))),
    )
    wrong = (
        ("rms_norm with another epsilon", norm, _rms(1.0, 1e-3)),
        (
            "rms_norm that forgets the weight: the parameters were at the values they start from",
            norm,
            lambda m, x: liger_fn.rms_norm.reference(x, None, 1e-5),
        ),
        ("gate and up exchanged", mlp, lambda m, x: m.w2(liger_fn.swiglu.reference(m.w3(x), m.w1(x)))),
        ("the right values without a gradient", norm, lambda m, x: _rms(1.0)(m, x.detach()) + 0 * x),
    )
    for what, module, function in right:
        if answer(module, function, 12) is not True:
            raise Wrong(f"it refuses {what}, which is right")
    for what, module, function in wrong:
        if answer(module, function, 12) is not False:
            raise Wrong(f"it accepts {what}")
    if norm.scale.dtype is not torch.float32 or any(not torch.equal(before[k], v) for k, v in norm.state_dict().items()):
        raise Wrong("the module's parameters were changed: work on a copy")
    return "It takes what is right, and no more."


@exercise(
    "9.3",
    "an entry",
    hint='Norm("CourseNorm", weight="scale", eps="epsilon", offset=1.0, cast="gemma"), GLU("CourseMLP", act="silu", gate="w1", up="w3", down="w2")',
)
def entry(answer: Answer) -> str | None:
    name = f"course_{next(_numbers)}"
    arch = answer(name)
    if not isinstance(arch, liger_patch.Arch):
        raise Wrong(f"return a liger_patch.Arch, got {type(arch).__name__}")
    liger_patch.register(arch)
    model = course_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    stock, ids = copy.deepcopy(model), torch.randint(64, (2, 10))
    try:
        with liger_fn.use_backend("reference"):  # the proof in plain PyTorch: interpreted kernels would take half a minute
            report = str(liger_patch.auto(model))
    except liger_patch.PatchError as error:
        raise Wrong(f"liger_patch refuses it: {str(error)[:600]}") from error
    for what, word in (("the norms", "rms_norm"), ("the MLPs", "liger_fn.swiglu"), ("the head", "linear_cross_entropy")):
        if word not in report:
            raise Wrong(f"{what} stay stock with this entry; the report:\n{report}")
    with liger_fn.use_backend("reference"):
        losses = [m(input_ids=ids, labels=ids).loss for m in (stock.double(), model)]
    near("the loss", losses[1], losses[0].detach(), rounding=64)
    for loss in losses:
        loss.backward()
    for (key, a), b in zip(stock.named_parameters(), model.parameters(), strict=True):
        near(f"the gradient of {key}", b.grad, a.grad, rounding=512)
    return f"\n{report}"
