"""Past one GPU: what a training step is made of, measured on one, and the plan of clusters that follows from it.

python -m tests.scaling measure               on a GPU, about three minutes; each piece is on disk once it is done, and stays
python -m tests.scaling measure --shapes "Llama 8B"
python -m tests.scaling report                docs/scaling.md and its figure from the newest run that is kept
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import kept, measure, report
from .kept import Piece
from .shapes import BY_NAME


def line(piece: Piece) -> str:
    """A piece for a terminal."""
    name = f"{piece.what:10} {piece.shape:11} tp {piece.tp} {piece.provider:9} layers {piece.layers:2} {piece.batch} x {piece.seq:<6}"
    if piece.note:
        return f"{name} {piece.note}"
    times = [f"{ms:9.2f} ms" for ms in (piece.forward_ms, piece.backward_ms) if ms is not None]
    sizes = (piece.kept, piece.forward_peak, piece.backward_peak, piece.peak)
    memory = [f"{size / 2**20:9,.0f} MiB" for size in sizes if size is not None]
    return " ".join((name, "checkpointing" if piece.checkpointing else "", *times, *memory))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.scaling", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=("measure", "report"))
    parser.add_argument("--shapes", nargs="+", choices=tuple(BY_NAME), default=list(BY_NAME), metavar="NAME", help=", ".join(BY_NAME))
    parser.add_argument("--out", type=Path, default=kept.FOLDER, help="where the JSON goes (default: tests/scaling/results)")
    options, console = parser.parse_args(argv), Console(width=None if sys.stdout.isatty() else 160)
    if options.what == "report":
        run = kept.newest(options.out)
        if run is None:
            print(f"No run in {options.out}: run `python -m tests.scaling measure` on a GPU first. Nothing was written.", file=sys.stderr)
            return 1
        for path in report.write(run):
            console.print(f"written: {path}", soft_wrap=True)
        return 0
    gpu, failed = torch.cuda.is_available(), False
    device = torch.device("cuda" if gpu else "cpu")
    m, written = kept.machine(device), "nothing new"
    before = kept.find(m, options.out) if gpu else kept.Pieces(m)
    for piece in measure.run(tuple(options.shapes), device, before.has, tiny=not gpu):
        console.print(line(piece), markup=False, highlight=False, soft_wrap=True)
        failed |= piece.note.startswith("failed")
        if gpu and not piece.note.startswith("failed"):
            written = f"written to {kept.save(m, [piece], options.out)}"
    console.print(written if gpu else "No GPU: tiny models, which prove the harness. Nothing was stored.", soft_wrap=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
