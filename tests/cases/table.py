"""What a table of cases is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor | None]

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
HALVES = (FP32, BF16, FP16)
IGNORED = -100


@dataclass(frozen=True)
class Maker:
    """Draws tensors: the same numbers for the same seed, every time."""

    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    _generators: list[torch.Generator] = field(default_factory=list)

    def _draw(self, fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if self.device.type == "meta":
            return fn(*args, device="meta", **kwargs)
        if not self._generators:
            self._generators.append(torch.Generator(self.device).manual_seed(self.seed))
        return fn(*args, device=self.device, generator=self._generators[0], **kwargs)

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, rounded to the dtype."""
        dtype = dtype or self.dtype
        x = self._draw(torch.randn, shape, dtype=dtype)
        return x if scale == 1.0 and shift == 0.0 else x.mul_(scale).add_(shift)

    def targets(self, *shape: int, classes: int, every: int = 3) -> Tensor:
        """Class numbers; of any `every` in a row one is ignored (none where that is 0)."""
        target = self._draw(torch.randint, classes, shape)
        if every and self.device.type != "meta":
            target.view(-1)[every - 1 :: every] = IGNORED
        return target

    def full(self, *shape: int, value: float) -> Tensor:
        return torch.full(shape, value, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Case:
    """One input: what to call it, how to make it, what to call the op with besides, and in which dtypes."""

    name: str
    make: Callable[[Maker], Inputs]
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (FP32, BF16)
    draws: int = 1  # how many inputs the numerics are judged over: a norm of few numbers is luck
    scale: float = 1.0  # of the cotangent


@dataclass(frozen=True)
class Table:
    """All that the contract knows of one op."""

    op: str
    diff: tuple[str, ...]
    rows: tuple[str, ...]  # arguments whose first axis counts independent rows
    typical: Case  # the one that the transforms and compilers run: small, every argument present
    sized: Callable[[int], Case]  # the same function at another number of rows
    cases: tuple[Case, ...]
    hostile: tuple[Case, ...]  # magnitudes and special values: finite where the reference is, NaN where it is
    launches: tuple[Case, ...]  # realistic sizes: what ships, and what is worth timing
    on_gpu: tuple[Case, ...]  # numerics at sizes that the interpreter is too slow for
    large: Case  # more than 2^31 elements, outputs by row
    linear: bool = False  # in its differentiable arguments
    autocast: bool = False  # takes part in autocast as a matrix product does
    ranks: int = 1  # of the process group whose first rank makes the launches
