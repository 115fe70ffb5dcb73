"""A plan of training, and the memory that each of its ranks needs: sums over what was measured and what is stored.

Ranks are laid out tensor-parallel ones next to each other, then those that share the weights, then replicas of those.
"""

from __future__ import annotations

from dataclasses import dataclass

from .terms import Terms

DDP, ZERO1, ZERO2, FSDP = 0, 1, 2, 3  # stages: what is sharded is nothing, the optimizer, gradients too, weights too
GIB = 2**30
PARTS = ("parameters", "gathered weights", "gradients", "optimizer", "activations", "head")


@dataclass(frozen=True)
class Policy:
    """Bytes of one parameter in each of its roles."""

    name: str
    weight: int  # what the optimizer steps over
    moments: int
    gradient: int  # once it is reduced
    compute: int  # of weights and gradients in forward and backward
    reduce: int  # on its way between ranks
    optimizer: str  # dtype of the weights it steps over

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.weight + self.moments


MIXED = Policy("fp32 weights, bf16 compute", 4, 8, 4, 2, 4, "float32")
BF16 = Policy("bf16", 2, 4, 2, 2, 2, "bfloat16")


@dataclass(frozen=True)
class Plan:
    """How a step is spread: `shard` ranks have one copy of what the stage shards, `replicas` such groups, `tp` ranks one layer."""

    shard: int = 1
    replicas: int = 1
    tp: int = 1
    batch: int = 1  # of each group of `tp` ranks
    seq: int = 4096
    checkpointing: bool = True
    stage: int = FSDP
    reshard: bool = True  # weights are dropped after forward and gathered again in backward
    policy: Policy = MIXED

    def __post_init__(self) -> None:
        for name in ("shard", "replicas", "tp", "batch", "seq"):
            if getattr(self, name) < 1:
                raise ValueError(f"Plan: {name} must be 1 or more, got {getattr(self, name)}")
        if self.stage not in (DDP, ZERO1, ZERO2, FSDP):
            raise ValueError(f"Plan: stage must be DDP (0), ZERO1, ZERO2 or FSDP (3), got {self.stage}")
        if self.stage == DDP and self.shard != 1:
            raise ValueError(f"Plan: DDP shards nothing, got shard={self.shard}; count its ranks as replicas")

    @property
    def world(self) -> int:
        return self.shard * self.replicas * self.tp

    @property
    def tokens(self) -> int:
        """Of each rank."""
        return self.batch * self.seq

    @property
    def tokens_a_step(self) -> int:
        """Of all ranks."""
        return self.tokens * self.shard * self.replicas


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at one moment of a step."""

    moment: str
    parameters: float
    gathered: float
    gradients: float
    optimizer: float
    activations: float
    head: float

    @property
    def parts(self) -> dict[str, float]:
        values = (self.parameters, self.gathered, self.gradients, self.optimizer, self.activations, self.head)
        return dict(zip(PARTS, values, strict=True))

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def gib(self) -> float:
        return self.total / GIB


def moments(plan: Plan, terms: Terms) -> tuple[Memory, ...]:
    """The moments of a step at which a rank can need most.

    Between the last layer's backward and the first's, activations fall and gradients grow by as much for each layer: one of the ends is
    the larger. A layer's gradients before they are reduced are in its `peak`, the output layer's in `head_peak`.
    """
    shape, p, t = terms.shape, plan.policy, plan.tokens
    layer, root, head = shape.layer(plan.tp), shape.root(plan.tp), shape.head(plan.tp)
    mine = shape.parameters(plan.tp, plan.shard)
    sharded = plan.stage == FSDP
    parameters, optimizer = p.weight * mine, p.moments * mine
    if not sharded:  # the whole weights compute, beside those that the optimizer steps over or as them
        whole_too = p.compute * shape.parameters(plan.tp)
        parameters = whole_too + (parameters if p.weight != p.compute else 0)

    def gathered(layers: int) -> float:
        """Of the root, and of as many layers as are whole at once."""
        return p.compute * (root + layers * layer) if sharded else 0.0

    def reduced(layers: int) -> float:
        return p.gradient * layers * shape.layer(plan.tp, plan.shard) if plan.stage >= ZERO2 else p.compute * layers * layer

    each = terms.layer(plan.checkpointing)
    stream = p.compute * t * shape.hidden  # what the last layer hands on, and the gradient of it
    in_flight = p.reduce * layer if plan.stage >= ZERO2 else 0.0  # of the layer before, on its way
    whole = min(2, shape.layers)  # layers: the one at work, and the next on its way
    grads_of_head = p.compute * head
    kept, peak = each.kept * t, each.peak.at(t)
    keep_all = sharded and not plan.reshard
    L = shape.layers
    on_way = (p.reduce * root if plan.stage >= ZERO2 else 0.0) + p.compute * (head + shape.embedding)
    return (
        Memory("head", parameters, gathered(L if keep_all else 1), 0.0, optimizer, L * kept + stream, terms.head_peak.at(t)),
        Memory(
            "last layer's backward", parameters, gathered(L if keep_all else whole), grads_of_head + in_flight, optimizer,
            L * kept + stream + peak, 0.0,
        ),
        Memory(
            "first layer's backward", parameters, gathered(whole), grads_of_head + in_flight + reduced(L - 1), optimizer,
            kept + stream + peak, 0.0,
        ),
        Memory("embedding's gradient", parameters, gathered(0), on_way + reduced(L), optimizer, stream, 0.0),
    )  # fmt: skip


def memory(plan: Plan, terms: Terms) -> Memory:
    """A rank's at the moment when it needs most."""
    return max(moments(plan, terms), key=lambda m: m.total)
