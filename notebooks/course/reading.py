"""Printing the library's own code beside a lesson, from its files, so that it cannot go stale."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def show_source(file: str, *names: str, package: str = "liger_fn") -> None:
    """Print functions, classes or assignments of a file of the library, with their decorators and line numbers.

    Raises:
        KeyError: the file has no such name: the lesson has to follow the library.
    """
    path = ROOT / package / file
    text = path.read_text()
    lines, found = text.splitlines(), {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found.setdefault(node.name, (first, node.end_lineno))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, (node.lineno, node.end_lineno))
    if missing := [n for n in names if n not in found]:
        raise KeyError(f"show_source: {path.relative_to(ROOT)} has no {missing[0]!r}; it has {sorted(found)}")
    for name in names:
        first, last = found[name]
        print(f"# {path.relative_to(ROOT)}, line {first}")
        print("\n".join(lines[first - 1 : last]), end="\n\n")
