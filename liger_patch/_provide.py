"""A stand-in for the package that trainers import behind `use_liger_kernel=True`, whose one function is `auto`.

Such a trainer looks for a module `liger_kernel`, compares its version, and calls its `transformers._apply_liger_kernel_to_instance`. Two
modules in `sys.modules` answer that. They hold nothing else, and say so to whoever asks for more: a name that they do not have is an
AttributeError, an import of it an ImportError.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

from torch import nn
from transformers.utils import import_utils

from ._apply import auto
from ._errors import PatchError
from ._report import Report
from ._spec import OPS

PACKAGE = "liger_kernel"
ENTRY = f"{PACKAGE}.transformers"

# The release whose switch is served; what follows the + says that this is not that release (a local version, as PEP 440 has it).
VERSION = "0.8.5+liger.fn"

# What a trainer may be told in `liger_kernel_config`: the operations of `auto`, one of them by the name that it has there.
SWITCHES = {"fused_linear_cross_entropy" if op == "linear_cross_entropy" else op: op for op in OPS}
EXPERTS_TOO = ("swiglu", "geglu")  # there, these switch the experts of a mixture as well

REMEDY = (
    "liger_patch.provide_liger_kernel() stands in for liger-kernel here, and serves what calls _apply_liger_kernel_to_instance(model=...): "
    "the use_liger_kernel=True of transformers' and TRL's trainers. For the rest leave that switch off and call liger_patch.auto(model) on "
    "the loaded model, use the functions of liger_fn, or call .remove() on the handle and install liger-kernel"
)


class Provided:
    """The stand-in, for as long as it stands. `remove` it, or use it as a context manager.

    Attributes:
        reports: what was done to each model, in the order in which trainers asked.
    """

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def remove(self) -> None:
        """Take the stand-in away; models stay patched. Does nothing the second time."""
        global _provided
        if _provided is self:
            _provided = None
            sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Refuser)]
            for name in (PACKAGE, ENTRY):
                sys.modules.pop(name, None)
            forget()

    def __enter__(self) -> Provided:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def apply(self, model: nn.Module, **switches: object) -> Report:
        """`_apply_liger_kernel_to_instance`: patch this model.

        Args:
            model: as for `liger_patch.auto`.
            **switches: the trainer's `liger_kernel_config`.

        Returns:
            What was done; `reports` has it too, since trainers drop it.

        Raises:
            TypeError: a switch is not known, or its value is not a bool.
            PatchError: as for `liger_patch.auto`.
        """
        done = auto(model, **chosen(switches))
        self.reports.append(done)
        return done


_provided: Provided | None = None


def provide_liger_kernel() -> Provided:
    """Let every trainer that has a `use_liger_kernel=True` patch its model with `auto`, in this process.

    Trainers of transformers and TRL import `liger_kernel` then, and hand it their model. After this call they find a stand-in that patches
    that one model, strictly and with proofs. `liger_kernel_config` may name operations: those of `auto`, with `fused_linear_cross_entropy`
    for `linear_cross_entropy`. `swiglu=False` or `geglu=False` leaves a mixture's experts stock too, unless `experts` is named.

    Called again, it changes nothing and returns the same handle.

    Returns:
        A handle: `.reports` says what was done to each model, `.remove()` takes the stand-in away, as does the end of a `with` block.

    Raises:
        PatchError: a package `liger_kernel` is installed, and would be hidden.

    Examples:
        >>> provided = liger_patch.provide_liger_kernel()                        # doctest: +SKIP
        >>> Trainer(model, TrainingArguments(use_liger_kernel=True), ...).train()  # doctest: +SKIP
        >>> print(provided.reports[0])                                           # doctest: +SKIP
    """
    global _provided
    if _provided is None:
        refuse_to_hide()
        _provided = Provided()
        package, entry = module(PACKAGE, {"__version__": VERSION}), module(ENTRY, {"_apply_liger_kernel_to_instance": _provided.apply})
        package.__dict__["transformers"] = entry
        sys.modules |= {PACKAGE: package, ENTRY: entry}
        sys.meta_path.insert(0, Refuser())
        forget()
    return _provided


def chosen(switches: Mapping[str, object]) -> dict[str, Any]:
    """What `auto` is to leave out, from what a trainer was told."""
    for name, value in switches.items():
        if name not in SWITCHES:
            raise TypeError(f"_apply_liger_kernel_to_instance: unknown keyword {name!r}; known are {', '.join(SWITCHES)}")
        if not isinstance(value, bool):
            raise TypeError(f"_apply_liger_kernel_to_instance: {name} must be True or False, got {value!r}")
    experts = {} if all(switches.get(name, True) for name in EXPERTS_TOO) else {"experts": False}
    return experts | {SWITCHES[name]: value for name, value in switches.items()}


def refuse_to_hide() -> None:
    """Raise if there is a real one."""
    try:
        spec = find_spec(PACKAGE)
    except ValueError:  # a module of this name without a spec, put there by hand
        where = "in sys.modules"
    else:
        if spec is None:
            return
        where = f"at {spec.origin or [*(spec.submodule_search_locations or ())]}"
    installed = ""
    with suppress(PackageNotFoundError):
        installed = f" {version('liger-kernel')}"
    raise PatchError(
        f"provide_liger_kernel: {PACKAGE}{installed} is there already, {where}, and a stand-in would hide it. Leave "
        "use_liger_kernel=True off and call liger_patch.auto(model) before the trainer is made, or uninstall liger-kernel"
    )


def module(name: str, holds: Mapping[str, object]) -> ModuleType:
    """A module of the stand-in: found by `importlib.util.find_spec`, and a package, so that imports from it pass by `Refuser`."""
    made = ModuleType(name, f"A stand-in by liger_patch, whose version is {VERSION}. {REMEDY}.")
    made.__spec__ = ModuleSpec(name, None, origin="liger_patch.provide_liger_kernel()", is_package=True)
    made.__path__ = []
    made.__package__ = name

    def missing(attribute: str) -> NoReturn:
        raise AttributeError(f"{name} has no {attribute!r}: {REMEDY}", name=attribute, obj=made)

    made.__dict__.update(holds, __getattr__=missing)
    return made


class Refuser(MetaPathFinder):
    """Says why a part of the package cannot be imported. `from liger_kernel.x import y` asks for it too, where `x` has no `y`."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.startswith(f"{PACKAGE}."):
            raise ImportError(f"there is no {fullname}: {REMEDY}", name=fullname)


def forget() -> None:
    """Drop what transformers has concluded about the package: it asks once in a process, perhaps before now."""
    import_utils.is_liger_kernel_available.cache_clear()
