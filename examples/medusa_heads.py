"""Several heads over a frozen trunk, each of which predicts a token further ahead: the loss of each without its logits.

    python examples/medusa_heads.py                      # seconds on a CPU; on a GPU five heads of 128,256 words over Llama-1B shapes
    python examples/medusa_heads.py --loss stock         # the same by F.cross_entropy over logits, to compare memory and speed
    python examples/medusa_heads.py --help

Head i (the first is 1) sees the hidden state of token t and predicts token t + 1 + i; the model's own head keeps predicting t + 1. With H
heads, stock training holds H times the logits, and their gradients, of one model: here `linear_cross_entropy` holds none, and targets
that lie beyond the sequence's end cost nothing. Cai et al. 2024, arXiv:2401.10774 (Medusa-1: the trunk learns nothing).
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaModel

import liger_fn
import liger_patch
from _corpus import batches, prepare
from _model import config_of
from _options import add_sizes, sized
from _presets import Preset
from _progress import Display

IGNORED = -100  # the target of a position whose token lies beyond the sequence
DECAY = 0.8  # each head's loss counts for so much of the one before: what is further ahead is known less

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden states [B, T, D], a head's weight [V, D] and targets [B, T]


def stock(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Logits, in fp32 as transformers makes them, and their cross entropy."""
    return F.cross_entropy(F.linear(x, weight).float().flatten(0, -2), target.flatten(), ignore_index=IGNORED)


def fused(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The same, chunk by chunk."""
    return liger_fn.linear_cross_entropy(x, weight, target, ignore_index=IGNORED)


LOSSES: dict[str, Loss] = {"fused": fused, "stock": stock}


def ahead(ids: Tensor, by: int) -> Tensor:
    """The token `by` places on from each, `[B, T]`; IGNORED where there is none."""
    return F.pad(ids[:, by:], (0, min(by, ids.shape[1])), value=IGNORED)


class Head(nn.Module):
    """One residual block, which begins as the identity, and a projection to the vocabulary, which begins as the model's own."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        vocabulary, width = weight.shape
        self.block = nn.Linear(width, width, dtype=weight.dtype, device=weight.device)
        self.project = nn.Linear(width, vocabulary, bias=False, dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            self.block.weight.zero_()
            self.block.bias.zero_()
            self.project.weight.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """What the projection reads, `[B, T, D]`: the loss takes it from there, with `project.weight`."""
        return x + F.silu(self.block(x))


def medusa_loss(heads: nn.ModuleList, x: Tensor, ids: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """The weighted sum of all heads' losses, and each head's, from the trunk's hidden states."""
    each = torch.stack(
        [loss(head(x), head.project.weight, ahead(ids, 1 + i)) for i, head in enumerate(heads, start=1)]  # type: ignore[union-attr, arg-type]
    )
    return (each * DECAY ** torch.arange(len(each), device=x.device)).sum(), each.detach()


def build(preset: Preset, count: int, device: str) -> tuple[LlamaModel, nn.ModuleList]:
    """A frozen trunk with random weights, where yours would come from `from_pretrained`, and new heads."""
    with torch.device(device):
        trunk = LlamaModel(config_of(preset)).to(preset.dtype).requires_grad_(False).eval()
        heads = nn.ModuleList(Head(trunk.embed_tokens.weight) for _ in range(count))
    liger_patch.auto(trunk)
    return trunk, heads


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train the heads, print the figures, and return the losses of all heads together."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--loss", default="fused", choices=LOSSES, help="how a head's loss is made (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=5, metavar="N", help="heads (default: %(default)s)")
    add_sizes(parser, "medusa", "1b" if gpu else "tiny")
    given = parser.parse_args(argv)
    if given.heads < 1:
        parser.error(f"--heads {given.heads}: must be 1 or more")
    preset = sized(parser, given)

    device = "cuda" if gpu else "cpu"
    torch.manual_seed(given.seed)
    trunk, heads = build(preset, given.heads, device)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=preset.lr, fused=True)
    losses: list[Tensor] = []
    with Display(Console(width=None if sys.stdout.isatty() else 110)) as display:
        corpus = prepare(preset, given.out / "corpus")
        tokens = preset.batch * preset.seq
        logits = given.heads * tokens * preset.head * 4 / 2**30
        display.say(
            f"{given.heads} heads of {preset.head:,} words, {preset.batch} × {preset.seq} tokens a step, {preset.dtype}, {device}; "
            f"all logits in fp32 would take {logits:,.2f} GiB"
        )
        on_step, started = display.run(given.loss, preset), 0.0
        for n, ids in enumerate(batches(corpus.folder, preset, given.seed, device), start=1):
            with torch.no_grad():
                x = trunk(input_ids=ids, use_cache=False).last_hidden_state
            loss, each = medusa_loss(heads, x, ids, LOSSES[given.loss])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if (n - 1) % preset.every == 0 or n == preset.steps:  # reading a loss makes the host wait for the device
                on_step(n, losses[-1].item())
            started = started or time.perf_counter()  # after the first step, which compiles kernels
        last = ", ".join(f"{value:.3f}" for value in each.tolist())
        speed = (preset.steps - 1) * tokens / (time.perf_counter() - started)
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB peak" if gpu else ""
        display.say(f"loss {losses[0].item():.4f} → {losses[-1].item():.4f}, of each head {last}; {speed:,.0f} tokens/s{memory}")
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    main()
