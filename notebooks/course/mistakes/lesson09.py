"""Likely wrong answers of lesson 9."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import MethodType

import torch

import liger_patch
from course import mistake
from course.solutions.lesson09 import entry as right_entry


@mistake("9.1", "the class was patched")
def by_class(module, function):
    cls = type(module)
    before, cls.forward = cls.forward, function
    return lambda: setattr(cls, "forward", before)


@mistake("9.1", "still has a forward of its own")
def leaves_the_original_behind(module, function):
    before = module.forward
    module.forward = MethodType(function, module)
    return lambda: setattr(module, "forward", before)


@mistake("9.1", "had a forward of its own before")
def always_deletes(module, function):
    module.forward = MethodType(function, module)
    return lambda: delattr(module, "forward")


@mistake("9.2", "the values they start from")
def parameters_as_they_are(module, function, width):
    twin = copy.deepcopy(module).double()
    x = torch.randn(4, width, dtype=torch.float64, requires_grad=True)
    want, got = twin(x), function(twin, x)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (want, got)]
    return torch.allclose(want, got, rtol=1e-9, atol=1e-9) and torch.allclose(*grads, rtol=1e-9, atol=1e-9)


@mistake("9.2", "without a gradient")
def values_alone(module, function, width):
    twin = copy.deepcopy(module).double()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(4, width, dtype=torch.float64)
    return torch.allclose(twin(x), function(twin, x), rtol=1e-9, atol=1e-9)


@mistake("9.3", "refuses it", "norm")
def offset_forgotten(model_type):
    arch = right_entry(model_type)
    return replace(arch, norm=replace(arch.norm, offset=0.0))


@mistake("9.3", "the head")
def without_a_head(model_type):
    return replace(right_entry(model_type), head=None)


@mistake("9.3", "Arch")
def a_dictionary(model_type):
    return {"model_type": model_type, "norm": liger_patch.Norm("CourseNorm")}
