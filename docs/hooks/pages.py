"""What MkDocs does besides: a page for every function, formulas as MathML, and the repository's files linked where they are.

A page of functions is made at each build: the formula and the docstring, costs as `tests/bench/table.py` counts them, and pictures of the
committed measurements.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Mapping
from functools import cache, reduce
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, Path(__file__).parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from formulas import PAGES, Page  # noqa: E402
from latex2mathml.converter import convert  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402

import liger_fn  # noqa: E402
from tests.bench import figures, report, results, table  # noqa: E402
from tests.bench.results import Result  # noqa: E402

BYTES = 2  # of a number in bf16


def cost(page: Page) -> str:
    """What a call must move and compute at the least."""
    lines = [page.cost] if page.cost else []
    for bench in table.present():
        if bench.op not in page.functions:
            continue
        (read, both), (product, products) = bench.passes, bench.products
        if read:
            lines.append(
                f"`{bench.op}` must move {read} arrays of the input's size in forward, {both} in forward + backward: "
                f"{read * BYTES} and {both * BYTES} bytes an element in bf16. Weights and statistics are small beside them."
            )
        elif product and not page.cost:
            lines.append(f"`{bench.op}` is {product} matrix products in forward and {products} in forward + backward.")
    return "\n\n".join(lines)


@cache
def measured() -> list[Result]:
    """What each machine's runs found together, the newest first: the sections of docs/benchmarks.md."""
    runs = report.together({path.stem: results.load(path) for path in results.FOLDER.glob("*.json")})
    return [reduce(Result.with_later, group.values()) for group in reversed(runs.values())]


def pictures(page: Page) -> dict[str, tuple[bytes, str]]:
    """Pictures of the page's functions, as docs/benchmarks.md has them of all functions, and the machine of each."""
    made: dict[str, tuple[bytes, str]] = {}
    for kind in CAPTIONS:
        for result in measured():
            mine = [row for row in report.drawn(result).get(kind, ()) if row.op in page.functions]
            if mine:
                m = result.machine
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "figure.png"
                    getattr(figures, kind)(mine, "", path)
                    made[f"{page.name}-{kind}.png"] = (
                        path.read_bytes(),
                        f"{m['device']}, torch {m['torch']}, triton {m['triton']}, {m['date']}",
                    )
                break
    return made


CAPTIONS = {
    "time": "Time against size",
    "heads": "Time and workspace by tokens",
    "floor": "How much of the machine's rate each reaches",
}


def write(page: Page, drawn: Mapping[str, tuple[bytes, str]]) -> str:
    """The Markdown of one page."""
    parts = [f"# {page.name}" if page.name not in page.functions or len(page.functions) > 1 else f"# liger_fn.{page.name}"]
    parts += [f"$${formula}$$" for formula in page.formulas]
    if said := cost(page):
        parts += ["## At the least", said]
    for name, (_, machine) in drawn.items():
        title = CAPTIONS[name.removesuffix(".png").removeprefix(f"{page.name}-")]
        parts += [f"![{page.name}: {title}](figures/{name})", f"*{title}: {machine}.*"]
    if drawn:
        parts.append("Made by `make bench`; every figure is in [the benchmarks](../benchmarks.md).")
    parts += [f"::: {getattr(liger_fn, name).__module__}.{name}" for name in page.functions]  # not the module that may have its name
    return "\n\n".join(parts) + "\n"


def index() -> str:
    """The list of all functions, each with a link to its page."""
    places = {name: page.name for page in PAGES for name in page.functions}

    def linked(match: re.Match[str]) -> str:
        return f"[{match[0]}]({places[match[1]]}.md)" if match[1] in places else match[0]

    lines = Path(__file__).with_name("functions.md").read_text().splitlines()
    for n, line in enumerate(lines):
        if line.startswith("| `"):
            first, *rest = line.split(" | ")
            lines[n] = " | ".join([re.sub(r"`(\w+)[^`]*`", linked, first), *rest])
    return "\n".join(lines) + "\n"


def on_files(files: Files, config: Any) -> Files:
    """Add what is made rather than kept."""
    files.append(File.generated(config, "functions/index.md", content=index()))
    for page in PAGES:
        drawn = pictures(page)
        for name, (content, _) in drawn.items():
            files.append(File.generated(config, f"functions/figures/{name}", content=content))
        files.append(File.generated(config, f"functions/{page.name}.md", content=write(page, drawn)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """`$$…$$` as MathML, which browsers draw without a script; links out of docs/ lead to the file's place in the repository."""
    markdown = re.sub(r"\$\$(.+?)\$\$", lambda m: convert(m[1], display="block"), markdown, flags=re.S)
    return re.sub(r"\[([^\]]*)\]\((?:\.\./)+((?:tests|examples|notebooks|README|CONTRIBUTING|liger_)[^)]*)\)", r"\1 (`\2`)", markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """A function's body returns its checked arguments to `custom_vjp`: what a caller gets is under Returns."""
    html = re.sub(r'\s*<span class="o">-&gt;</span>\s*(?:<span class="n">|<a [^>]*>)*Args(?:</span>|</a>)*', "", html)
    return re.sub(r"<code>(?:<[^>]+>)*Args(?:</[^>]+>)*</code>", "", html)
