"""What the ranks of a plan send each other in a step, and how long a step takes at least."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from liger_fn._head import LEAST_BYTES, ROWS

from .plan import DDP, FSDP, ZERO1, ZERO2, Plan
from .shapes import OURS
from .terms import Terms

# All-reduces of the hidden states in one layer, as torch's and transformers' plans of tensor parallelism make them: after the attention and
# the MLP in forward; for q, k, v, gate and up each in backward; the first of forward's once more where it is recomputed.
TP_FORWARD, TP_BACKWARD, TP_AGAIN = 2, 5, 1
STATISTICS = 16  # bytes that the loss gathers of a token and rank: four numbers of fp32
GATHER, SCATTER, REDUCE = "all-gather", "reduce-scatter", "all-reduce"


@dataclass(frozen=True)
class Cluster:
    """Links between GPUs: assumptions, from public data sheets. GB/s each way, for each GPU; microseconds for each hop."""

    node: int = 8
    inside: float = 450.0  # NVLink 4: 900 GB/s both ways together
    between: float = 50.0  # InfiniBand NDR, 400 Gb/s, one adapter a GPU
    inside_hop: float = 1.0
    between_hop: float = 5.0

    def members(self, size: int, stride: int) -> int:
        """Of a group of ranks `stride` apart, how many are in one node."""
        return max(1, min(size, self.node // stride))

    def bandwidth(self, size: int, stride: int) -> float:
        """A group that is in several nodes goes through as many adapters as it has members in one."""
        members = self.members(size, stride)
        return self.inside if members == size else min(self.inside, members * self.between)

    def latency_us(self, kind: str, size: int, stride: int) -> float:
        """All-gather and reduce-scatter go round a ring, an all-reduce up and down a tree."""
        nodes = size // self.members(size, stride)
        if kind == REDUCE:
            return 2 * (ceil(log2(size // nodes)) * self.inside_hop + ceil(log2(nodes)) * self.between_hop)
        return (size - nodes) * self.inside_hop + (nodes if nodes > 1 else 0) * self.between_hop


LINKS = Cluster()


@dataclass(frozen=True)
class Message:
    """Collectives of one kind in a step. `bytes` are what a rank sends in all of them together."""

    what: str
    kind: str
    size: int  # of the group
    stride: int
    when: str  # forward, backward: behind the computation; ends: nothing to hide it behind; tp: waited for
    bytes: float
    count: int

    def ms(self, cluster: Cluster) -> float:
        sent = self.bytes / cluster.bandwidth(self.size, self.stride) / 1e6
        return sent + self.count * cluster.latency_us(self.kind, self.size, self.stride) / 1e3


def _message(what: str, kind: str, size: int, stride: int, when: str, whole: float, count: int) -> list[Message]:
    """Of `count` collectives over arrays that are `whole` bytes together: a rank sends all but its own part, to all-reduce twice."""
    sent = whole * (size - 1) / size * (2 if kind == REDUCE else 1)
    return [Message(what, kind, size, stride, when, sent, count)] if size > 1 else []


def messages(plan: Plan, terms: Terms) -> list[Message]:
    """All of a step, of one rank."""
    shape, p, L, t = terms.shape, plan.policy, terms.shape.layers, plan.tokens
    mine = L * shape.layer(plan.tp, plan.shard), shape.root(plan.tp, plan.shard)
    layers, root = (plan.shard * n for n in mine)  # rows that ranks do not share evenly are sent as if they did
    shard, copies = (plan.shard, plan.tp), (plan.replicas, plan.tp * plan.shard)
    found: list[Message] = []
    if plan.stage == FSDP:
        found += _message("weights, forward", GATHER, *shard, "forward", p.compute * layers, L)
        if plan.reshard:
            found += _message("weights, backward", GATHER, *shard, "backward", p.compute * layers, L)
        found += _message("root's weights", GATHER, *shard, "ends", p.compute * root, 1)
        found += _message("gradients", SCATTER, *shard, "backward", p.reduce * layers, L)
        found += _message("root's gradients", SCATTER, *shard, "ends", p.reduce * root, 1)
    elif plan.stage in (ZERO1, ZERO2):
        found += _message("gradients", SCATTER, *shard, "backward", p.reduce * layers, L)
        found += _message("root's gradients", SCATTER, *shard, "ends", p.reduce * root, 1)
        found += _message("weights after the step", GATHER, *shard, "ends", p.compute * (layers + root), L + 1)
    reduced = p.compute if plan.stage == DDP else p.reduce
    found += _message("replicas' gradients", REDUCE, *copies, "backward", reduced * layers / plan.shard, L)
    found += _message("replicas' gradients of the root", REDUCE, *copies, "ends", reduced * root / plan.shard, 1)
    tp, stream = (plan.tp, 1), p.compute * t * shape.hidden
    reduces = TP_FORWARD + TP_BACKWARD + (TP_AGAIN if plan.checkpointing else 0)
    found += _message("hidden states", REDUCE, *tp, "tp", L * reduces * stream, L * reduces)
    if terms.provider == OURS:
        chunks = ceil(t / chunk_rows(shape.vocab // plan.tp))
        found += _message("loss: statistics", GATHER, *tp, "tp", STATISTICS * t * plan.tp, chunks)
        found += _message("loss: gradient of the hidden states", REDUCE, *tp, "tp", 4 * t * shape.hidden, chunks)
    else:
        found += _message("logits", GATHER, *tp, "tp", p.compute * t * shape.vocab, 1)
        found += _message("gradient of the hidden states", REDUCE, *tp, "tp", stream, 1)
    return found


def chunk_rows(classes: int) -> int:
    """Tokens whose logits the loss makes at a time, at least."""
    return max(ROWS, LEAST_BYTES // (2 * classes))


@dataclass(frozen=True)
class Step:
    """A predicted step of one rank, in milliseconds, over links at what their data sheets say."""

    compute_ms: float
    exposed_ms: float  # communication that no computation hides
    hidden_ms: float  # and that some does
    tokens: float  # of the rank, its share where several have the same

    @property
    def ms(self) -> float:
        return self.compute_ms + self.exposed_ms

    @property
    def tokens_per_s(self) -> float:
        """Of one GPU."""
        return self.tokens / self.ms * 1e3


def step(plan: Plan, terms: Terms, cluster: Cluster = LINKS) -> Step:
    """FSDP's communication of a layer runs while the layer next to it computes; that of tensor parallelism is waited for."""
    shape, t, L = terms.shape, plan.tokens, terms.shape.layers
    forward, backward = terms.layer(plan.checkpointing).ms(t, plan.seq)
    stepped = shape.parameters(plan.tp) / plan.shard
    rest = terms.head_ms.at(t) + terms.embedding_ms.at(t) + stepped * terms.optimizer_ms[plan.policy.optimizer]
    compute = L * (forward + backward) + rest
    sent = messages(plan, terms)
    behind = {when: _longest([m for m in sent if m.when == when], cluster) for when in ("forward", "backward")}
    exposed = sum(m.ms(cluster) for m in sent if m.when in ("ends", "tp"))
    for when, one in (("forward", forward), ("backward", backward)):
        # The first layer's weights come before there is anything to compute, the last gradients go when nothing is left.
        each = behind[when] / L
        exposed += each + max(0.0, (L - 1) * (each - one))
    total = sum(m.ms(cluster) for m in sent)
    return Step(compute, exposed, max(0.0, total - exposed), t / plan.tp)


def _longest(sent: list[Message], cluster: Cluster) -> float:
    """Of what uses one kind of link, one after another; different links at the same time."""
    by_link: dict[float, float] = {}
    for m in sent:
        link = cluster.bandwidth(m.size, m.stride)
        by_link[link] = by_link.get(link, 0.0) + m.ms(cluster)
    return max(by_link.values(), default=0.0)
