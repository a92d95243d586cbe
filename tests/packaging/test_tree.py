"""Rules that hold for every tracked file."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 600
SOURCES = {".py", ".h", ".cpp", ".inc"}
# A path that only exists on one machine; "/usr/bin/env" and "/dev" are everywhere.
MACHINE_PATH = re.compile(r"(?<![\w.~}/>-])/(?:home|root|Users|work|opt|mnt|srv)/[\w.]")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout: which files are tracked is not known")
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [path for path in files if path.is_file()]


def test_sources_can_be_read_in_one_sitting(tracked: list[Path]) -> None:
    sources = [path for path in tracked if path.suffix in SOURCES]
    assert sources
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in sources}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_no_path_of_one_machine(tracked: list[Path]) -> None:
    found = []
    for path in tracked:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for number, line in enumerate(text.splitlines(), 1)
            if MACHINE_PATH.search(line)
        ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = '/" + "home/someone/x'", True),
        ("see /" + "root/.cache", True),
        ("#!/usr/bin/env bash", False),
        ("https://example.org/home/x", False),
        ("docs/root/x", False),
    ],
)
def test_machine_path_is_recognised(text: str, expected: bool) -> None:
    assert bool(MACHINE_PATH.search(text)) is expected


def test_every_module_states_its_annotations_policy(tracked: list[Path]) -> None:
    modules = [path for path in tracked if path.suffix == ".py" and path.parts[len(ROOT.parts)] == "gradkern"]
    lacking = [
        str(path.relative_to(ROOT))
        for path in modules
        # A package whose only statement is its docstring has nothing to annotate.
        if len(ast.parse(path.read_text()).body) > 1 and "from __future__ import annotations" not in path.read_text()
    ]
    assert lacking == []
