"""Mends Triton's interpreter where it does not do what the hardware does.

Its conversion of fp32 to bf16 cuts the low bits off, where every GPU rounds to nearest even: held to the numerics rule, a kernel could
then not pass however right it is. That conversion and its exact inverse are replaced, and how old versions read the bounds of a loop. And
it is made faster.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

_mended = False


def mend() -> None:
    """All of the below, once in a process."""
    global _mended
    if not _mended:
        round_bf16()
        read_loop_bounds()
        patch_once()
    _mended = True


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
    patch, tl = interpreter._patch_lang, interpreter.tl
    known: dict[Any, list[tuple[str, Any]]] = {}
    seen: dict[Any, frozenset[str]] = {}  # by function, which of the language's two modules it has in sight
    kept: dict[frozenset[str], list[tuple[Any, Any]]] = {}  # what a launch of such a function changes, and to what
    scope: Any = None
    patched: set[str] = set()

    def once(fn: Any) -> Any:
        nonlocal scope
        if fn not in seen:
            seen[fn] = frozenset(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)
        if scope is None or not scope._changes:  # no launch is running
            patched.clear()
            patched.update(seen[fn])
            if seen[fn] not in kept:
                scope = patch(fn)
                kept[seen[fn]] = [(change, vars(change[0])[change[1]]) for change in scope._changes]
                return scope
            scope = interpreter._LangPatchScope()
            for change, value in kept[seen[fn]]:
                setattr(*change[:2], value)
                scope._changes.append(change)
            return scope
        if not seen[fn] <= patched:
            scope._changes += patch(fn)._changes
            patched.update(seen[fn])
        return interpreter._LangPatchScope()

    def builtins(module: Any, builder: Any, scope: Any) -> None:
        if module not in known:
            members = inspect.getmembers(module)
            known[module] = [(name, with_semantic(member)) for name, member in members if tl.core.is_builtin(member)]
        for name, member in known[module]:
            scope.set_attr(module, name, member)

    def with_semantic(member: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return member(*args, **kwargs)

        return call

    interpreter._patch_lang, interpreter._patch_builtin = once, builtins
    _remember(interpreter)


def _remember(interpreter: Any) -> None:
    """What follows from a type or a shape alone is found once, and no cast is looked for between operands that need none.

    The numbers, their types and every error are those of the interpreter as it comes: what is not plainly right goes its way.
    """
    tl = interpreter.tl
    core = tl.core

    def keep(cls: Any, names: tuple[str, ...], of: Callable[..., tuple[Any, Any]]) -> None:
        """An object's attributes called `names` are those of the first made of the same key; of equal shapes there is one alone."""
        stock, made, shapes = cls.__init__, {}, {}

        def init(self: Any, first: Any, second: Any) -> None:
            key, own = of(first, second)
            if key not in made:
                stock(self, first, second)
                made[key] = {name: getattr(self, name) for name in names}
                made[key]["shape"] = shapes.setdefault(str(self.shape), self.shape)
            self.__dict__.update(made[key], **own)

        cls.__init__ = init

    keep(core.block_type, ("shape", "numel", "name"), lambda of, shape: ((of.name, *shape), {"element_ty": of}))
    keep(
        core.tensor,
        ("shape", "numel"),
        lambda handle, type: (type.is_block() and type.name, {"handle": handle, "type": type, "dtype": type.scalar}),
    )
    equal, numpy_dtype, dtypes = core.dtype.__eq__, interpreter._get_np_dtype, {}
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)

    def np_dtype(of: Any) -> Any:
        if of.name not in dtypes:
            dtypes[of.name] = numpy_dtype(of)
        return dtypes[of.name]

    interpreter._get_np_dtype = np_dtype
    bits = {"fp32": 32, "fp64": 64, "int32": 32, "int64": 64}

    class Semantic(type(interpreter.interpreter_semantic)):  # type: ignore[misc]
        def alike(self, *args: Any) -> list[Any] | None:
            """The operands as tensors of one type, where all have its dtype or are numbers it can hold; None where there is more to it."""
            of = dtype = None
            for arg in args:
                if isinstance(arg, core.tensor):
                    if dtype is None:
                        dtype = arg.dtype
                    elif arg.dtype is not dtype:
                        return None
                    if arg.type.is_block():
                        if of is None:
                            of = arg.type
                        elif arg.type.shape is not of.shape:
                            return None
            if dtype is None or dtype.name not in bits:
                return None
            most, made = 2 ** (bits[dtype.name] - 1), []
            for arg in args:
                if not isinstance(arg, core.tensor):
                    if not ((type(arg) is int and -most <= arg < most) or (type(arg) is float and dtype.name.startswith("fp"))):
                        return None
                    arg = self.scalar_constant(arg, dtype)
                if of is not None and not arg.type.is_block():
                    arg = core.tensor(interpreter.TensorHandle(np.full(of.shape, arg.handle.data, np_dtype(dtype)), dtype), of)
                made.append(arg)
            return made

        def binary_op_type_checking_impl(self, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> Any:
            return self.alike(lhs, rhs) or super().binary_op_type_checking_impl(lhs, rhs, *args, **kwargs)

        def ternary_op_type_checking_impl(self, *args: Any) -> Any:
            return self.alike(*args) or super().ternary_op_type_checking_impl(*args)

        def broadcast_impl_value(self, lhs: Any, rhs: Any) -> Any:
            if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
                return lhs, rhs
            return super().broadcast_impl_value(lhs, rhs)

        def binary_op_sanitize_overflow_impl(self, *args: Any) -> None:
            """Ends in an assertion, and those are off: without one, an operation on integers is ten."""
            if self.builder.options.debug:
                super().binary_op_sanitize_overflow_impl(*args)

    interpreter.interpreter_semantic.__class__ = Semantic


def read_loop_bounds() -> None:
    """A loop bound is an array of one element, which NumPy 2.4 no longer takes for an int; Triton's interpreter minds that since 3.8."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patched
