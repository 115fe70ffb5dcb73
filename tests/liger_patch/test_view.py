"""Functions over a view of their module."""

from __future__ import annotations

import functools
import importlib
import sys

import pytest
from transformers.models.llama import modeling_llama

import liger_patch
from liger_patch._view import rebind, uses_global

from .models import llama

scale = 10


def plain(x, *, plus=1):
    return helper(x) * scale + plus


def helper(x):
    return x


def twice(x):
    return 2 * x


def thrice(x):
    return 3 * x


def logged(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        seen.append(args)
        return function(*args, **kwargs)

    return wrapper


class Remembers:
    """A decorator that holds its function out of sight."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


seen: list = []
decorated = logged(logged(plain))


def outer():
    def inner(x):
        return helper(x)

    return inner(5)


def test_one_name_means_something_else():
    other = rebind(plain, "helper", twice)
    assert (other(3), other(3, plus=0), plain(3)) == (61, 60, 31)
    assert (other.__name__, other.__kwdefaults__, other.__doc__) == (plain.__name__, plain.__kwdefaults__, plain.__doc__)
    assert rebind(outer, "helper", twice)() == 10


def test_views_are_shared_and_told_apart():
    before = set(sys.modules)
    other = rebind(plain, "helper", twice)
    assert rebind(plain, "helper", twice) is other
    different = rebind(plain, "helper", thrice)
    assert (other(1), different(1)) == (21, 31)
    assert other.__globals__["__name__"] != different.__globals__["__name__"]
    view = importlib.import_module(different.__globals__["__name__"])
    assert vars(view) is different.__globals__
    for _ in range(3):
        rebind(plain, "helper", thrice)
    assert len(set(sys.modules) - before) <= 2


def test_a_view_follows_its_module(monkeypatch):
    other = rebind(plain, "helper", twice)
    monkeypatch.setitem(plain.__globals__, "scale", 100)
    assert rebind(plain, "helper", twice) is other
    assert other(1) == 201
    monkeypatch.undo()
    rebind(plain, "helper", twice)
    assert other(1) == 21


def test_decorators_are_kept():
    seen.clear()
    other = rebind(decorated, "helper", twice)
    assert other(3) == 61
    assert seen == [(3,), (3,)]
    assert decorated(3) == 31
    assert other.__wrapped__.__wrapped__ is rebind(plain, "helper", twice)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (len, r"is a builtin_function_or_method, not a plain function"),
        (Remembers(plain), r"is a Remembers, not a plain function"),
        (twice, r"twice does not read a global named 'helper'"),
        (functools.wraps(plain)(lambda x: x), r"a decorator on plain does not hold the function it wraps in its closure"),
    ],
)
def test_functions_that_cannot_be_seen_through(function, match):
    with pytest.raises(ValueError, match=match):
        rebind(function, "helper", twice)


def test_an_attribute_is_not_a_global():
    assert uses_global(plain, "helper")
    assert not uses_global(lambda x: x.helper, "helper")
    assert not uses_global(len, "helper")


def test_many_models_share_one_view():
    liger_patch.auto(llama())
    before, forwards = set(sys.modules), set()
    for _ in range(3):
        model = llama()
        liger_patch.auto(model)
        forwards |= {layer.self_attn.forward.__self__._forward for layer in model.model.layers}
    assert set(sys.modules) == before
    assert len(forwards) == 1
    assert forwards.pop().__globals__ is not vars(modeling_llama)
