"""The errors of one function against fp64, case by case: what the rule in `tests/numerics.py` judges, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests import cases
from tests.cases import Case
from tests.numerics import errors
from tests.sample import Sample


@dataclass(frozen=True)
class Line:
    """One output of one function in one case. Errors are in roundings: ‖y − truth‖ ÷ (u ‖truth‖), u half the spacing of the dtype at 1."""

    op: str
    dtype: str  # of the output
    output: str
    case: str
    ours: float
    plain: float
    share: float  # ours ÷ what the rule allows: plain PyTorch's error and one rounding

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.dtype, self.output, self.case


def measured(device: torch.device) -> list[str]:
    """The functions that have cases of their own."""
    return [table.op for table in cases.TABLES.values() if of(table.op, device)]


def of(op: str, device: torch.device) -> list[tuple[Case, torch.dtype]]:
    """Each case in each of its dtypes; on a GPU those at larger sizes too, last."""
    table = cases.TABLES[op]
    return [(c, d) for c in (*table.cases, *(table.on_gpu if device.type == "cuda" else ())) for d in c.dtypes]


def small(op: str) -> int:
    """How many of them are of small sizes."""
    return sum(len(case.dtypes) for case in cases.TABLES[op].cases)


def measure(op: str, nth: int, device: torch.device) -> list[Line]:
    """Every output and gradient in the nth case, but those that are zero: zero is exact, and nothing has no error."""
    table, (case, dtype) = cases.TABLES[op], of(op, device)[nth]
    torch.use_deterministic_algorithms(True)  # as in the tests
    samples = [Sample(table, case, dtype, device, seed) for seed in range(case.draws)]
    found = [(s.ours(), s.naive(), s.truth()) for s in samples]
    values = ["value"] if len(samples[0].cots) == 1 else [f"value {i}" for i in range(len(samples[0].cots))]
    lines = []
    for part, names in ((0, values), (1, [f"gradient of {k}" for k in samples[0].wrt])):
        for i, name in enumerate(names):
            line = _line(op, name, case.name, *(torch.stack([sample[who][part][i] for sample in found]) for who in range(3)))
            lines += [line] if line else []
    del samples, found
    if device.type == "cuda":
        torch.cuda.empty_cache()  # others work on the same GPU
    return lines


def _line(op: str, output: str, case: str, ours: Tensor, naive: Tensor, truth: Tensor) -> Line | None:
    err, naive_err, rounding, size = errors(ours, naive, truth)
    if not size:
        return None
    u = torch.finfo(ours.dtype).eps / 2 * size
    return Line(op, str(ours.dtype)[6:], output, case, err / u, naive_err / u, err / (naive_err + rounding))
