"""The documentation: every Python block of every page runs as printed, every link leads somewhere, every function has a page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import liger_fn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "hooks"))

from formulas import PAGES  # noqa: E402

PAGES_OF = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "notebooks").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{n}")
    for page in PAGES_OF
    if page.name not in ("README.md", "thunder.md")  # tests/test_readme.py, tests/engines/test_thunder.py
    for n, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
]
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    for shown in re.findall(r"# prints (.+)$", block, re.M):
        assert shown in done.stdout


def anchors(page: Path) -> set[str]:
    """The names that headings of a page can be reached by."""
    words = (re.sub(r"[^\w\- ]", "", title.lower()).strip() for title in re.findall(r"^#+ (.+)$", page.read_text(), re.M))
    return {re.sub(r"[\s]+", "-", w) for w in words}


@pytest.mark.parametrize("page", PAGES_OF, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    made = {f"functions/{p.name}.md" for p in PAGES} | {"functions/index.md"}  # at each build, of docs/hooks
    for link in LINK.findall(page.read_text()):
        place, _, anchor = link.partition("#")
        if place.startswith("http") or place in made:
            continue
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{page.name}: {link} leads nowhere"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {target.name} has no heading #{anchor}"


def test_every_function_has_one_page() -> None:
    named = [name for page in PAGES for name in page.functions]
    assert sorted(named) == sorted(liger_fn.__all__)
    listed = (ROOT / "docs/hooks/functions.md").read_text()
    assert [name for name in named if name not in ("backend", "use_backend") and f"`{name}" not in listed] == []


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    assert [p.name for p in sorted((ROOT / "docs").glob("*.md")) if f": {p.name}" not in menu] == []
