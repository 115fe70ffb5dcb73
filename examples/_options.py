"""The examples' command lines: every value is checked before any work begins."""

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from _presets import PRESETS, Preset


@dataclass(frozen=True)
class Options:
    """A checked command line of the quickstart."""

    model_type: str
    preset: Preset
    device: str
    out: Path
    seed: int
    compile: bool
    baseline_compile: bool


def add_sizes(parser: argparse.ArgumentParser, out: str, preset: str) -> None:
    """What every example is asked: `--preset`, `--steps`, `--batch`, `--seed` and `--out`."""
    parser.add_argument("--preset", default=preset, metavar="NAME", help=f"size: {', '.join(PRESETS)} (default here: {preset})")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps, 2 or more (default: the preset's)")
    parser.add_argument("--batch", type=int, metavar="N", help="sequences in a batch (default: the preset's)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all random numbers (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("out") / out, metavar="DIR", help="results folder (default: %(default)s)")


def sized(parser: argparse.ArgumentParser, given: argparse.Namespace, memory: float | None = None) -> Preset:
    """The preset with what was given of its numbers.

    A value that cannot work ends the program with exit code 2 and the remedy. `memory` is the GPU's, in GiB, where what is trained may need
    as much as a stock model does; without it, a large preset asks for a GPU and no more.
    """

    def refuse(option: str, value: object, why: str) -> None:
        parser.error(f"{option} {value}: {why}")

    if given.preset not in PRESETS:
        refuse("--preset", given.preset, f"no such preset; choose from {', '.join(PRESETS)}")
    preset = PRESETS[given.preset]
    if given.steps is not None:
        if given.steps < 2:
            refuse("--steps", given.steps, "must be 2 or more, since the first steps warm up and only later ones are timed")
        preset = replace(preset, steps=given.steps, every=max(1, min(preset.every, given.steps // 8)))
    if given.batch is not None:
        if given.batch < 1:
            refuse("--batch", given.batch, "must be 1 or more sequences")
        preset = replace(preset, batch=given.batch)
    if not 0 <= given.seed < 2**63:
        refuse("--seed", given.seed, "must be from 0 to 2**63 - 1")
    if preset.gpu_gib is not None:
        small = ", ".join(name for name, other in PRESETS.items() if other.gpu_gib is None)
        need = preset.gib(preset.batch)
        if not torch.cuda.is_available():
            refuse("--preset", preset.name, f"needs a GPU with about {need:.0f} GiB, and torch sees none here; choose from {small}")
        if memory is not None and need > memory:
            refuse(
                "--preset",
                preset.name,
                f"needs a GPU with about {need:.0f} GiB, this one has {memory:.0f}; lower --batch, or choose from {small}",
            )
    blocking = next((path for path in (given.out, *given.out.parents) if path.exists() and not path.is_dir()), None)
    if blocking is not None:
        refuse("--out", given.out, f"{blocking} is a file; name a folder, which is created if need be")
    return preset


def parse(argv: Sequence[str] | None, supported: Collection[str], doc: str | None) -> Options:
    """The quickstart's options from `argv` (None: the command line)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if device == "cuda" else 0.0
    automatic = "1b" if memory > PRESETS["1b"].gib(PRESETS["1b"].batch) else "small"

    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0], allow_abbrev=False)
    known = ", ".join(sorted(supported))
    parser.add_argument("--model-type", default="llama", metavar="TYPE", help=f"architecture: {known} (default: llama)")
    add_sizes(parser, "quickstart", automatic)
    parser.add_argument("--compile", action="store_true", help="torch.compile both runs")
    parser.add_argument(
        "--baseline-compile",
        action="store_true",
        help="also train stock in the other mode (compiled; eager under --compile): how far rounding alone moves the losses",
    )
    given = parser.parse_args(argv)
    if given.model_type not in supported:
        parser.error(
            f"--model-type {given.model_type}: not a supported architecture; choose from {known}, or add one with liger_patch.register"
        )
    preset = sized(parser, given, memory)
    return Options(given.model_type, preset, device, given.out, given.seed, given.compile, given.baseline_compile)
