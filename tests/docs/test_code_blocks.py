"""What README and the pages show is run: Python as one session a page, shell as targets that exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "DESIGN.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# An HTML comment before a block says why it is not run; the reason is there for the reader of the source.
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start(3)), match[3])
        for match in BLOCK.finditer(text)
        if match[2] == language and match[1] is None
    ]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# A page is a process of its own, as for whoever tries it: a plan counts every tensor alive, also those of other tests.
RUNNER = """
import json, sys, warnings
import gradkern
warnings.simplefilter("error")
page, blocks = sys.argv[1], json.load(sys.stdin)
session = {"__name__": "__main__"}
for line, source in blocks:
    # Blank lines put the block at its own line, so that a traceback points into the page.
    exec(compile("\\n" * line + source, page, "exec"), session)
"""


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(page)],
        input=json.dumps(blocks(page, "python")),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_make_targets_in_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {
        (name_of(page), target)
        for page in PAGES
        for _, source in blocks(page, "bash")
        for target in re.findall(r"^make ([a-z-]+)", source, re.MULTILINE)
    }
    assert used
    assert {(page, target) for page, target in used if target not in targets} == set()


def test_readme_is_short_and_begins_with_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    commands = [line.split()[0:2] for _, block in blocks(ROOT / "README.md", "bash")[:1] for line in block.splitlines()]
    assert commands == [["make", "demo"], ["make", "test"]]


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (ROOT / "docs/index.md").read_text()
    listed = set(re.findall(r"^([a-z-]+)$", index, re.MULTILINE))
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} == listed | {"index"}
