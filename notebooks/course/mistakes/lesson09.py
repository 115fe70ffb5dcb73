"""Likely wrong answers of lesson 9."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import FunctionType, MethodType

import torch

import liger_patch
from course import mistake
from course.solutions.lesson09 import entry as right_entry


@mistake("9.1", "the class was patched")
def by_class(module, function):
    cls = type(module)
    before, cls.forward = cls.forward, function
    return lambda: setattr(cls, "forward", before)


@mistake("9.1", "Is the module passed?")
def not_bound(module, function):
    module.forward = function
    return lambda: delattr(module, "forward")


@mistake("9.1", "closes over the original module")
def by_closure(module, function):
    module.forward = lambda *args, **kwargs: function(module, *args, **kwargs)
    return lambda: delattr(module, "forward")


@mistake("9.1", "still has a forward of its own")
def leaves_the_original_behind(module, function):
    before = module.forward
    module.forward = MethodType(function, module)
    return lambda: setattr(module, "forward", before)


@mistake("9.1", "had a forward of its own before")
def always_deletes(module, function):
    module.forward = MethodType(function, module)
    return lambda: delattr(module, "forward")


@mistake("9.2", "Copy the dictionary")
def in_the_module(function, name, replacement):
    function.__globals__[name] = replacement
    return function


@mistake("9.2", "defaults", "not kept")
def without_defaults(function, name, replacement):
    return FunctionType(function.__code__, {**function.__globals__, name: replacement}, None, None, function.__closure__)


@mistake("9.2", "__kwdefaults__", "not kept")
def without_keyword_defaults(function, name, replacement):
    view = {**function.__globals__, name: replacement}
    return FunctionType(function.__code__, view, function.__name__, function.__defaults__, function.__closure__)


@mistake("9.2", "the other globals")
def one_global_alone(function, name, replacement):
    made = FunctionType(function.__code__, {name: replacement}, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


@mistake("9.2", "a wrapper around the function")
def a_wrapper(function, name, replacement):
    def wrapper(*args, **kwargs):
        before, function.__globals__[name] = function.__globals__[name], replacement
        try:
            return function(*args, **kwargs)
        finally:
            function.__globals__[name] = before

    return wrapper


def _twin(module):
    twin = copy.deepcopy(module).double()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return twin


def _same(twin, function, x):
    want, got = twin(x), function(twin, x)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (want, got)]
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in ((want, got), grads))


@mistake("9.3", "the values they start from")
def parameters_as_they_are(module, function, width):
    return _same(copy.deepcopy(module).double(), function, torch.randn(4, width, dtype=torch.float64, requires_grad=True))


@mistake("9.3", "without a gradient")
def values_alone(module, function, width):
    twin, x = _twin(module), torch.randn(4, width, dtype=torch.float64)
    return torch.allclose(twin(x), function(twin, x), rtol=1e-9, atol=1e-9)


@mistake("9.3", "only fp64 shows that")
def in_single_precision(module, function, width):
    twin, x = _twin(module).float(), torch.randn(4, width, requires_grad=True)
    want, got = twin(x), function(twin, x)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (want, got)]
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in ((want, got), grads))


@mistake("9.4", "refuses it", "norm")
def offset_forgotten(model_type):
    arch = right_entry(model_type)
    return replace(arch, norm=replace(arch.norm, offset=0.0))


@mistake("9.4", "refuses it", "swiglu")
def gate_and_up_exchanged(model_type):
    arch = right_entry(model_type)
    return replace(arch, mlp=replace(arch.mlp, gate="w3", up="w1"))


@mistake("9.4", "the head")
def without_a_head(model_type):
    return replace(right_entry(model_type), head=None)


@mistake("9.4", "Arch")
def a_dictionary(model_type):
    return {"model_type": model_type, "norm": liger_patch.Norm("CourseNorm")}
