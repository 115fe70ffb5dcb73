"""The plan past one GPU: its terms, its sums against what PyTorch shards and sends, and the page that says what is kept."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import liger_fn
from tests.engines import tensor_parallel
from tests.scaling import __main__ as command
from tests.scaling import check, choose, kept, measure, rank, report
from tests.scaling.kept import EMBEDDING, HEAD, OPTIMIZER, RANK, Piece, Pieces
from tests.scaling.measure import LONG, SEQ
from tests.scaling.plan import BF16, DDP, FSDP, MIXED, ZERO1, ZERO2, Plan, memory, moments
from tests.scaling.shapes import BY_NAME, LLAMA_8B, OURS, PROVIDERS, STOCK, Shape
from tests.scaling.terms import Curve, Terms, derive
from tests.scaling.traffic import SCATTER, Cluster, Message, messages, step

CPU, MACHINE = torch.device("cpu"), {"device": "a GPU", "date": "2026-01-01", "torch": "2.0", "sources": "none"}
FLOPS = 5e11  # a millisecond, of a GPU that is made up
TINY = Shape("tiny", hidden=32, mlp=60, layers=3, heads=4, kv_heads=4, head_dim=8, vocab=130)
FEW = 8  # ranks, that divide neither 60 rows nor 130


def made_up(piece: Piece) -> Piece:
    """A piece as a GPU would give it whose every quantity is a straight line."""
    if piece.what == OPTIMIZER:
        return replace(piece, parameters=10**9, backward_ms=10.0 if piece.dtype == "float32" else 5.0)
    shape, t = BY_NAME[piece.shape], piece.tokens
    if piece.what == EMBEDDING:
        return replace(piece, forward_ms=t * 1e-5, backward_ms=1.0)
    if piece.what == RANK:
        return replace(piece, peak=30 * 2**30)
    h, worse = shape.hidden, 1.5 if piece.provider == STOCK else 1.0
    if piece.what == HEAD:
        classes, whole = (
            shape.vocab // (piece.tp if piece.provider == OURS else 1),
            2 * shape.head(piece.tp if piece.provider == OURS else 1),
        )
        logits = t * classes * 12 if piece.provider == STOCK else 2**28
        ms = 2 * t * classes * h / FLOPS
        return replace(piece, forward_ms=ms, backward_ms=2 * ms, kept=logits // 2, forward_peak=logits, backward_peak=logits // 2 + whole)
    n, ms = piece.layers, worse * t * (2 * shape.layer(piece.tp) + 2 * piece.seq * shape.heads * shape.head_dim // piece.tp) / FLOPS
    each = t * (2 * h if piece.checkpointing else int(worse * (24 * h + 8 * shape.mlp // piece.tp)))
    peak = int(worse * t * (24 * h + 10 * shape.mlp // piece.tp)) + 2 * shape.layer(piece.tp)
    again = 1 if piece.checkpointing else 0
    return replace(
        piece, forward_ms=0.1 + n * ms, backward_ms=0.2 + n * (2 + again) * ms, kept=5 + n * each, forward_peak=n * each, backward_peak=peak
    )


def pieces() -> Pieces:
    every = [p for _, group in measure.wanted() for p in group] + measure.alone()
    return Pieces(MACHINE, tuple(made_up(p) for p in every))


@pytest.fixture(scope="module")
def terms() -> dict[tuple[str, int, str], Terms]:
    return derive(pieces())


def tiny_terms(like: Terms) -> Terms:
    return replace(like, shape=TINY)


# --- terms ------------------------------------------------------------------------------------------------------------------------------


def test_a_curve_is_straight_between_and_beyond_its_points() -> None:
    curve = Curve(((10, 1.0), (20, 3.0), (30, 3.0)))
    assert [curve.at(x) for x in (10, 15, 20, 25, 40, 5, 0)] == [1.0, 2.0, 3.0, 3.0, 3.0, 0.0, 0.0]
    assert Curve(((10, 4.0),)).at(5) == 2.0, "of one point, as much a token"


def test_terms_are_what_the_pieces_were_made_of(terms: dict[Any, Terms]) -> None:
    assert set(terms) == {(s.name, tp, who) for s in BY_NAME.values() for tp in s.tp for who in PROVIDERS}
    for (name, tp, who), t in terms.items():
        shape, worse = BY_NAME[name], 1.5 if who == STOCK else 1.0
        per_token = worse * (2 * shape.layer(tp) + 2 * LONG * shape.heads * shape.head_dim // tp) / FLOPS
        assert t.plain.ms(8192, LONG) == pytest.approx((8192 * per_token, 2 * 8192 * per_token), rel=1e-6)
        assert t.checkpointed.ms(8192, LONG)[1] == pytest.approx(3 * 8192 * per_token, rel=1e-6), "backward recomputes"
        assert t.checkpointed.kept == 2 * shape.hidden, "but what every model has"
        assert t.optimizer_ms == pytest.approx({"bfloat16": 5e-9, "float32": 1e-8})
    assert terms["Llama 8B", 1, OURS].head_peak.at(99999) == 2**28 + 2 * LLAMA_8B.head()
    part = terms["Llama 8B", 8, STOCK].head_peak.at(SEQ)
    assert part == SEQ * 128256 * 12 + 2 * LLAMA_8B.head(8), "all logits, and a rank's gradient"


def test_what_was_not_measured_leaves_no_terms() -> None:
    lost = [replace(p, note="out of memory") if (p.shape, p.provider, p.seq) == ("Llama 70B", STOCK, LONG) else p for p in pieces().rows]
    found = derive(Pieces(MACHINE, tuple(lost)))
    assert ("Llama 70B", 1, STOCK) not in found
    assert ("Llama 70B", 1, OURS) in found


@pytest.mark.parametrize("shape", [LLAMA_8B, BY_NAME["Llama 1B"]], ids=lambda s: s.name)
def test_parameters_are_those_of_the_model(shape: Shape) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    for tp in shape.tp:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape.cut(tp), num_hidden_layers=1))
        assert sum(p.numel() for p in model.model.layers[0].parameters()) == shape.layer(tp)
        root = sum(p.numel() for p in model.parameters()) - shape.layer(tp)
        assert root + (shape.vocab - shape.vocab // tp) * shape.hidden == shape.root(tp), "the embedding is whole on each rank"
    assert round(shape.parameters() / 1e9, 2) == {"Llama 8B": 8.03, "Llama 1B": 1.24}[shape.name]


# --- against what PyTorch shards and sends: a process group that moves nothing ----------------------------------------------------------


class Sent(TorchDispatchMode):
    """The collectives under it, and the bytes of the larger of what goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self.calls.append((func._schema.name.split("::")[1].strip("_"), max((t.nbytes for t in tensors), default=0)))
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> list[int]:
        return [size for what, size in self.calls if what == name]


def whole(found: list[Message], *words: str) -> float:
    """The bytes of the arrays that all messages of these names are about."""
    return sum(m.bytes * m.size / (m.size - 1) / (2 if m.kind == "all-reduce" else 1) for m in found if m.what in words)


def test_fsdp_shards_and_sends_what_is_said(terms: dict[Any, Terms]) -> None:
    plan, of = Plan(FEW, seq=16, stage=FSDP), tiny_terms(terms["Llama 8B", 1, OURS])
    with liger_fn.use_backend("reference"), rank.pretended(FEW):
        model = rank.sharded(TINY, FEW, OURS, CPU)
        adam, ids = torch.optim.AdamW(model.parameters()), torch.zeros(1, 16, dtype=torch.long)
        with Sent() as sent:
            model(input_ids=ids, labels=ids).loss.backward()
        adam.step()
        local = [p.to_local() for p in model.parameters()]
        grads = sum(p.grad.to_local().nbytes for p in model.parameters())
        states = sum(s[k].to_local().nbytes for s in adam.state.values() for k in ("exp_avg", "exp_avg_sq"))
    mine, said = TINY.parameters(1, FEW), messages(plan, of)
    assert mine > TINY.parameters() / FEW, "rows do not divide"
    assert sum(p.nbytes for p in local) == mine * MIXED.weight == moments(plan, of)[0].parameters
    assert states == mine * MIXED.moments == moments(plan, of)[0].optimizer
    assert grads == mine * MIXED.gradient
    assert sum(sent.of("allgather_base")) == whole(said, "weights, forward", "weights, backward", "root's weights")
    assert sum(sent.of("reduce_scatter_base")) == whole(said, "gradients", "root's gradients")
    counts = len(sent.of("allgather_base")), len(sent.of("reduce_scatter_base"))
    assert counts == tuple(sum(m.count for m in said if (m.kind == SCATTER) == scatters) for scatters in (False, True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tensor_parallelism_sends_what_is_said(terms: dict[Any, Terms], checkpointing: bool) -> None:
    shape = replace(TINY, layers=2, heads=8, kv_heads=8, mlp=64, vocab=128)
    of = replace(terms["Llama 8B", 8, OURS], shape=shape)
    said = messages(Plan(tp=FEW, seq=16, checkpointing=checkpointing, policy=replace(BF16, compute=4)), of)
    with rank.pretended(FEW):
        torch.manual_seed(0)
        from transformers import AutoConfig, AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape.cut(1), num_hidden_layers=2)).train()
        if checkpointing:
            rank.checkpoint(model)
        parallelize_module(model.model, init_device_mesh("cpu", (FEW,)), {k[6:]: v for k, v in tensor_parallel.projections().items()})
        with Sent() as sent:
            hidden = model.model(input_ids=torch.zeros(1, 16, dtype=torch.long), use_cache=False).last_hidden_state
            hidden.sum().backward()
    assert len(sent.of("all_reduce")) == sum(m.count for m in said if m.what == "hidden states")
    assert sum(sent.of("all_reduce")) == whole(said, "hidden states")


def test_the_loss_over_a_sharded_vocabulary_sends_what_is_said(terms: dict[Any, Terms], monkeypatch: pytest.MonkeyPatch) -> None:
    shards, function = (importlib.import_module(f"liger_fn.{name}") for name in ("_vocab_parallel", "vocab_parallel"))
    gathered: list[int] = []
    reduced: list[int] = []
    gather, reduce = shards.Shard.gather, dist.all_reduce

    def gather_seen(shard: Any, mine: torch.Tensor) -> Any:
        gathered.append(mine.nbytes * FEW)
        return gather(shard, mine)

    def reduce_seen(t: torch.Tensor, **options: Any) -> Any:
        reduced.append(t.nbytes)
        return reduce(t, **options)

    # All ranks of such a group seem to have this one's rows, which on a CPU is an error.
    monkeypatch.setattr(function, "layout", lambda *args: shards.Layout(None, torch.zeros(FEW)))
    monkeypatch.setattr(shards.Shard, "gather", gather_seen)
    monkeypatch.setattr(dist, "all_reduce", reduce_seen)
    x = torch.randn(16, TINY.hidden, dtype=torch.bfloat16, requires_grad=True)
    with rank.pretended(FEW):
        weight = torch.randn(16, TINY.hidden, dtype=torch.bfloat16, requires_grad=True)
        liger_fn.vocab_parallel_linear_cross_entropy(x, weight, torch.zeros(16, dtype=torch.long)).backward()
    said = messages(Plan(tp=FEW, seq=16), tiny_terms(terms["Llama 8B", 8, OURS]))
    assert sum(gathered) == whole(said, "loss: statistics")
    assert sum(reduced) == whole(said, "loss: gradient of the hidden states")


# --- sums -------------------------------------------------------------------------------------------------------------------------------


def test_memory_by_hand() -> None:
    layer = measure_of = Curve(((1, 100.0),))  # bytes or milliseconds a token
    from tests.scaling.terms import LayerTerms

    each = LayerTerms(layer, layer, 0.0, 0.0, kept=10.0, peak=measure_of)
    shape = Shape("hand", hidden=2, mlp=1, layers=3, heads=1, kv_heads=1, head_dim=1, vocab=8)
    assert (shape.layer(), shape.root(), shape.head()) == (4 * 2 + 3 * 2 + 4, 16 + 2 + 16, 16)
    of = Terms(shape, 1, OURS, each, each, layer, Curve(((1, 1000.0),)), layer, {"float32": 1.0, "bfloat16": 1.0})
    p, every = 18, 3 * 18 + 34
    alone = {m.moment: m.total for m in moments(Plan(batch=1, seq=5, stage=DDP, policy=BF16), of)}
    state, stream = 6 * every, 2 * 5 * 2
    assert alone == {
        "head": state + 3 * 50 + stream + 5000,
        "last layer's backward": state + 3 * 50 + stream + 500 + 2 * 16,
        "first layer's backward": state + 50 + stream + 500 + 2 * 16 + 2 * 2 * p,
        "embedding's gradient": state + stream + 2 * (16 + 16) + 2 * 3 * p,
    }
    of_two = {m.moment: m.total for m in moments(Plan(2, batch=1, seq=5), of)}
    mine, root = 3 * (3 * 2 + 1 + 2 * 2 + 1 + 2) + 4 * 2 + 1 + 4 * 2, 2 * 34
    assert mine == shape.parameters(1, 2), "rows of two ranks: of one row the first has it"
    assert of_two == {
        "head": 12 * mine + root + 2 * p + 3 * 50 + stream + 5000,
        "last layer's backward": 12 * mine + root + 2 * 2 * p + 3 * 50 + stream + 500 + 2 * 16 + 4 * p,
        "first layer's backward": 12 * mine + root + 2 * 2 * p + 50 + stream + 500 + 2 * 16 + 4 * p + 4 * 2 * shape.layer(1, 2),
        "embedding's gradient": 12 * mine + root + stream + 4 * 34 + 2 * (16 + 16) + 4 * 3 * shape.layer(1, 2),
    }
    for stage, factor in ((ZERO1, (2 + 4 / 4, 8 / 4)), (ZERO2, (2 + 4 / 4, 8 / 4)), (DDP, (2 + 4, 8))):
        plan = Plan(1 if stage == DDP else 4, 4 if stage == DDP else 1, batch=1, seq=5, stage=stage)
        four = replace(of, shape=replace(shape, hidden=4, mlp=4, heads=4, kv_heads=4))  # rows divide
        n = four.shape.parameters()
        assert (moments(plan, four)[0].parameters, moments(plan, four)[0].optimizer) == (factor[0] * n, factor[1] * n)


def test_memory_and_time_move_the_way_they_must(terms: dict[Any, Terms]) -> None:
    of, plan = terms["Llama 8B", 1, OURS], Plan(64, 1, 1, 1, 8192)
    need = memory(plan, of).total
    assert need < memory(replace(plan, batch=2), of).total
    assert need < memory(replace(plan, checkpointing=False), of).total
    assert need < memory(replace(plan, reshard=False), of).total
    assert need < memory(replace(plan, shard=8, replicas=8), of).total
    assert need < memory(plan, terms["Llama 8B", 1, STOCK]).total
    fast = step(plan, of)
    assert fast.tokens_per_s > step(replace(plan, checkpointing=True, batch=1, seq=512), of).tokens_per_s, "too few tokens to hide anything"
    assert fast.ms < step(plan, of, Cluster(between=1.0)).ms
    assert step(replace(plan, reshard=False), of, Cluster(between=1.0)).ms < step(plan, of, Cluster(between=1.0)).ms
    assert step(Plan(64, 64, 1, 1, 8192), of).exposed_ms < step(Plan(4096, 1, 1, 1, 8192), of).exposed_ms, "a shorter ring"


def test_links() -> None:
    c = Cluster(node=8, inside=450, between=50, inside_hop=1, between_hop=5)
    assert c.bandwidth(8, 1) == 450
    assert c.bandwidth(64, 1) == 400, "eight adapters of each node, but no more than NVLink has"
    assert c.bandwidth(8, 8) == 50, "one member in each node"
    assert c.latency_us("all-gather", 8, 1) == 7
    assert c.latency_us("all-gather", 16, 1) == 14 + 2 * 5
    assert c.latency_us("all-reduce", 16, 1) == 2 * (3 + 5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"shard": 0}, "shard must be 1"), ({"stage": 7}, "stage must be"), ({"stage": DDP, "shard": 2}, "DDP shards nothing")],
)
def test_wrong_plans_are_errors(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Plan(**wrong)


def test_choices_fit_and_the_longest_context_is_the_last_that_does(terms: dict[Any, Terms]) -> None:
    room = choose.GPUS[choose.SMALL]
    found = choose.choices(terms, "Llama 70B", OURS, 512, room)
    assert found == sorted(found, key=lambda c: -c.step.tokens_per_s)
    assert all(c.plan.world == 512 and c.memory.total <= room and c.plan.tokens_a_step <= choose.MOST_TOKENS for c in found)
    assert {c.plan.tp for c in found} == {1, 8}
    plan, of = Plan(64), terms["Llama 8B", 1, OURS]
    most = choose.longest(plan, of, room)
    assert memory(replace(plan, seq=most), of).total <= room < memory(replace(plan, seq=most + 4096), of).total
    assert choose.longest(Plan(1), of, room) == 0


# --- what is kept, and the page ---------------------------------------------------------------------------------------------------------


def test_pieces_are_kept_and_not_measured_again(tmp_path: Path) -> None:
    one, other = (replace(p, forward_ms=1.25) for p in measure.wanted()[0][1][:2])
    path = kept.save(MACHINE, [one], tmp_path)
    assert kept.save(MACHINE, [replace(other, note="out of memory")], tmp_path) == path
    found = kept.find(MACHINE, tmp_path)
    assert found.rows == (one, replace(other, note="out of memory"))
    assert found.has(other)
    assert not found.has(replace(one, batch=99))
    assert kept.newest(tmp_path) == path


def test_without_a_gpu_a_dry_run_stores_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "TIMED", 1)
    with liger_fn.use_backend("reference"):
        assert command.main(["measure", "--shapes", "Llama 1B", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count("layers     Llama 1B") == 20
    assert "failed" not in said
    assert not list(tmp_path.iterdir())
    assert command.main(["report", "--out", str(tmp_path)]) == 1


def test_the_page_compares_with_whole_steps_and_names_what_is_missing(terms: dict[Any, Terms], tmp_path: Path) -> None:
    rows = check.whole_steps(terms)
    assert {(c.model, c.provider) for c in rows} == {(m, who) for m in ("Llama 1B", "Llama 8B 8 layers") for who in PROVIDERS}
    assert all(c.tokens_per_s is not None for c in rows if c.provider == OURS)
    lost = replace(measure.wanted()[0][1][0], batch=64, note="out of memory")
    path = kept.save(MACHINE, [*pieces().rows, lost], tmp_path)
    page, figure = report.write(path, tmp_path / "page.md", tmp_path / "figure.png")
    text = page.read_text()
    assert "head, Llama 1B, TP 1, stock, 0 layers, 64 × 4096: out of memory" in text
    for name in ("Llama 8B", "Llama 70B", "Llama 405B"):
        section = text.split(f"## {name}: ")[1].split("\n## ")[0]
        assert [line.split(" | ")[0] for line in section.splitlines() if line[:3] in ("| 8", "| 6", "| 5", "| 4")] == [
            "| 8",
            "| 64",
            "| 512",
            "| 4,096",
        ]
    assert figure.stat().st_size > 10_000


def test_a_page_is_made_of_part_of_the_pieces(tmp_path: Path) -> None:
    """Of one model, and where of a degree of tensor parallelism one provider has too little."""
    some = [p for p in pieces().rows if p.shape in ("", "Llama 8B")]
    lost = [replace(p, note="out of memory") if (p.tp, p.provider, p.seq) == (8, STOCK, LONG) else p for p in some]
    text = report.page(Pieces(MACHINE, tuple(lost)))
    assert "## Llama 8B: " in text
    assert "Llama 70B" not in text
    assert "| Llama 8B | 2 | stock |" in text
    assert "| Llama 8B | 8 |" not in text


def test_the_committed_page_is_that_of_the_newest_run() -> None:
    newest = kept.newest()
    assert report.PAGE.exists() == (newest is not None)
    assert newest is None or report.PAGE.read_text() == report.page(kept.load(newest))
