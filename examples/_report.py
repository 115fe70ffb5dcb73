"""What came of the runs: the verdict, one table for people and one JSON file for programs."""

import dataclasses
import json
import math
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from _corpus import Corpus
from _options import Options
from _runs import Result

# In fp32 on a CPU nothing but the order of summation differs between the runs.
EXACT = 1e-5
# Two draws of the same rounding noise differ; twice the one that was measured is still noise, ten times is a fault.
NOISE_FACTOR = 2.0
VERSIONS = ("liger-fn", "torch", "triton", "transformers", "tokenizers")


@dataclass(frozen=True)
class Verdict:
    """Whether the patched losses are the stock losses; `passed` is None where nothing was measured to judge by."""

    passed: bool | None
    line: str


@dataclass(frozen=True)
class Comparison:
    """Everything the report shows. `other` is the second stock run, if there was one."""

    options: Options
    corpus: Corpus
    stock: Result
    patched: Result
    other: Result | None
    verdict: Verdict


def differences(stock: Result, other: Result) -> list[float]:
    """Relative difference of the losses at every step; infinite where a loss is missing or not finite."""
    if len(stock.losses) != len(other.losses):
        return [math.inf]
    pairs = zip(stock.losses, other.losses, strict=True)
    return [abs(b - a) / abs(a) if math.isfinite(a) and math.isfinite(b) and a else math.inf for a, b in pairs]


def rms(values: list[float]) -> float:
    """Root mean square: unlike the largest value it says much the same of two runs that differ in rounding alone."""
    return math.sqrt(sum(value * value for value in values) / len(values))


def judge(stock: Result, patched: Result, other: Result | None, exact: bool) -> Verdict:
    """`exact`: the losses must agree to 1e-5. Otherwise within what a second stock run, compiled instead of eager, shows."""
    worst = max(differences(stock, patched))
    found = f"largest relative difference of the losses over {len(stock.losses)} steps, patched against stock: {worst:.1e}"
    if not math.isfinite(worst):
        return Verdict(False, f"FAIL: a loss is missing or not finite; {found}")
    if exact:
        return Verdict(worst <= EXACT, f"{'PASS' if worst <= EXACT else 'FAIL'}: {found} (at most {EXACT:.0e} in fp32)")
    if other is None:
        return Verdict(None, f"NOT JUDGED: {found}; --baseline-compile measures how much of it is rounding")
    ours, noise = rms(differences(stock, patched)), rms(differences(stock, other))
    passed = ours <= NOISE_FACTOR * noise
    return Verdict(
        passed,
        f"{'PASS' if passed else 'FAIL'}: {found}, root mean square {ours:.1e};"
        f" {other.name} against stock: root mean square {noise:.1e} (at most {NOISE_FACTOR:g} times that)",
    )


def compare(options: Options, corpus: Corpus, results: list[Result]) -> Comparison:
    """Judge stock and patched, in this order, and a second stock run if there is one."""
    stock, patched, *rest = results
    other = rest[0] if rest else None
    exact = options.device == "cpu" and options.preset.dtype is torch.float32
    return Comparison(options, corpus, stock, patched, other, judge(stock, patched, other, exact))


def machine(device: str) -> str:
    """The processor or GPU that did the work."""
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    return f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"


def headline(options: Options, corpus: Corpus) -> str:
    """What is about to be trained, on what, where."""
    preset = options.preset
    head = f", a head of {preset.head} rows" if preset.head != preset.vocab else ""
    return (
        f"{options.model_type} · {preset.name}: {preset.layers} layers of {preset.hidden}, {str(preset.dtype).removeprefix('torch.')}"
        f" · {preset.steps} steps of {preset.batch} × {preset.seq} tokens · {machine(options.device)}\n"
        f"corpus: {corpus.files} modules of Python's standard library, {corpus.characters / 1e6:.1f} M characters,"
        f" {corpus.tokens / 1e6:.2f} M tokens of a BPE of {preset.vocab}{head}"
    )


def show(console: Console, result: Comparison) -> None:
    """The table, what was patched, and the sample."""
    options, stock, patched, other = result.options, result.stock, result.patched, result.other
    ours = differences(stock, patched)
    drift = differences(stock, other) if other else []
    title = f"\n{options.model_type} · {options.preset.name} · {machine(options.device)}"
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("")
    for name in ("stock", "patched", "difference", *((other.name, "difference") if other else ())):
        table.add_column(name, justify="right")

    def row(name: str, *values: Any) -> None:
        table.add_row(name, *map(str, values[: len(table.columns) - 1]))

    def ratio(key: str, run: Result) -> str:
        return f"× {getattr(run, key) / (getattr(stock, key) or math.nan):.2f}"

    second = other or stock  # never shown where there is no other
    for step, loss in enumerate(stock.losses):
        if step % options.preset.every == 0 or step == len(stock.losses) - 1:
            last = (f"{second.losses[step]:.4f}", f"{drift[step]:.1e}") if other else ()
            row(f"loss, step {step + 1}", f"{loss:.4f}", f"{patched.losses[step]:.4f}", f"{ours[step]:.1e}", *last)
    table.add_section()
    for name, size in (("largest", max), ("root mean square", rms)):
        row(name, "", "", f"{size(ours):.1e}", "", f"{size(drift or ours):.1e}")
    table.add_section()
    for name, key, unit in (("tokens/s", "tokens_per_s", ""), ("peak memory", "peak_mib", " MiB")):
        figures = [f"{getattr(run, key):,.0f}{unit}" for run in (stock, patched, second)]
        row(name, figures[0], figures[1], ratio(key, patched), figures[2], ratio(key, second))
    console.print(table)
    if options.device == "cpu":
        console.print(
            "On a CPU the functions run as plain PyTorch: this shows that the losses are the same; speed and memory are for a GPU to show.",
            highlight=False,
            soft_wrap=True,
        )
    console.print("\n[bold]What was patched[/bold]")
    console.print(patched.report, markup=False, highlight=False, soft_wrap=True)
    console.print("\n[bold]The patched model writes[/bold]")
    console.print(patched.sample, markup=False, highlight=False, soft_wrap=True)


def write(result: Comparison, path: Path) -> None:
    """Every figure, with the machine, the versions and the options that gave it."""
    options = result.options
    preset = {**dataclasses.asdict(options.preset), "dtype": str(options.preset.dtype)}
    runs = [run for run in (result.stock, result.patched, result.other) if run]
    document = {
        "machine": {"device": machine(options.device), "platform": platform.platform(), "processor": platform.machine()},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in VERSIONS},
        "options": {**dataclasses.asdict(options), "preset": preset, "out": str(options.out)},
        "corpus": {**dataclasses.asdict(result.corpus), "folder": str(result.corpus.folder)},
        "runs": [dataclasses.asdict(run) for run in runs],
        "relative_difference": {
            run.name: {"largest": max(found), "root_mean_square": rms(found)}
            for run, found in ((run, differences(result.stock, run)) for run in runs[1:])
        },
        "verdict": dataclasses.asdict(result.verdict),
    }
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
