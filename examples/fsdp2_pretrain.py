"""Pretrain a language model, patched with liger_patch, on any number of processes: FSDP2, checkpoints, and resuming with the same losses.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2_pretrain.py      # gloo and a tiny model where there is no GPU
    torchrun --standalone --nproc-per-node 8 examples/fsdp2_pretrain.py --batch 32 --activation-checkpointing
    python examples/fsdp2_pretrain.py --help

The same command again goes on from the last complete checkpoint in --out, on as many processes as it is given: `--batch` counts the
sequences of all of them, and the order of the text, the schedule and the optimizer's state are those of the step. Nothing here draws
random numbers after the weights are made; a model with dropout would have to seed itself by the step as well.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read_sharded
from torch.distributed.checkpoint.state_dict_saver import save as write_sharded
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

import liger_patch
from _corpus import prepare
from _model import causal_lm
from _presets import PRESETS, Preset
from _progress import Display

VERSIONS = ("torch", "transformers")  # whose code a step runs through: another release may compute another loss
PARTIAL = ".partial"  # ends the name of a checkpoint that is still being written


class CannotResume(Exception):
    """A checkpoint that this run would not continue: what differs, and what to do."""


@dataclass(frozen=True)
class Options:
    """A checked command line."""

    model_type: str
    preset: Preset
    lr: float
    warmup: int
    seed: int
    bf16: bool
    activation_checkpointing: bool
    save_every: int
    keep: int
    other_versions: bool
    out: Path

    def losses_depend_on(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it continues."""
        preset = asdict(self.preset) | {"dtype": str(self.preset.dtype)}
        sizes = ("hidden", "layers", "heads", "kv_heads", "mlp", "head", "vocab", "tied", "batch", "seq", "steps", "corpus", "dtype")
        rest = {"model_type": self.model_type, "lr": self.lr, "warmup": self.warmup, "seed": self.seed, "bf16": self.bf16}
        return {name: preset[name] for name in sizes} | rest


def parse(argv: Sequence[str] | None) -> Options:
    """Options from `argv` (None: the command line)."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model-type", default="llama", choices=liger_patch.supported(), metavar="TYPE", help="architecture (llama)")
    parser.add_argument("--preset", default="1b" if gpu else "tiny", choices=PRESETS, help="size (default here: %(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the whole training (default: the preset's)")
    parser.add_argument("--batch", type=int, metavar="N", help="sequences a step, over all processes (default: the preset's)")
    parser.add_argument("--seq", type=int, metavar="N", help="tokens in a sequence (default: the preset's)")
    parser.add_argument("--lr", type=float, metavar="X", help="highest learning rate (default: the preset's)")
    parser.add_argument("--warmup", type=int, default=5, metavar="N", help="steps in which it is reached (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the weights and of the text's order (default: 0)")
    parser.add_argument("--fp32", action="store_true", help="no mixed precision (a CPU has none unless --bf16 asks for it)")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16, keep weights and optimizer in fp32 (the default on a GPU)")
    parser.add_argument("--activation-checkpointing", action="store_true", help="make each layer's activations again in backward")
    parser.add_argument(
        "--save-every", type=int, default=10, metavar="N", help="steps from checkpoint to checkpoint (default: %(default)s)"
    )
    parser.add_argument("--keep", type=int, default=2, metavar="N", help="checkpoints that are kept (default: %(default)s)")
    parser.add_argument("--other-versions", action="store_true", help=f"resume though the versions of {' or '.join(VERSIONS)} differ")
    parser.add_argument("--out", type=Path, default=Path("out/fsdp2"), metavar="DIR", help="results folder, shared by all processes")
    given = parser.parse_args(argv)
    if given.bf16 and given.fp32:
        parser.error("--bf16 and --fp32 exclude each other")
    for option in ("steps", "batch", "seq", "save_every", "keep"):
        value = getattr(given, option)
        if value is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} {value}: must be 1 or more")
    changes = {name: getattr(given, name) for name in ("steps", "batch", "seq") if getattr(given, name) is not None}
    preset = replace(PRESETS[given.preset], dtype=torch.float32, **changes)  # the weights' dtype; a step's is `bf16`
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if preset.batch % world:
        parser.error(f"--batch {preset.batch}: must be a multiple of the {world} processes, which share it evenly")
    return Options(
        given.model_type, preset, given.lr or preset.lr, given.warmup, given.seed, (gpu or given.bf16) and not given.fp32,
        given.activation_checkpointing, given.save_every, given.keep, given.other_versions, given.out,
    )  # fmt: skip


# --- processes --------------------------------------------------------------------------------------------------------------------------


@contextmanager
def processes() -> Iterator[torch.device]:
    """This process's device, in the group that torchrun describes; without torchrun, a group of one. A group that is there is used."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        # gloo beside NCCL: checkpoints are planned with tensors of the CPU.
        alone: dict[str, Any] = {}
        if "RANK" not in os.environ:
            alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", device_id=device if gpu else None, **alone)
    try:
        yield device
    finally:
        if ours:
            dist.destroy_process_group()


# --- model, schedule and text -----------------------------------------------------------------------------------------------------------


def sharded(options: Options, device: torch.device) -> PreTrainedModel:
    """The model: patched, then each layer sharded by itself.

    Every process makes the whole model for a moment, from one seed. For one that no single device holds: make and patch it on the meta
    device, shard it, `to_empty(device=device)`, and load the weights with torch.distributed.checkpoint.
    """
    torch.manual_seed(options.seed)
    model = causal_lm(options.preset, device, options.model_type)
    report = liger_patch.auto(model)  # <- the one line; it could follow fully_shard, but only whole weights can be proved with
    if dist.get_rank() == 0:
        (options.out / "patched.txt").write_text(f"{report}\n", encoding="utf-8")
    if options.activation_checkpointing:
        # Earlier releases of transformers know it by its second name alone.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    # Gradients are reduced in fp32: summed in bf16, they would lose more the more processes there are.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if options.bf16 else MixedPrecisionPolicy()
    for layer in (*model.base_model.layers, model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return model.train()


def lr_at(step: int, options: Options) -> float:
    """Linear to the top, then a cosine to a tenth of it: a function of the step, so that there is no state to save."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.preset.steps - options.warmup)
    return options.lr * (0.55 + 0.45 * math.cos(math.pi * done))


class Windows:
    """The text, cut into sequences, in an order of each epoch's own: `position` is how many all processes together have taken."""

    def __init__(self, tokens: Tensor, seq: int, seed: int) -> None:
        self.position = 0
        self._sequences = tokens[: len(tokens) // seq * seq].view(-1, seq)
        self._seed = seed
        self._order = (-1, tokens[:0])  # an epoch, and its permutation

    def take(self, count: int, rank: int, world: int) -> Tensor:
        """This process's part `[count / world, seq]` of the next `count` sequences."""
        each = count // world
        mine = range(self.position + rank * each, self.position + (rank + 1) * each)
        self.position += count
        return torch.stack([self._sequences[self._at(i)] for i in mine]).long()

    def _at(self, i: int) -> Tensor:
        epoch, within = divmod(i, len(self._sequences))
        if self._order[0] != epoch:
            # torch's generator of a CPU reads 32 bits of its seed: two numbers have to share them.
            generator = torch.Generator().manual_seed((1_000_003 * self._seed + epoch) % 2**32)
            self._order = epoch, torch.randperm(len(self._sequences), generator=generator)
        return self._order[1][within]


# --- checkpoints ------------------------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of the packages in VERSIONS, without what names a build (2.11.0+cu130 is 2.11.0)."""
    return {name: metadata.version(name).split("+")[0] for name in VERSIONS}


def latest(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end."""
    complete = [path for path in folder.glob("step-*") if path.suffix != PARTIAL]
    return max(complete, default=None, key=lambda path: path.name)


def save(folder: Path, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer, text: Windows, options: Options) -> None:
    """Write under another name, and rename when every process is done: what has the name of a checkpoint is whole."""
    final = folder / f"step-{step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    first = dist.get_rank() == 0
    if first:
        for left in folder.glob(f"*{PARTIAL}"):  # by a run that was killed while it wrote
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    write_sharded({"model": weights, "optimizer": moments}, checkpoint_id=partial)
    if first:
        about = {"step": step, "position": text.position, "versions": versions(), "options": options.losses_depend_on()}
        (partial / "run.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        partial.rename(final)
        for old in sorted(path for path in folder.glob("step-*") if path.suffix != PARTIAL)[: -options.keep]:
            shutil.rmtree(old)
    dist.barrier()


def check(checkpoint: Path, about: dict[str, Any], options: Options) -> None:
    """Refuse a checkpoint whose losses this run would not continue."""
    now = json.loads(json.dumps(options.losses_depend_on()))
    changed = {name: (was, now[name]) for name, was in about["options"].items() if now[name] != was}
    if changed:
        differ = ", ".join(f"{name} was {was} and is {value}" for name, (was, value) in changed.items())
        raise CannotResume(f"{checkpoint} is of another training: {differ}. Give the options it was begun with, or another --out.")
    other = {name: (was, versions()[name]) for name, was in about["versions"].items() if versions()[name] != was}
    if other and not options.other_versions:
        differ = ", ".join(f"{name} {was}, and this is {value}" for name, (was, value) in other.items())
        install = " ".join(f"'{name}=={was}'" for name, (was, _) in other.items())
        raise CannotResume(
            f"{checkpoint} was written with {differ}: a step may compute another loss. Go on with what it was begun with "
            f"(pip install {install}), or accept that with --other-versions."
        )


def resume(checkpoint: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, text: Windows, options: Options) -> int:
    """Load a checkpoint into what was just made, and return the steps that are done."""
    about = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
    check(checkpoint, about, options)
    weights, moments = get_state_dict(model, optimizer)
    read_sharded({"model": weights, "optimizer": moments}, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    text.position = about["position"]
    return int(about["step"])


def forget(path: Path, done: int) -> None:
    """Leave in the file of losses what belongs to the `done` steps alone: those after a checkpoint are made again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if done else []
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= done), encoding="utf-8")


# --- training ---------------------------------------------------------------------------------------------------------------------------


def train(options: Options, device: torch.device, console: Console) -> None:
    """All steps that are not done yet."""
    preset, rank, world = options.preset, dist.get_rank(), dist.get_world_size()
    first, losses = rank == 0, options.out / "losses.jsonl"
    found = latest(options.out / "checkpoints")
    if first:
        options.out.mkdir(parents=True, exist_ok=True)
        if found is None:
            prepare(preset, options.out / "corpus")
    dist.barrier()
    text = Windows(torch.load(options.out / "corpus/tokens.pt"), preset.seq, options.seed)
    model = sharded(options, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    done = resume(found, model, optimizer, text, options) if found else 0
    if first:
        forget(losses, done)

    with Display(console) as display, losses.open("a", encoding="utf-8") if first else open(os.devnull, "w") as log:
        size = sum(p.numel() for p in model.parameters())
        if first:
            begun = f"from {found}, {done} steps done" if found else "from random weights"
            precision = "bf16" if options.bf16 else "fp32"
            display.say(f"{options.model_type}, {size / 1e6:,.1f} M parameters, {precision}, {world} process(es) on {device.type}, {begun}")
        on_step = display.run("pretraining", preset)
        kept: list[Tensor] = []
        started, timed = time.perf_counter(), done
        for step in range(done, preset.steps):
            ids = text.take(preset.batch, rank, world).to(device)
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, options)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            kept.append(torch.stack([loss.detach(), norm.full_tensor()]))
            saves = (step + 1) % options.save_every == 0 or step + 1 == preset.steps
            if saves or step % preset.every == 0:
                # Reading a loss makes the host wait for the device: many at once. Every process has as many tokens, so their mean is it.
                figures = torch.stack(kept)
                dist.all_reduce(figures)
                for back, (mean, length) in enumerate((figures / world).tolist(), start=step + 2 - len(kept)):
                    log.write(json.dumps({"step": back, "loss": mean, "grad_norm": length, "lr": lr_at(back - 1, options)}) + "\n")
                log.flush()
                kept.clear()
                if first:
                    on_step(step + 1, mean)
            if saves:
                save(options.out / "checkpoints", step + 1, model, optimizer, text, options)
            if step == done:  # the first one compiles kernels
                started, timed = time.perf_counter(), step + 1
        if first and done < preset.steps:
            speed = (preset.steps - timed) * preset.batch * preset.seq / (time.perf_counter() - started)
            memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB peak on a device" if device.type == "cuda" else ""
            display.say(f"{speed:,.0f} tokens/s with checkpoints{memory}; losses in {losses}")


def main(argv: Sequence[str] | None = None) -> int:
    """Train to the end; 0 if it was reached, 2 if the checkpoint in --out is not one to continue."""
    options = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        with processes() as device:
            train(options, device, console)
    except CannotResume as error:
        if int(os.environ.get("RANK", "0")) == 0:
            console.print(f"fsdp2_pretrain: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
