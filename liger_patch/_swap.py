"""One replaced attribute of one module, and how it is put back.

A swap lives in the module's own `__dict__`, where it hides the class's attribute from this instance alone. It knows its module, its slot
and what stood there before, and nothing outside the model remembers a patch: so a deep copy or an unpickled model carries swaps bound to
its own modules, and each can be undone by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any

from torch import nn

from ._errors import PatchError
from ._sharded_head import is_sharded

RECORD = "_liger_patch"  # where a patched model notes its swaps
SWAP = "_liger_forward"  # where a module has the swap of its forward


class Swap:
    """An attribute that hides the class's own in one module's `__dict__`."""

    __slots__ = ("before", "module", "slot")

    op: str  # the operation it stands for
    slot_name: str  # the attribute it hides

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.slot = _slot(module, self.slot_name)
        # A tuple tells "nothing stood here" from "None stood here", and survives copies, where a sentinel would not.
        self.before: tuple[Any, ...] = (module.__dict__[self.slot],) if self.slot in module.__dict__ else ()
        # It takes the place of an earlier one of ours, so that what is put back is the original.
        if (earlier := installed(module, self.slot_name)) is not None:
            self.slot, self.before = earlier.slot, earlier.before

    def install(self) -> None:
        self.module.__dict__[_slot(self.module, self.slot_name)] = self

    def remove(self) -> None:
        """Put back what stood here. The caller has made sure that the swap is not `wrapped`."""
        slot = _slot(self.module, self.slot_name)
        if self.before:
            self.module.__dict__[slot] = self.before[0]
        elif slot != self.slot:
            # An accelerate hook came after the swap and calls what it keeps in its slot, so that slot cannot be left empty.
            self.module.__dict__[slot] = MethodType(type(self.module).forward, self.module)
        else:
            del self.module.__dict__[slot]

    @property
    def now(self) -> str:
        """What runs in its place, as a report has it."""
        return f"liger_fn.{self.op}"

    @property
    def wrapped(self) -> bool:
        """Whether something of someone else's now stands where this swap was put."""
        return installed(self.module, self.slot_name) is not self

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for cls in type(self).__mro__ for name in cls.__dict__.get("__slots__", ())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class Forward(Swap):
    """A module's forward, for this instance.

    What stands in the module is a method of the swap, and not the swap: compilers compare methods by their code, objects by their identity,
    so that what was compiled of one layer serves the others.
    """

    __slots__ = ("forward",)

    slot_name = "forward"
    forward: MethodType  # what stands in the module; a method is pickled by the name that its object has for it
    kind: str  # what of a module it replaces: at most one swap of a kind
    sharded = False  # whether it takes inputs that are split over devices

    def __new__(cls, module: nn.Module | type[nn.Module], *_: Any) -> Forward:
        self: Forward = super().__new__(cls)
        self.forward = MethodType(_method(module if isinstance(module, type) else type(module)), self)
        return self

    def __getnewargs__(self) -> tuple[type[nn.Module]]:
        return (type(self.module),)  # which a copy has before it has its module

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["forward"]
        return state

    def install(self) -> None:
        self.module.__dict__[_slot(self.module, self.slot_name)] = self.forward
        self.module.__dict__[SWAP] = self

    def remove(self) -> None:
        super().remove()
        if self.module.__dict__.get(SWAP) is self:
            del self.module.__dict__[SWAP]

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def stock(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the module would do without this swap."""
        return self.before[0](*args, **kwargs) if self.before else type(module).forward(module, *args, **kwargs)

    def split(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The same where an input is split over devices: the module's own forward, as DTensors know no function of liger_fn."""
        return self.stock(module, *args, **kwargs)

    def entered(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """`run`, or `split` where an input is so."""
        if not self.sharded:  # loops: this is every call's host time
            for value in args:
                if is_sharded(value):
                    return self.split(module, *args, **kwargs)
            for value in kwargs.values():
                if is_sharded(value):
                    return self.split(module, *args, **kwargs)
        return self.run(module, *args, **kwargs)


def _method(owner: type[nn.Module]) -> Callable[..., Any]:
    """The function of a forward's method, with the signature of the class's: trainers and generate() learn from it what a model accepts."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, Forward):
            return self.entered(self.module, *args, **kwargs)
        # Libraries that wrap a forward bind its function anew, to the module or to a shallow copy of it.
        return self.__dict__[SWAP].entered(self, *args, **kwargs)

    forward.__doc__ = owner.forward.__doc__
    forward.__signature__ = inspect.signature(owner.forward)  # type: ignore[attr-defined]
    return forward


class Viewed(Forward):
    """A module's own forward, over a view of its code's globals in which some mean something else."""

    __slots__ = ("_forward",)

    sharded = True  # what runs is the module's own

    def _bound(self) -> Callable[..., Any]:
        """That forward. It has no importable name: a copy makes it anew from its class."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["_forward"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forward = self._bound()


class Alone(Swap):
    """Stops `nn.DataParallel`: a replica shares its module's swaps, which run that module and not the replica."""

    __slots__ = ()

    slot_name = "_replicate_for_data_parallel"

    def __call__(self) -> Any:
        raise PatchError("nn.DataParallel makes replicas, which a patched model does not support: use DistributedDataParallel, or revert")


def installed(module: nn.Module, slot_name: str) -> Swap | None:
    """The swap that a module calls in this slot, if it is one of ours."""
    value = module.__dict__.get(_slot(module, slot_name))
    if isinstance(value, MethodType) and getattr(value.__func__, "__code__", None) is _CODE:
        value = value.__self__ if isinstance(value.__self__, Swap) else module.__dict__.get(SWAP)
    return value if isinstance(value, Swap) else None


SLOTS = ("forward", "_loss_function", Alone.slot_name)
_CODE = _method(nn.Module).__code__  # of every function that `_method` makes


def swaps(root: nn.Module) -> Iterator[Swap]:
    """Every swap in a model that is its module's own."""
    for module in root.modules():
        for slot_name in SLOTS:
            swap = installed(module, slot_name)
            if swap is not None and swap.module is module:
                yield swap


def install(root: nn.Module, new: Iterable[Swap]) -> None:
    """Install swaps, and note on the model which it has: a wrapper around one of them would hide it from a search."""
    new = tuple(new)
    if new and installed(root, Alone.slot_name) is None:
        new = (*new, Alone(root))
    for swap in new:
        swap.install()
    if new:
        places = {(id(swap.module), swap.slot_name) for swap in new}
        kept = [swap for swap in recorded(root) if (id(swap.module), swap.slot_name) not in places]
        root.__dict__[RECORD] = (*kept, *new)


def recorded(root: nn.Module) -> tuple[Swap, ...]:
    """The swaps that a model was given."""
    return root.__dict__.get(RECORD, ())


def is_stock(module: nn.Module) -> bool:
    """Whether the module runs the forward of its class: no one has put another one on this instance."""
    value = module.__dict__.get(_slot(module, "forward"))
    return value is None or (getattr(value, "__self__", None) is module and getattr(value, "__func__", None) is type(module).forward)


def _slot(module: nn.Module, name: str) -> str:
    """Where the attribute stands: accelerate's hooks take `forward` for themselves and call what they keep as `_old_forward`."""
    return "_old_forward" if name == "forward" and "_old_forward" in module.__dict__ else name
