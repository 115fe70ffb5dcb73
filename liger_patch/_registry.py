"""Which model types are known, and the operations each has."""

from __future__ import annotations

from difflib import get_close_matches

from ._errors import PatchError
from ._spec import Arch
from .archs import ARCHS

_entries: dict[str, Arch] = {arch.model_type: arch for arch in ARCHS}


def supported() -> dict[str, tuple[str, ...]]:
    """The model types that can be patched, and the operations replaced in each.

    Returns:
        `{model_type: operations}`, in alphabetical order of the model types.
    """
    return {model_type: tuple(_entries[model_type].ops()) for model_type in sorted(_entries)}


def register(arch: Arch, *, replace: bool = False) -> None:
    """Add an entry, so that `auto` knows one more model type.

    Args:
        arch: the entry.
        replace: permit it to take the place of an entry for the same model type.

    Raises:
        TypeError: `arch` is not an `Arch`.
        ValueError: the model type has an entry and `replace` is False.
    """
    if not isinstance(arch, Arch):
        raise TypeError(f"register: expected a liger_patch.Arch, got {type(arch).__name__}")
    if arch.model_type in _entries and not replace:
        raise ValueError(f"register: model type {arch.model_type!r} has an entry already; pass replace=True to put this one in its place")
    _entries[arch.model_type] = arch


def known(model_type: str | None) -> Arch | None:
    """The entry of a model type, if there is one."""
    return _entries.get(model_type or "")


def entry(model_type: str, who: str) -> Arch:
    """The entry of a model type, or a `PatchError` that says which there are and how to add one. `who`: in whose name."""
    if model_type not in _entries:
        near = get_close_matches(model_type, _entries, 3)
        meant = f" Near to it: {', '.join(near)}." if near else ""
        raise PatchError(
            f"{who}: no entry for model type {model_type!r}.{meant} `python -m liger_patch` lists the {len(_entries)} that there are; "
            "print(liger_patch.suggest(model)) writes one, as the code that registers it"
        )
    return _entries[model_type]
