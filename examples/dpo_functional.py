"""Direct preference optimisation over `liger_fn.linear_log_prob`: the loss is `dpo` below, and nobody ever holds a logit.

    python examples/dpo_functional.py            # seconds on a CPU; on a GPU with a vocabulary of 128,256
    python examples/dpo_functional.py --help

A preference loss needs one number of each sequence: how probable its answer is. `linear_log_prob` gives that of each token from the
hidden states and the head's weight, chunk by chunk; all else is plain PyTorch, to change as you like (IPO, SimPO and others differ from
DPO in the last line of `dpo`). The preferences here are made of the standard library's sources: the text as it goes on, and the same
tokens shuffled. A reference head of a frozen copy says what the model thought before.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

import liger_fn
import liger_patch
from _corpus import batches, prepare
from _model import causal_lm
from _options import add_sizes, sized
from _presets import Preset
from _progress import Display

IGNORED = -100  # the label of a token that is not of the answer


class Figures(NamedTuple):
    """What is known of a batch of preferences, each a mean over its pairs."""

    loss: Tensor
    accuracy: Tensor  # of the pairs whose chosen answer has the higher reward
    margin: Tensor  # between the rewards, in nats times beta


def log_prob(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """log p(answer | prompt) of each sequence `[N, T]`: `[N]`, in nats. Tokens whose label is IGNORED are the prompt's, or padding."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[operator]
    each, _ = liger_fn.linear_log_prob(hidden, model.lm_head.weight, labels, shift=True)  # type: ignore[union-attr, arg-type]
    return each.sum(-1)


def dpo(policy: nn.Module, reference: nn.Module, ids: Tensor, labels: Tensor, beta: float) -> Figures:
    """`−log σ(β (chosen − rejected))` of pairs: the first half of `ids` is chosen, the second half, in the same order, rejected.

    Each side is by how much more probable the policy finds the answer than the reference does. Rafailov et al. 2023, arXiv:2305.18290.
    """
    with torch.no_grad():
        before = log_prob(reference, ids, labels)
    chosen, rejected = (beta * (log_prob(policy, ids, labels) - before)).chunk(2)
    margin = chosen - rejected
    return Figures(-F.logsigmoid(margin).mean(), (margin > 0).float().mean(), margin.mean())


def pairs(text: Iterator[Tensor], prompt: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`(ids, labels)` of `2 B` sequences from each `B` of the text: as they are, and with the tokens after the prompt shuffled."""
    generator = torch.Generator().manual_seed(seed)
    for chosen in text:
        order = torch.randperm(chosen.shape[1] - prompt, generator=generator).to(chosen.device) + prompt
        ids = torch.cat([chosen, torch.cat([chosen[:, :prompt], chosen[:, order]], 1)])
        yield ids, ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) < prompt, IGNORED)


def build(preset: Preset, device: str) -> PreTrainedModel:
    """The policy. liger_patch sees to its layers, `log_prob` to its head."""
    model = causal_lm(preset, device).train()
    liger_patch.auto(model)
    return model


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, print the figures, and return the losses."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add_sizes(parser, "dpo", "1b" if gpu else "tiny")
    parser.add_argument("--beta", type=float, default=0.1, metavar="X", help="how dear it is to leave the reference (default: %(default)s)")
    given = parser.parse_args(argv)
    if not (math.isfinite(given.beta) and given.beta > 0):
        parser.error(f"--beta {given.beta}: must be above 0")
    preset = sized(parser, given)

    device = "cuda" if gpu else "cpu"
    torch.manual_seed(given.seed)
    policy = build(preset, device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=preset.lr / 10, fused=True)
    losses: list[Tensor] = []
    with Display(Console(width=None if sys.stdout.isatty() else 110)) as display:
        corpus = prepare(preset, given.out / "corpus")
        display.say(f"{preset.batch} preferences of 2 × {preset.seq} tokens a step, {preset.head:,} words, {preset.dtype}, {device}")
        on_step, started = display.run("dpo", preset), 0.0
        text = batches(corpus.folder, preset, given.seed, device)
        for n, (ids, labels) in enumerate(pairs(text, preset.seq // 4, given.seed), start=1):
            figures = dpo(policy, reference, ids, labels, given.beta)
            figures.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(figures.loss.detach())
            if (n - 1) % preset.every == 0 or n == preset.steps:  # reading a loss makes the host wait for the device
                on_step(n, losses[-1].item())
            started = started or time.perf_counter()  # after the first step, which compiles kernels
        accuracy, margin = figures.accuracy.item(), figures.margin.item()
        speed = (preset.steps - 1) * 2 * preset.batch * preset.seq / (time.perf_counter() - started)
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB peak" if gpu else ""
        display.say(
            f"loss {losses[0].item():.4f} → {losses[-1].item():.4f}; in the last batch {accuracy:.0%} of the pairs are told apart, "
            f"by {margin:.3f}; {speed:,.0f} tokens/s{memory}"
        )
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    main()
