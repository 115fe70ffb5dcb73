"""What was done to a model, as a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

PLANNED = "planned"  # would be replaced
PATCHED = "patched"  # was replaced just now
ALREADY = "already"  # was replaced by an earlier call
LEFT = "left"  # is stock, `why` says for what reason
FAILED = "failed"  # the entry promises it, but it cannot be replaced; `why` says for what reason
PROVED = "proved"  # verify() ran it and it agrees
UNVERIFIED = "not verified"  # verify() could not run it; `why` says for what reason


@dataclass(frozen=True)
class Row:
    """One place in a model.

    Attributes:
        path: the module's name in the model, as in `named_modules()`.
        op: the operation, by the name that switches it on and off.
        was: what stood, or stands, there.
        now: what stands there now (in a plan: what would).
        status: "planned", "patched", "already", "left", "failed", "proved" or "not verified".
        why: for what reason, where the status needs one.
    """

    path: str
    op: str
    was: str
    now: str
    status: str
    why: str = ""

    @property
    def note(self) -> str:
        return f"{self.status}: {self.why}" if self.why else self.status


@dataclass(frozen=True)
class Report:
    """What was, or would be, done to a model. Prints as a table, in which equal layers share a line.

    Attributes:
        model_type: `model.config.model_type`.
        model_class: the class of the model itself, under any wrapper.
        rows: every place, in the order of operations.
    """

    model_type: str
    model_class: str
    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def where(self, status: str) -> tuple[Row, ...]:
        """The rows of one status."""
        return tuple(row for row in self.rows if row.status == status)

    def __str__(self) -> str:
        counts = Counter((re.sub(r"\.\d+(?=\.|$)", ".*", row.path), row.was, row.now, row.note) for row in self.rows)
        lines = [("module", "was", "now", "")]
        lines += [(f"{path}  ×{n}" if n > 1 else path, was, now, note) for (path, was, now, note), n in counts.items()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([f"liger_patch: {self.model_class} ({self.model_type})", *table])
