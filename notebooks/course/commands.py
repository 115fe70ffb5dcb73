"""python -m notebooks run [N ...] [--write]   execute lessons; --write keeps their outputs in the committed notebooks
python -m notebooks pair [N ...]            make the notebooks' cells those of the text sources again, outputs kept where cells are the same
python -m notebooks record FILE             on a GPU: run every lesson as a script, and write what it timed to FILE
python -m notebooks open N                  open one lesson in JupyterLab
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import GPU, ROOT

FOLDER = ROOT / "notebooks"
SECONDS = 300  # for one lesson


def sources(numbers: Sequence[int] = ()) -> list[Path]:
    """The text sources of the lessons asked for, in order; all without any. An unknown number is an error."""
    found = {int(p.name[:2]): p for p in sorted(FOLDER.glob("[0-9][0-9]_*.py"))}
    if unknown := [n for n in numbers if n not in found]:
        raise SystemExit(f"there is no lesson {unknown[0]}; there are {min(found)} to {max(found)}")
    return [found[n] for n in (numbers or sorted(found))]


def paired(source: Path):
    """The notebook of a text source, its outputs those of the committed one where the cells' texts are the same."""
    import jupytext
    import nbformat

    book = jupytext.read(source)
    book.metadata = nbformat.from_dict({"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    committed = source.with_suffix(".ipynb")
    old = [c for c in nbformat.read(committed, 4).cells if c.cell_type == "code"] if committed.exists() else []
    by_text = {c.source: c for c in old}
    for n, cell in enumerate(book.cells):
        cell.id = f"cell-{n}"  # the same ids each time, so that a diff shows what changed
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code" and cell.source in by_text:
            cell.outputs, cell.execution_count = by_text[cell.source].outputs, by_text[cell.source].execution_count
    return book


def write(book, path: Path) -> None:
    """Write a notebook, whole or not at all."""
    import nbformat

    part = path.with_suffix(".part")
    part.write_text(nbformat.writes(book, 4) + "\n")
    part.replace(path)


def execute(source: Path, target: Path) -> float:
    """Run one lesson from its text source into `target`; the seconds that it took. A cell that raises ends it."""
    from nbclient import NotebookClient

    book, start = paired(source), time.perf_counter()
    NotebookClient(
        book, timeout=SECONDS, kernel_name="python3", extra_arguments=["--log-level=ERROR"], resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # when each cell ran: it would differ in every diff
    write(book, target)
    return time.perf_counter() - start


def run(numbers: Sequence[int], keep: bool) -> int:
    """Execute lessons, two at a time on a machine that can; print each as it ends. The exit status: 1 if any cell raised."""
    lessons, folder = sources(numbers), FOLDER if keep else ROOT / "out" / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    failed = 0

    def one(source: Path) -> tuple[Path, float, str]:
        try:
            return source, execute(source, folder / f"{source.stem}.ipynb"), ""
        except Exception as error:  # its text has the cell and the traceback
            return source, 0.0, str(error)

    workers = 1 if GPU else min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        for source, seconds, error in pool.map(one, lessons):
            print(f"{'✗' if error else '✓'} {source.stem:<32} {seconds:6.1f} s", flush=True)
            if error:
                failed += 1
                print(error, flush=True)
    print(f"{len(lessons) - failed} of {len(lessons)} lessons ran" + ("" if keep else f"; their outputs are in {folder.relative_to(ROOT)}"))
    return int(failed > 0)


def record(path: Path) -> int:
    """Run every lesson as a plain script on the GPU, so that `timed` measures and writes."""
    if not GPU:
        raise SystemExit("record: needs a GPU; the figures that lessons show without one are in notebooks/course/recorded.json")
    env = os.environ | {"COURSE_RECORD": str(path.resolve()), "MPLBACKEND": "Agg"}
    return max(subprocess.run([sys.executable, str(s)], cwd=FOLDER, env=env, check=False).returncode for s in sources())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m notebooks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "pair", "open"):
        commands.add_parser(name).add_argument("lessons", type=int, nargs=1 if name == "open" else "*")
    commands.choices["run"].add_argument("--write", action="store_true", help="keep the outputs in the committed notebooks")
    commands.add_parser("record").add_argument("file", type=Path)
    asked = parser.parse_args(argv)
    if asked.command == "run":
        return run(asked.lessons, asked.write)
    if asked.command == "record":
        return record(asked.file)
    for source in sources(asked.lessons):
        write(paired(source), source.with_suffix(".ipynb"))
        if asked.command == "open":
            return subprocess.run([sys.executable, "-m", "jupyterlab", str(source.with_suffix(".ipynb"))], check=False).returncode
    return 0
