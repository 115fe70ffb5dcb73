"""From the committed results to docs/benchmarks.md and its figures: `make bench-report`.

The page says, for each machine, which bars are met and where a peer is faster or needs less memory before it shows the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path

from . import bars, results
from .experts import MIXTURES
from .measure import SMALL
from .peers import MINE, OURS, PROVIDERS
from .results import GREEN, Result, Row
from .table import EXPERT_MODES, EXPERTS_BOTH, HEAD_BOTH, HEAD_ERRORS, HEAD_MODES, HEAD_SWEEP, HOST, MODES, SWEEP, SWEEPS
from .training import report as training

DOCS = results.ROOT / "docs"

HEAD = """# Benchmarks

Made by `make bench-report` from the files in `tests/bench/results`, which `make bench` writes on a GPU: edit neither by hand.

How it is measured, in `tests/bench`:

- Inputs are bf16. *forward* is a call that wants no gradients; *forward + backward* is a call and all its gradients.
- µs is device time: the median over 20 to 200 replays of a CUDA graph, which leaves out the host, after 30 ms of replays that bring the
  clocks up. A provider that makes the host wait cannot be replayed: it is timed between events around plain calls, with the host ahead of
  the device where it can be, and its figure is marked *timed by events*.
- Replays follow one another, so what the last one left in the GPU's L2 cache (50 MB on an H100) the next may read from there, whoever is
  measured: arrays of that size and below can look faster than the floor, which is that of memory.
- A provider that writes over its inputs is given them anew before each replay, outside of what is timed. *liger_fn donate* is such a one:
  the call with `donate=True`, by which the caller gives its inputs away.
- *moved* is the least that the function must read and write (weights, targets and statistics not counted), and GB/s or TFLOP/s is that over
  the time, for every provider alike. The floor is the least bytes over the bandwidth of a copy, or the least FLOPs over the rate of a
  matrix product, both measured in the same run.
- *peak* is memory allocated at the peak of the call, over its inputs.
- *by size* are the figures behind the plots against size, forward + backward, from 10 to 50 replays.
- *host* is what a call and its backward cost the host on a tiny input, in pairs of short turns of liger_fn and the other; the ratio is the
  median over the pairs.
- *head* is linear cross entropy at the sizes of real models. It is timed between events around plain calls, since a call that is captured
  in a graph keeps the rows whose target is ignored. Its floor is the three matrix products of its shape (two where the weight is frozen,
  one without gradients), by cuBLAS, timed in turns with each provider, since a long run heats a GPU and slows both: medians of 3 to 9
  turns. *workspace* is the peak over the inputs and over the gradients themselves.
- No figure is shown for a function that is wrong: before it is timed, it is compared with its definition in fp64 at every width below,
  by the rule in `tests/numerics.py`.
"""


BY_EVENTS = "timed by events: it makes the host wait, so that no graph of it can be replayed"

# --- tables -----------------------------------------------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _us(value: float | None) -> str:
    return _number(value, 0 if value is None or value >= 100 else 1)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
    return "\n".join(lines) + "\n"


def _rate(r: Row) -> str:
    return f"{r.tflops:,.1f} TFLOP/s" if r.tflops else f"{r.gbs:,.0f} GB/s" if r.gbs else "–"


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that answer the same question: one function, shape and pass. Providers in their own order."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for r in rows:
        found.setdefault(r.key[:3], []).append(r)
    return [sorted(g, key=lambda r: PROVIDERS.index(r.provider)) for g in found.values()]


def _beaten(rows: Sequence[Row], what: str) -> tuple[int, list[tuple[Row, Row]]]:
    """How many comparisons there are, and those (ours, the best peer) where a peer has less of `what`."""
    count, found = 0, []
    for group in _groups(rows):
        ours = next((r for r in group if r.provider == OURS and getattr(r, what) is not None), None)
        peers = [r for r in group if r.provider not in MINE and getattr(r, what) is not None]
        if ours is not None and peers:
            best = min(peers, key=lambda r: getattr(r, what))
            count += 1
            found += [(ours, best)] if getattr(best, what) < getattr(ours, what) else []
    return count, found


def _where_beaten(rows: Sequence[Row], what: str, unit: str, title: str) -> str:
    count, found = _beaten(rows, what)
    if not count:
        return ""
    text = f"### {title}\n\nIn {len(found)} of {count} comparisons (a function, a shape, a pass).\n"
    head = ("function", "shape", "pass", "the best", unit, f"liger_fn, {unit}", "liger_fn ÷ the best")
    cells = []
    for ours, best in sorted(found, key=lambda pair: getattr(pair[1], what) / getattr(pair[0], what)):
        a, b = getattr(ours, what), getattr(best, what)
        provider = f"{best.provider}, {best.note}" if best.note else best.provider
        cells.append((f"`{ours.op}`", ours.shape, ours.mode, provider, _us(b), _us(a), f"× {a / b:.2f}" if b else "–"))
    return f"{text}\n{_table(head, cells)}" if found else text


def _function(op: str, rows: Sequence[Row]) -> str:
    notes: list[str] = []
    cells = []
    for group in _groups(rows):
        fastest = min((r.us for r in group if r.us is not None), default=None)
        for r in group:
            us = f"**{_us(r.us)}**" if r.us is not None and r.us == fastest else _us(r.us)
            moved = _number(r.bytes / 1e6 if r.bytes else None)
            cells.append((r.shape, r.mode, _marked(r, notes), us, moved, _rate(r), _number(r.over_floor, 2), _number(r.mib)))
    head = ("shape", "pass", "provider", "µs", "moved, MB", "rate", "÷ floor", "peak, MiB")
    return f"### `{op}`\n\n{_table(head, cells)}{_said(notes)}"


def _marked(r: Row, notes: list[str]) -> str:
    """The provider, with the numbers that what is to say of its row has among all notes."""
    mark = ""
    for note in filter(None, (r.note, BY_EVENTS if r.by_events else "")):
        notes += [] if note in notes else [note]
        mark += f" ({notes.index(note) + 1})"
    return r.provider + mark


def _said(notes: Sequence[str]) -> str:
    return "".join(f"\n({i + 1}) {note}\n" for i, note in enumerate(notes))


def _bars(rows: Sequence[Row]) -> str:
    """Every bar, met or not; nothing where none was measured at all."""
    found = bars.verdicts(rows)
    measured = [v for v in found if v.met is not None]
    if not measured:
        return ""
    met = sum(1 for v in measured if v.met)
    said = f"{met} of {len(measured)} are met." + (
        f" {len(found) - len(measured)} were not measured." if len(measured) < len(found) else ""
    )
    head = ("function", "shape", "pass", "provider", "bar", "measured", "met?")
    return f"### The bars\n\n{said}\n\n{_table(head, ((f'`{c[0]}`', *c[1:]) for c in map(bars.cells, found)))}"


def _by_size(rows: Sequence[Row]) -> str:
    """For each function along its sizes, µs and MiB of each provider."""
    text = "### By size\n\nµs and, after the slash, MiB at the peak, of forward + backward.\n"
    for op in dict.fromkeys(r.op for r in rows):
        of_op = sorted((r for r in rows if r.op == op), key=lambda r: r.size)
        providers = [p for p in PROVIDERS if any(r.provider == p for r in of_op)]
        found = {(r.shape, r.provider): r for r in of_op}
        cells = [(shape, *(_us_and_mib(found.get((shape, p))) for p in providers)) for shape in dict.fromkeys(r.shape for r in of_op)]
        text += f"\n`{op}`, along its {along(op)}:\n\n{_table(('shape', *providers), cells)}"
    return text


def _us_and_mib(r: Row | None) -> str:
    if r is None:
        return "–"
    return f"{_us(r.us)} / {_number(r.mib)}" + ("" if not r.by_events else " (timed by events)") + ("" if r.us else f" ({r.note})")


def _heads(rows: Sequence[Row]) -> str:
    """Linear cross entropy: each shape, what is skipped, along tokens, and the errors."""
    text = """### Linear cross entropy: the head

The shape is tokens x hidden x vocabulary. *liger_fn* takes the function's defaults; *weight*, *fp32* and *exact* are its `accumulate`,
*recompute* its `save`, *64 MiB* its `memory_budget`; *liger-kernel fp32* has `accum_dtype=torch.float32`.
"""
    whole, other = [r for r in rows if r.mode == HEAD_BOTH], [r for r in rows if r.mode in HEAD_MODES[1:]]
    if whole:
        cells = [(r.shape, *_head_cells(r), _times(r.ours_over_this), _times(r.ours_mib_over_this)) for g in _groups(whole) for r in g]
        text += "\n" + _table(("shape", "provider", "ms", "÷ products", "workspace, MiB", "liger_fn ÷ this", "in workspace"), cells)
    if other:
        cells = [(r.shape, r.mode.removeprefix("head: "), *_head_cells(r)) for group in _groups(other) for r in group]
        text += "\n" + _table(("shape", "with", "provider", "ms", "÷ products", "workspace, MiB"), cells)
    by_tokens = sorted((r for r in rows if r.mode == HEAD_SWEEP), key=lambda r: r.size)
    if by_tokens:
        providers = [p for p in PROVIDERS if any(r.provider == p for r in by_tokens)]
        found = {(r.shape, r.provider): r for r in by_tokens}
        cells = [(s, *(_ms_and_mib(found.get((s, p))) for p in providers)) for s in dict.fromkeys(r.shape for r in by_tokens)]
        text += "\nms and, after the slash, MiB of workspace:\n\n" + _table(("shape", *providers), cells)
    compared = [r for r in rows if r.mode == HEAD_ERRORS]
    names = list(dict.fromkeys(k for r in compared for k in r.errors or {}))
    for shape in dict.fromkeys(r.shape for r in compared):
        cells = [(_noted(r), *(_error(r, k) for k in names)) for r in compared if r.shape == shape]
        text += f"\nErrors at {shape}, {ERRORS}:\n\n" + _table(("provider", *names), cells)
    return text


ERRORS = (
    "‖found − truth‖ ÷ ‖truth‖ with truth in fp64 (dx of 256 rows, dweight of 512 classes; that of the loss, one number, is partly luck)"
)


def _experts(rows: Sequence[Row]) -> str:
    text = """### The experts of a mixture

The shape is T tokens, E experts, k choices of each token, H hidden and I inner sizes; the pass is the forward and all gradients. *skewed*:
every other token chooses the same expert, and no other token does; *÷ balanced* is over the same provider's time without that. The floor
is six dense products of T k rows by cuBLAS, timed just before each provider; where the rate is in GB/s, it is to read all weights twice and
to write their gradients once, at the rate of a copy. *÷ this* compares times over their floors. *recompute* is the function's `save`.
Each provider is compared with fp64 before it is timed, at the same hidden sizes and with as many tokens for each expert.
"""
    notes: list[str] = []
    cells = []
    for r in (r for group in _groups(rows) for r in group):
        shape = r.shape if r.mode == EXPERTS_BOTH else f"{r.shape}, {r.mode.removeprefix('experts: ')}"
        ms, balanced = _number(r.us / 1e3 if r.us else None, 2), _number(r.over_balanced, 2)
        compared = _times(r.ours_over_this), _times(r.ours_mib_over_this)
        cells.append((shape, _marked(r, notes), ms, _rate(r), _number(r.over_floor, 2), balanced, _number(r.mib), *compared))
    head = ("shape", "provider", "ms", "rate", "÷ floor", "÷ balanced", "peak, MiB", "liger_fn ÷ this", "in peak")
    models = "".join(f"- {m.label}: {m.model}\n" for m in MIXTURES if any(r.shape == m.label for r in rows))
    return "\n".join(filter(None, (text, models, _table(head, cells)))) + _said(notes)


def _noted(r: Row) -> str:
    return r.provider + (f" ({r.note})" if r.note else "")


def _head_cells(r: Row) -> tuple[str, ...]:
    return _noted(r), _number(r.us / 1e3 if r.us else None, 2), _number(r.over_floor, 3), _number(r.mib)


def _ms_and_mib(r: Row | None) -> str:
    if r is None:
        return "–"
    return f"{_number(r.us / 1e3 if r.us else None, 2)} / {_number(r.mib)}" + (f" ({r.note})" if r.note else "")


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"× {ratio:.2f}"


def _error(r: Row, what: str) -> str:
    return "–" if not r.errors or what not in r.errors else f"{r.errors[what]:.2g}"


def along(op: str) -> str:
    """What the length is called along which a function was measured."""
    return next((s.along for s in SWEEPS if s.op == op), "size")


def _host(rows: Sequence[Row]) -> str:
    cells = []
    for r in rows:
        ratio = "–" if r.ours_over_this is None else f"× {r.ours_over_this:.2f}"
        cells.append((f"`{r.op}`", r.shape, r.provider, _us(r.us) + (f" ({r.note})" if r.note else ""), ratio))
    text = "### The host's cost\n\nOne call and its backward; where the last column is over 1, the other costs the host less.\n\n"
    return text + _table(("function", "shape", "provider", "µs", "liger_fn ÷ this"), cells)


def together(found: dict[str, Result]) -> dict[str, dict[str, Result]]:
    """Runs on one machine with the same versions, by the oldest one's stem, the oldest first."""
    groups: dict[tuple[tuple[str, str], ...], dict[str, Result]] = {}
    for stem in sorted(found, key=lambda stem: (found[stem].machine["date"], len(stem), stem)):
        machine = tuple((k, v) for k, v in sorted(found[stem].machine.items()) if k not in ("date", "sources"))
        groups.setdefault(machine, {})[stem] = found[stem]
    return {next(iter(runs)): runs for runs in groups.values()}


def _section(stem: str, runs: dict[str, Result]) -> str:
    result = reduce(Result.with_later, runs.values())
    m, rows = result.machine, result.allowed()
    timed, host, by_size = [r for r in rows if r.mode in MODES], [r for r in rows if r.mode == HOST], [r for r in rows if r.mode == SWEEP]
    heads, of_experts = ([r for r in rows if r.mode in modes] for modes in (HEAD_MODES, EXPERT_MODES))
    parts = [f"## {m['device']}, torch {m['torch']}, {m['date']}\n\n" + "\n".join(_run(*run) for run in runs.items())]
    if len(runs) > 1:
        parts[0] += "\nWhat was measured in several runs is shown as the last found it.\n"
    if result.limits:
        copy, small, matmul = (result.limits[k] for k in ("copy_gbs", "small_copy_gbs", "matmul_tflops"))
        parts[0] += (
            f"A copy reaches {copy:,.0f} GB/s (of {SMALL} MiB {small:,.0f} GB/s, {copy / small:.2f} × its floor), "
            f"a matrix product of bf16 {matmul:,.0f} TFLOP/s.\n"
        )
    if m["device"] == "cpu":
        parts.append("Wall clock on a CPU: this proves the harness and says nothing of speed.\n")
    red = [f"- `{op}`: {verdict}\n" for op, verdict in result.gates.items() if verdict != GREEN]
    if red:
        parts.append("### No figures: these functions are wrong here\n\n" + "".join(red))
    if m["device"] != "cpu":
        parts.append(_bars(rows))
    parts.append(_where_beaten([*timed, *heads, *of_experts], "us", "µs", "Where a peer is faster"))
    parts.append(_where_beaten([*timed, *heads, *of_experts], "mib", "MiB", "Where a peer needs less memory"))
    parts.append("\n".join(f"![{FIGURES[which]}](figures/bench-{stem}-{which}.png)\n" for which in drawn(result)))
    parts += [_function(op, [r for r in timed if r.op == op]) for op in dict.fromkeys(r.op for r in timed)]
    of_heads = [r for r in rows if r.mode in (*HEAD_MODES, HEAD_SWEEP, HEAD_ERRORS)]
    if of_heads:
        parts.append(_heads(of_heads))
    if of_experts:
        parts.append(_experts(of_experts))
    if by_size:
        parts.append(_by_size(by_size))
    if host:
        parts.append(_host(host))
    return "\n".join(p for p in parts if p)


def _run(stem: str, result: Result) -> str:
    ops = "" if len(result.gates) > 1 else f": {', '.join(f'`{op}`' for op in result.gates)} alone"
    versions = ", ".join(f"{k} {v}" for k, v in result.machine.items() if k != "device")
    return f"{result.machine['device']}, {versions} ([JSON](../tests/bench/results/{stem}.json)){ops}.\n"


FIGURES = {
    "floor": "how much of what the machine can do each provider reaches",
    "time": "time by size",
    "memory": "memory by size",
    "heads": "time and workspace of linear cross entropy by tokens",
}


def drawn(result: Result) -> dict[str, list[Row]]:
    """The figures that a run has rows for, and those."""
    rows = result.allowed()
    timed, by_size = [r for r in rows if r.mode in MODES], [r for r in rows if r.mode == SWEEP]
    heads = [r for r in rows if r.mode == HEAD_SWEEP]
    found = {"floor": timed, "time": by_size, "memory": [r for r in by_size if r.mib is not None], "heads": heads}
    return {which: each for which, each in found.items() if each}


def page(found: dict[str, Result], steps: training.Load | None = None) -> str:
    """The text for results by the stems of their files, those of one machine together; and for training steps."""
    sections = [_section(stem, runs) for stem, runs in reversed(together(found).items())]
    functions = "\n".join([HEAD, *sections]) if found else ""
    return "\n".join(filter(None, (functions, training.page(steps or {}))))


# --- all of it --------------------------------------------------------------------------------------------------------------------------


def write(folder: Path = results.FOLDER, docs: Path = DOCS) -> list[Path]:
    """Read every result in `folder`; write the page and its figures under `docs`. Nothing is written where there is no result."""
    found = {path.stem: results.load(path) for path in sorted(folder.glob("*.json"))}
    steps = training.read(folder / training.FOLDER.name)
    if not found and not steps:
        return []
    from . import figures  # only here: matplotlib is not needed to read a result

    (docs / "figures").mkdir(parents=True, exist_ok=True)
    written = [docs / "benchmarks.md"]
    written[0].write_text(page(found, steps))
    for stem, run in steps.items():
        written.append(docs / "figures" / f"training-{stem}.png")
        training.draw(stem, run, written[-1])
    for stem, runs in together(found).items():
        result = reduce(Result.with_later, runs.values())
        for which, rows in drawn(result).items():
            path = docs / "figures" / f"bench-{stem}-{which}.png"
            getattr(figures, which)(rows, f"{result.machine['device']}, torch {result.machine['torch']}", path)
            written.append(path)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.report", description="Make docs/benchmarks.md from committed results.")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of JSON files (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page and figures/ go (default: %(default)s)")
    options = parser.parse_args()
    written = write(options.results, options.docs)
    for path in written:
        print(f"written: {path}")
    if not written:
        print(f"No results in {options.results}: run `make bench` on a GPU first. Nothing was written.", file=sys.stderr)
    return not written


if __name__ == "__main__":
    sys.exit(main())
