"""Train a model several times from the same weights on the same text: stock, stock with other rounding, and patched.

Training is chaotic: two runs that differ in the last bit of one sum drift apart, and after some hundred steps agree in what they learned,
not in their bits. So "patched equals stock" can only mean "patched is as near to stock as stock is to itself, computed in another order".
That is what the runs of `VARIANTS` measure. Each is equal to the first in exact arithmetic:

- *again*: nothing differs. Where it is not 0, the machine itself gives other bits from run to run.
- *rows reversed*, *rows rotated*: the sequences of each batch in another order. The gradient of each weight and the loss are sums over
  tokens, taken in another order; what a token meets on its way forward is the same to the bit.
- *products of 1/4*, *products of 1/2*, *products of 3/4*: each linear layer sums that part of its inputs and the rest by two products. All
  activations are rounded anew, forward and backward, as they are in a patched model. Three, since each is one draw of what is mostly luck:
  AdamW's first step of an element is as large where its gradient is nearly 0, of either sign, as anywhere.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from _corpus import batches
from _presets import Preset
from liger_patch import Report

from . import measure, models
from .measure import PATCHED, Result

Patch = Callable[[PreTrainedModel], Report]
Progress = Callable[[str, float, float, float], None]  # a run's name, the seconds it took, held-out loss before and after


@dataclass(frozen=True)
class Variant:
    """What differs from the first run."""

    rows: Callable[[Tensor], Tensor] = lambda ids: ids
    cut: float = 0.0  # where the inputs of linear layers are cut
    patched: bool = False


STOCK = "stock"
VARIANTS = {
    STOCK: Variant(),
    measure.AGAIN: Variant(),
    "rows reversed": Variant(rows=lambda ids: ids.flip(0)),
    "rows rotated": Variant(rows=lambda ids: ids.roll(1, 0)),
    "products of 1/4": Variant(cut=0.25),
    "products of 1/2": Variant(cut=0.5),
    "products of 3/4": Variant(cut=0.75),
    PATCHED: Variant(patched=True),
}


@dataclass(frozen=True)
class Job:
    """One model in one dtype, all of its runs. `folder` is what `split` made; `held` batches are read after training."""

    model: str
    dtype: str
    preset: Preset
    device: str
    folder: Path
    seed: int = 0
    held: int = 8

    @property
    def name(self) -> str:
        return f"{self.model} {self.dtype}"


@dataclass(frozen=True)
class Trained:
    """One run: every step's loss, the loss on text that was held out, and the parameters by their names, early and at the end."""

    losses: list[float]
    held_out: float
    early: dict[str, Tensor]
    parameters: dict[str, Tensor]
    ops: tuple[str, ...] = ()


def split(folder: Path) -> None:
    """From the corpus in `folder`, two: what is trained on, and the last tenth, which is not."""
    tokens = torch.load(folder / "tokens.pt")
    cut = len(tokens) * 9 // 10
    for name, part in (("train", tokens[:cut]), ("held", tokens[cut:])):
        (folder / name).mkdir(exist_ok=True)
        torch.save(part.clone(), folder / name / "tokens.pt")


class Trial:
    """A job's first weights, the runs from them, and their comparison."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = models.build(models.MODELS[job.model], job.preset, job.dtype, job.device, job.seed)
        self.start = _parameters(self.model)
        self.before = _held_out(self.model, job)

    def run(self, variant: Variant, patch: Patch = models.patch) -> Trained:
        """Train a copy."""
        return train(copy.deepcopy(self.model), self.job, variant, patch)

    def result(self, runs: dict[str, Trained]) -> Result:
        """Every run against the first stock run."""
        stock = runs[STOCK]
        return Result(
            model=self.job.model,
            dtype=self.job.dtype,
            parameters=sum(p.numel() for p in self.start.values()),
            ops=list(runs[PATCHED].ops),
            before=self.before,
            after=stock.held_out,
            losses=measure.binned(stock.losses),
            runs={name: _against(run, stock, self.start) for name, run in runs.items() if name != STOCK},
        )


def compare(job: Job, say: Progress = lambda *_: None) -> Result:
    """Train every variant, and compare each with the first."""
    trial = Trial(job)
    runs = {}
    for name, variant in VARIANTS.items():
        began = time.perf_counter()
        runs[name] = trial.run(variant)
        say(name, time.perf_counter() - began, trial.before, runs[name].held_out)
    return trial.result(runs)


def _against(run: Trained, stock: Trained, start: dict[str, Tensor]) -> measure.Run:
    early, _, _ = measure.updates(run.early, stock.early, start)
    end = measure.updates(run.parameters, stock.parameters, start)
    return measure.run_of(run.losses, stock.losses, run.held_out - stock.held_out, early, end)


def train(model: PreTrainedModel, job: Job, variant: Variant, patch: Patch) -> Trained:
    """One run, by the quickstart's optimizer: AdamW, warmup over a fifth of the steps, gradients clipped at 1."""
    preset = job.preset
    ops: tuple[str, ...] = ()
    if variant.patched:
        report = patch(model)
        ops = tuple(dict.fromkeys(row.op for row in report.where("patched")))
    if variant.cut:
        cut(model, variant.cut)
    torch.manual_seed(job.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=preset.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=max(1, preset.steps // 5))
    losses: list[Tensor] = []
    early: dict[str, Tensor] = {}
    for ids in map(variant.rows, batches(job.folder / "train", preset, job.seed, job.device)):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
        if len(losses) == min(measure.EARLY, preset.steps):
            early = _parameters(model)
    return Trained(torch.stack(losses).tolist(), _held_out(model, job), early, _parameters(model), ops)


def cut(model: nn.Module, at: float) -> None:
    """Let every linear layer of this model sum two parts of its inputs apart, the first `at` of them and the rest."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = _Cut(module, int(at * module.in_features))  # type: ignore[method-assign, assignment]


@dataclass
class _Cut:
    linear: nn.Linear
    first: int

    def __call__(self, x: Tensor) -> Tensor:
        weight, n = self.linear.weight, self.first
        first = nn.functional.linear(x[..., :n], weight[:, :n], self.linear.bias)
        return first + nn.functional.linear(x[..., n:], weight[:, n:])


@torch.no_grad()
def _held_out(model: PreTrainedModel, job: Job) -> float:
    losses = [model.eval()(input_ids=ids, labels=ids).loss.float() for ids in _held(job)]
    model.train()
    return float(torch.stack(losses).double().mean())


def _held(job: Job) -> Iterator[Tensor]:
    return batches(job.folder / "held", replace(job.preset, steps=job.held), job.seed + 1, job.device)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
