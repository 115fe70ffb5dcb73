"""A function in which one global means something else, for whoever holds it.

The function's code runs over a *view* of its module: a module object whose namespace is the original's with one name rebound. The original
module, and every function that lives in it, stays as it is. Compilers find a function's globals through `sys.modules`, so a view is
registered there; there is one for each original module and substitution, however many models use it.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

_views: dict[tuple[str, str, Callable[..., Any]], tuple[dict[str, Any], ModuleType]] = {}
_functions: dict[tuple[FunctionType, str, Callable[..., Any]], FunctionType] = {}


def uses_global(function: Any, name: str) -> bool:
    """Whether a function, under its decorators, reads the global `name`."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    if not isinstance(function, FunctionType):
        return False
    return name in function.__globals__ and any(_reads(code, name) for code in _codes(function.__code__))


def globals_of(function: Any) -> list[str]:
    """The functions that a function, under its decorators, reads as globals of its module."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    if not isinstance(function, FunctionType):
        return []
    held = function.__globals__.items()
    return [name for name, value in held if isinstance(value, FunctionType) and any(_reads(c, name) for c in _codes(function.__code__))]


def rebind(function: Any, name: str, replacement: Callable[..., Any]) -> FunctionType:
    """The same function, in which the global `name` is `replacement`.

    Decorators made with `functools.wraps` are kept: each is rebuilt around the function that it now wraps.

    Args:
        function: a plain Python function, or one under such decorators.
        name: a global that the function reads.
        replacement: what the name shall mean. A module-level function.

    Returns:
        The new function; the same one for the same arguments.

    Raises:
        ValueError: the function is not of that kind, or does not read the global.
    """
    if not isinstance(function, FunctionType):
        raise ValueError(
            f"rebind: {function!r} is a {type(function).__name__}, not a plain function, so its globals cannot be seen through"
        )
    if not uses_global(function, name):
        raise ValueError(f"rebind: {function.__qualname__} does not read a global named {name!r}")
    key = function, name, replacement
    if key not in _functions:
        _functions[key] = (
            _rewrap(function, name, replacement) if hasattr(function, "__wrapped__") else _over_view(function, name, replacement)
        )
    _refresh(_functions[key])
    return _functions[key]


def _over_view(function: FunctionType, name: str, replacement: Callable[..., Any]) -> FunctionType:
    view = _view(function.__globals__, name, replacement)
    return _clone(function, view.__dict__, function.__closure__)


def _rewrap(function: FunctionType, name: str, replacement: Callable[..., Any]) -> FunctionType:
    """The decorator's wrapper, with the wrapped function in its closure exchanged."""
    inner: Any = function.__wrapped__  # type: ignore[attr-defined]
    cells = function.__closure__ or ()
    held = [i for i, cell in enumerate(cells) if _content(cell) is inner]
    if not held:
        raise ValueError(f"rebind: a decorator on {function.__qualname__} does not hold the function it wraps in its closure")
    new = CellType(rebind(inner, name, replacement))
    wrapper = _clone(function, function.__globals__, tuple(new if i in held else cell for i, cell in enumerate(cells)))
    wrapper.__wrapped__ = new.cell_contents  # type: ignore[attr-defined]
    return wrapper


def _clone(function: FunctionType, namespace: dict[str, Any], closure: tuple[CellType, ...] | None) -> FunctionType:
    clone = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, closure)
    clone.__kwdefaults__ = function.__kwdefaults__
    clone.__qualname__ = function.__qualname__
    clone.__doc__ = function.__doc__
    clone.__annotations__ = function.__annotations__
    clone.__dict__.update(function.__dict__)
    return clone


def _view(namespace: dict[str, Any], name: str, replacement: Callable[..., Any]) -> ModuleType:
    key = namespace["__name__"], name, replacement
    # Two modules can carry one name (code loaded again under it): the namespace itself decides.
    if key not in _views or _views[key][0] is not namespace:
        title, n = f"{__name__}.{key[0]}.{name}", 0
        while (unique := f"{title}.{n}" if n else title) in sys.modules:
            n += 1
        view = ModuleType(unique, f"`{key[0]}`, in which `{name}` is `{replacement.__module__}.{replacement.__qualname__}`.")
        view.__dict__["__rebound__"] = (namespace, name, replacement)
        sys.modules[unique] = view
        _views[key] = namespace, view
    return _views[key][1]


def _refresh(function: FunctionType) -> None:
    """Bring a view up to date with its module: globals may have been set since the view was made."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    namespace, name, replacement = function.__globals__["__rebound__"]
    # What says who and where a module is stays the view's own, or imports and compilers would take one for the other.
    own = {"__name__", "__spec__", "__loader__", "__doc__", "__file__", "__cached__", "__rebound__"}
    function.__globals__.update({key: value for key, value in namespace.items() if key not in own})
    function.__globals__[name] = replacement


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _reads(code: CodeType, name: str) -> bool:
    return any(step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval == name for step in dis.get_instructions(code))


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a cell that was never filled
        return None
