"""What the page says whatever was measured."""

from __future__ import annotations

from collections.abc import Sequence

from .choose import MOST_TOKENS, USABLE
from .measure import LONG
from .traffic import LINKS, STATISTICS, TP_AGAIN, TP_BACKWARD, TP_FORWARD


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)) + "\n"


_REDUCES = TP_FORWARD + TP_BACKWARD

HEAD = """# Scaling: which plan, on how many GPUs

What a training step is made of was measured on one GPU; what a rank of 8 to 4096 needs and sends is computed from it. No cluster was
measured. Made by `python -m tests.scaling report` from what `python -m tests.scaling measure` found on the machine named here; edit
`tests/scaling`, not this page.
"""

_ASSUMED = (
    (f"within a node of {LINKS.node} GPUs, NVLink 4", f"{LINKS.inside:g} GB/s each way for each GPU (data sheet: 900 both ways)"),
    (
        "between nodes, InfiniBand NDR",
        f"{LINKS.between:g} GB/s each way for each GPU (data sheet: 400 Gb/s; an adapter each); a group with n ranks in each node uses n",
    ),
    (
        "a hop within a node, between nodes",
        f"{LINKS.inside_hop:g} µs, {LINKS.between_hop:g} µs; all-gather and reduce-scatter go round a ring, all-reduce up and down a tree",
    ),
    (
        "overlap",
        "FSDP's gathers and reductions behind the layers' computation, but for the first and the last; tensor parallelism's not at all",
    ),
    ("room", f"{USABLE:.0%} of a GPU's memory: the rest for communication's buffers, CUDA's context, memory in pieces"),
    ("tokens a step", f"at most {MOST_TOKENS / 2**20:.0f} Mi, on however many GPUs"),
)

MEASURED = f"""## What is measured, and what is assumed

**Measured**, stock and after `liger_patch.auto`, bf16, SDPA, by events on the device and PyTorch's count of allocated bytes: time and
memory of a layer, with and without checkpointing, as half the difference between three layers and one; of logits and loss, by a model
without layers, at three numbers of tokens; of the embedding; of fused AdamW, for each parameter. A sequence of {LONG:,} tokens beside those
of 4096 tells attention's quadratic part. A rank of tensor parallelism computes what a layer with fewer heads and columns computes, and is
measured as that; the stock head as a whole, since stock ranks gather their logits (of its products a rank does a part, and all are
counted: a few percent of a step too slow). Between measurements lines are straight; beyond the last, they go on.

**Counted** in the code that sends it, over a process group that moves nothing (`tests/test_scaling.py`): the bytes of FSDP2's shards and
collectives, the {TP_FORWARD} + {TP_BACKWARD} all-reduces of a layer under tensor parallelism (forward: after attention and MLP; backward:
for q, k, v, gate and up each; {TP_AGAIN} more where it is recomputed), and what the loss over a sharded vocabulary sends.

**Assumed**, from public data sheets or by us, and not measured here:

{table(("what", "value"), _ASSUMED)}
Links at their data sheets' speed and computation that nothing disturbs make tokens/s here too high; what waits for tensor parallelism,
which async schemes hide in part, makes it too low.
"""

_MEMORY = (
    (
        "(4 + 8) (L p + R) / N",
        "fp32 weights and AdamW's moments, as in `examples/fsdp2_pretrain.py`; a matrix's rows divided, rounded up",
    ),
    ("2 R + 2 · 2 p", "bf16 weights that are gathered: the root's all the time, of layers the one at work and the next"),
    ("4 p + 4 L p / N", "a layer's gradients in fp32 on their way, and those that have been reduced"),
    (
        "L · kept · T + peak(T)",
        "activations: what a layer keeps, and what a layer's backward needs beyond it, its bf16 gradients too (measured)",
    ),
    ("head(T)", "logits, loss and the output layer's gradient (measured)"),
    (
        "2 P + (4 + 8) P / N, and 2 P or 4 P / N",
        "instead, with P all parameters: ZeRO-1 and ZeRO-2, whose bf16 weights are whole; gradients last",
    ),
    ("(2 + 4) R", "at the end: the root's gradients in bf16, and in fp32 on their way"),
)
_SENT = (
    ("2 · 2 L p (N−1)/N", "FSDP2: weights gathered in forward and again in backward; once, if they stay"),
    ("4 L p (N−1)/N", "FSDP2: gradients, reduced and scattered in fp32"),
    ("2 · 4 (L p + R)/N · (M−1)/M", "replicas (HSDP): gradients of the shard, all-reduced"),
    (f"({_REDUCES} or {_REDUCES + TP_AGAIN}) L · 2 (t−1)/t · 2 T H", "tensor parallelism of degree t, without and with checkpointing"),
    (f"{STATISTICS} T (t−1)", "the loss over a sharded vocabulary: four fp32 numbers a token, and no logits"),
    ("2 (t−1)/t · 4 T H", "of the same, the gradient of the hidden states, summed in fp32"),
)

FORMULAS = f"""## The formulas

Of a rank: p are the parameters of a layer and R those of embedding, last norm and output layer, on a rank of tensor parallelism; L layers;
N ranks share the weights, M are the replicas of such groups; T tokens a rank, H the hidden size.

{table(("memory, bytes", "what it is"), _MEMORY)}
A step's peak is the largest of four moments: the loss; the last layer's backward, when all activations are there; the first's, when
gradients are; the embedding's gradient.

{table(("sent by a rank in a step, bytes", "what it is"), _SENT)}
Time: each layer's computation or what is sent behind it, whichever is longer; and what nothing hides.
"""
