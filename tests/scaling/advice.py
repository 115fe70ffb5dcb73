"""Which strategy when: sentences, each with the number that it follows from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .choose import BATCHES, GPUS, MOST_TOKENS, SEQ, SMALL, WORLDS, choices
from .plan import DDP, FSDP, GIB, MIXED, ZERO1, ZERO2, Plan, memory
from .shapes import OURS, STOCK, Shape
from .terms import Key, Terms
from .traffic import LINKS, Message, messages, step

Known = dict[Key, Terms]


def lines(terms: Known, shapes: Sequence[Shape]) -> list[str]:
    """The list of the page."""
    rules = (_shard, _stages, _replicas, _tensor, _batch, _checkpoint, _reshard, _tokens, _head, _stock, _links)
    return [text for rule in rules for text in rule(terms, shapes)]


def _whole(terms: Known, shapes: Sequence[Shape], who: str = OURS) -> list[Terms]:
    return [terms[s.name, 1, who] for s in shapes if (s.name, 1, who) in terms]


def _shard(terms: Known, shapes: Sequence[Shape]) -> Iterator[str]:
    need = [f"{s.name} {s.parameters() * (MIXED.state + MIXED.gradient) / GIB:,.0f} GiB" for s in shapes]
    least = []
    for s in shapes:
        fits = [w for w in (2**n for n in range(13)) if choices(terms, s.name, OURS, w, GPUS[SMALL])]
        least.append(f"{s.name} from {min(fits):,} GPUs" if fits else f"{s.name} on none")
    yield (
        f"**Shard the weights** (FSDP2): with AdamW in fp32 they are 16 bytes a parameter, {', '.join(need)}. It trains in 80 GiB: "
        f"{', '.join(least)}."
    )


def _stages(terms: Known, shapes: Sequence[Shape]) -> Iterator[str]:
    names = {DDP: "nothing (DDP)", ZERO1: "the optimizer (ZeRO-1)", ZERO2: "gradients too (ZeRO-2)", FSDP: "weights too (FSDP2)"}
    for t in _whole(terms, shapes)[:1]:
        plans = {stage: Plan(1 if stage == DDP else 64, 64 if stage == DDP else 1, 1, 1, SEQ, stage=stage) for stage in names}
        said = [f"{names[stage]} {memory(plan, t).gib:.0f} GiB" for stage, plan in plans.items()]
        yield f"**What to shard**: {t.shape.name} on 64 ranks, {SEQ} tokens each, checkpointing; sharded is {', '.join(said)}."


def _replicas(terms: Known, shapes: Sequence[Shape]) -> Iterator[str]:
    """All ranks or a part of them."""
    world, said = max(WORLDS), []
    for t in _whole(terms, shapes):
        options = {n: Plan(n, world // n, 1, 1, SEQ // 2) for n in WORLDS}
        fit = {n: p for n, p in options.items() if memory(p, t).total <= GPUS[SMALL]}
        if len(fit) > 1:
            speeds = [f"{step(p, t).tokens_per_s:,.0f} over {n:,}" for n, p in fit.items()]
            said.append(f"{t.shape.name} {', '.join(speeds)}")
    if said:
        yield (
            f"**Shard over no more ranks than memory asks for, and replicate** (HSDP): on {world:,} GPUs, one sequence of {SEQ // 2} a "
            f"rank, tokens/s a GPU by the ranks that share the weights: {'; '.join(said)}."
        )


def _tensor(terms: Known, shapes: Sequence[Shape]) -> Iterator[str]:
    """What it costs, of equal tokens a GPU."""
    said = []
    for s in shapes:
        both = [terms.get((s.name, tp, OURS)) for tp in (1, 8)]
        if both[0] is not None and both[1] is not None:
            one, eight = (step(Plan(512 // tp, 1, tp, tp, SEQ), t).tokens_per_s for tp, t in zip((1, 8), both, strict=True) if t)
            said.append(f"{s.name} {one:,.0f} without, {eight:,.0f} with 8")
    if said:
        yield (
            f"**Tensor parallelism only where memory or the batch forces it**, and within a node: on 512 GPUs with {SEQ} tokens a GPU, "
            f"tokens/s a GPU: {'; '.join(said)}. Its all-reduces are waited for."
        )


def _batch(terms: Known, shapes: Sequence[Shape]) -> Iterator[str]:
    world, ranks, said = max(WORLDS), MOST_TOKENS // SEQ, []
    for s in shapes:
        short = [
            (f"{step(p, t).tokens_per_s:,.0f} without", p)
            for t in _whole(terms, [s])
            for p in (Plan(64, world // 64, 1, 1, SEQ // 2, c) for c in (False, True))
            if memory(p, t).total <= GPUS[SMALL]
        ][:1]
        cut = choices(terms, s.name, OURS, world, GPUS[SMALL])[:1]
        if short and cut:
            said.append(f"{s.name} {short[0][0]}, {cut[0].step.tokens_per_s:,.0f} with {cut[0].plan.tp}")
    yield (
        f"**The batch in tokens decides at the top**: one sequence of {SEQ} on each of {world:,} ranks is {world * SEQ / 2**20:.0f} Mi "
        f"tokens a step. Within {MOST_TOKENS / 2**20:.0f} Mi, beyond {ranks:,} GPUs either sequences are shorter or ranks share one "
        f"(tensor parallelism); replicas do not help. On {world:,}, tokens/s a GPU of {SEQ // 2} without and {SEQ} with it: "
        f"{'; '.join(said) or 'neither fits'}."
    )


def _checkpoint(terms: Known, shapes: Sequence[Shape]) -> Iterator[str]:
    said = []
    for t in _whole(terms, shapes):
        plan = Plan(512, 1, 1, 1, SEQ)
        slow, fast = (step(replace(plan, checkpointing=c), t).tokens_per_s for c in (True, False))
        more, less = (memory(replace(plan, checkpointing=c), t).gib for c in (False, True))
        said.append(f"{t.shape.name} {more:.0f} GiB become {less:.0f} for {1 - slow / fast:.0%} of tokens/s")
    if said:
        yield f"**Checkpoint when activations do not fit, not before**: 512 ranks, {SEQ} tokens each: {'; '.join(said)}."


def _reshard(terms: Known, shapes: Sequence[Shape]) -> Iterator[str]:
    said = []
    for t in _whole(terms, shapes):
        plan = Plan(64, 1, 1, 1, SEQ)
        keep = replace(plan, reshard=False)
        sent = [sum(m.bytes for m in messages(p, t)) / GIB for p in (plan, keep)]
        need = [memory(p, t).gib for p in (plan, keep)]
        said.append(f"{t.shape.name} sends {sent[0]:.0f} or {sent[1]:.0f} GiB a step and needs {need[0]:.0f} or {need[1]:.0f} GiB")
    if said:
        yield (
            "**Let weights stay after forward (`reshard_after_forward=False`) only where what is sent is not hidden**: 64 ranks, "
            f"resharded or not: {'; '.join(said)}."
        )


def _tokens(terms: Known, shapes: Sequence[Shape]) -> Iterator[str]:
    """The least that hides FSDP."""
    said = []
    for t in _whole(terms, shapes):
        enough = [n for n in range(512, 65536, 512) if _hidden(Plan(64, 1, 1, 1, n), t)]
        said.append(f"{t.shape.name} {enough[0]:,}" if enough else f"{t.shape.name} more than 64K")
    if said:
        least = ", ".join(said)
        yield f"**Give each rank enough tokens to hide FSDP between nodes**: with checkpointing, on 64 ranks, {least} tokens or more."


def _hidden(plan: Plan, t: Terms) -> bool:
    forward, backward = t.layer(plan.checkpointing).ms(plan.tokens, min(plan.seq, 4096))
    each = {when: sum(m.ms(LINKS) for m in messages(plan, t) if m.when == when) / t.shape.layers for when in ("forward", "backward")}
    return each["forward"] <= forward and each["backward"] <= backward


def _head(terms: Known, shapes: Sequence[Shape]) -> Iterator[str]:
    said = []
    for s in shapes:
        tp = max(tp for name, tp, _ in terms if name == s.name)
        at = {who: terms[s.name, tp, who].head_peak.at(SEQ) / GIB for who in (STOCK, OURS)}
        sent = {who: sum(m.bytes for m in _of_head(Plan(8, 1, tp, 1, SEQ), terms[s.name, tp, who])) for who in (STOCK, OURS)}
        said.append(
            f"{s.name} sends {sent[OURS] / 2**20:,.0f} MiB and needs {at[OURS]:.2f} GiB; gathered logits {sent[STOCK] / 2**20:,.0f} MiB"
        )
    yield f"**Under tensor parallelism split the head along the vocabulary**: {SEQ} tokens, of a rank of 8: {'; '.join(said)}."


def _of_head(plan: Plan, t: Terms) -> list[Message]:
    return [m for m in messages(plan, t) if m.what in ("logits", "loss: statistics", "loss: gradient of the hidden states")]


def _stock(terms: Known, shapes: Sequence[Shape]) -> Iterator[str]:
    """What patching allows on the same GPUs."""
    said = []
    for s in shapes:
        found = {who: choices(terms, s.name, who, 64, GPUS[SMALL]) for who in (STOCK, OURS)}
        if all(found.values()):
            a, b = (found[who][0] for who in (STOCK, OURS))
            most = {who: max((c.plan.batch for c in cs if c.plan.tp == b.plan.tp), default=0) for who, cs in found.items()}
            said.append(
                f"{s.name} {a.step.tokens_per_s:,.0f} and {b.step.tokens_per_s:,.0f} tokens/s a GPU at its best, "
                f"at most {most[STOCK]} and {most[OURS]} sequences a rank (of {max(BATCHES)} tried)"
            )
    if said:
        yield f"**Patch first**: on 64 GPUs of 80 GiB, stock and patched: {'; '.join(said)}."


def _links(terms: Known, shapes: Sequence[Shape]) -> Iterator[str]:
    """How much hangs on the assumption."""
    full, half, said = LINKS, replace(LINKS, inside=LINKS.inside / 2, between=LINKS.between / 2), []
    for s in shapes:
        for world in (512,):
            best = [choices(terms, s.name, OURS, world, GPUS[SMALL], cluster) for cluster in (full, half)]
            if all(best):
                same = "the same plan" if best[0][0].plan == best[1][0].plan else "another plan"
                said.append(f"{s.name} {best[0][0].step.tokens_per_s:,.0f} become {best[1][0].step.tokens_per_s:,.0f} by {same}")
    if said:
        yield f"**If links reach half of their data sheets**, on 512 GPUs, tokens/s a GPU: {'; '.join(said)}."
