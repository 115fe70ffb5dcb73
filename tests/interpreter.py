"""Mends Triton's interpreter where it does not do what the hardware does.

Its conversion of fp32 to bf16 cuts the low bits off, where every GPU rounds to nearest even: held to the numerics rule, a kernel could
then not pass however right it is. That conversion and its exact inverse are replaced, and how old versions read the bounds of a loop. And
it is made faster.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np


def round_bf16() -> None:
    """From now on, interpreted kernels round to bf16 as compiled ones do."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def exact(x: Any, of: Any, to: Any, rounding: Any) -> Any:
        if of == tl.float32 and to == tl.bfloat16:
            bits = x.view(np.uint32)
            nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
            quiet = (bits >> 16) | np.uint32(0x40)
            nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            return np.where(nan, quiet, nearest).astype(np.uint16)
        if of == tl.bfloat16 and to == tl.float32:
            return x.astype(np.uint32) << np.uint32(16)
        return convert(x, of, to, rounding)

    interpreter._convert_float = exact


def patch_once() -> None:
    """A launch patches Triton's language once, and not at every call of one kernel's function by another: that was half of its time."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # an older one
        return
    patch, patch_attr, tl = interpreter._patch_lang, interpreter._patch_attr, interpreter.tl
    known: dict[Any, list[tuple[str, Any]]] = {}
    seen: dict[Any, frozenset[str]] = {}  # by function, which of the language's two modules it has in sight
    scope: Any = None
    patched: set[str] = set()

    def once(fn: Any) -> Any:
        nonlocal scope
        if fn not in seen:
            seen[fn] = frozenset(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)
        if scope is None or not scope._changes:  # no launch is running
            patched.clear()
            scope = patch(fn)
            patched.update(seen[fn])
            return scope
        if not seen[fn] <= patched:
            scope._changes += patch(fn)._changes
            patched.update(seen[fn])
        return interpreter._LangPatchScope()

    def builtins(module: Any, builder: Any, scope: Any) -> None:
        if module not in known:
            members = inspect.getmembers(module)
            known[module] = [(name, member) for name, member in members if tl.core.is_builtin(member)]
        for name, member in known[module]:
            patch_attr(module, name, member, builder, scope)

    interpreter._patch_lang, interpreter._patch_builtin = once, builtins


def read_loop_bounds() -> None:
    """A loop bound is an array of one element, which NumPy 2.4 no longer takes for an int; Triton's interpreter minds that since 3.8."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patched
