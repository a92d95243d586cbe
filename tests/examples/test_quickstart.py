"""The main job, small, in a process of its own; and its report in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from browser import load

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
SECTIONS = ["headline", "memory", "training", "timing", "influence", "ledger"]
CHARTS = ["memory-timeline", "loss-curve", "norm-curve"]
# Writes down where the browser put each part, so that a part that is there but not seen is noticed.
LAYOUT_PROBE = """
const layout = {};
for (const id of %s) {
  const box = document.getElementById(id).getBoundingClientRect();
  layout[id] = [box.width, box.height];
}
layout.page = [document.documentElement.scrollWidth, window.innerWidth];
document.body.dataset.layout = JSON.stringify(layout);
"""


def run_quickstart(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "examples/quickstart.py", "--out", str(out), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("quickstart")
    size = ["--steps", str(STEPS), "--layers", "6", "--width", "32", "--length", "256"]
    done = run_quickstart(out, *size)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def figures(small_run: tuple[Path, str]) -> dict[str, Any]:
    out, _ = small_run
    return json.loads((out / "quickstart.json").read_text())


def test_memory_stays_in_its_budget(figures: dict[str, Any]) -> None:
    assert figures["budget_bytes"] <= 0.6 * figures["natural_peak_bytes"]
    assert figures["measured_peak_bytes"] <= figures["budget_bytes"]
    assert figures["predicted_peak_bytes"] <= figures["budget_bytes"]


def test_model_learns(figures: dict[str, Any]) -> None:
    assert figures["steps"] == STEPS
    assert figures["loss_first"] == pytest.approx(5.55, abs=0.3)  # ln 256: it knows nothing yet
    assert figures["loss_last"] < 0.9 * figures["loss_first"]


def test_ledger_conserves(figures: dict[str, Any]) -> None:
    assert 0 <= figures["conservation_error"] <= 1e-5


def test_times_are_positive(figures: dict[str, Any]) -> None:
    assert figures["cycle_ratio"] > 0
    assert figures["step_ratio"] > 0


def test_every_influence_leads_back_to_its_file_and_line(small_run: tuple[Path, str]) -> None:
    out, printed = small_run
    places = re.findall(r"<code>([\w./]+\.py):(\d+)</code></td>", (out / "report.html").read_text())
    assert len(places) == 5
    for path, line in places:
        assert f"{path}:{line}" in printed
        source = Path(os.__file__).parent / path
        assert 1 <= int(line) <= len(source.read_bytes().splitlines())


def test_second_run_replaces_the_first(small_run: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = small_run
    again = tmp_path / "out"
    shutil.copytree(out, again)
    done = run_quickstart(again, "--steps", "8", "--layers", "6", "--width", "32", "--length", "128")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((again / "quickstart.json").read_text())["steps"] == 8


def test_too_few_steps_say_so(tmp_path: Path) -> None:
    done = run_quickstart(tmp_path, "--steps", "2")
    assert done.returncode == 2
    assert "--steps must be at least 8, got 2" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dark", [False, True])
def test_report_stands_in_a_real_browser(small_run: tuple[Path, str], tmp_path: Path, dark: bool) -> None:
    out, _ = small_run
    probe = LAYOUT_PROBE % json.dumps([*SECTIONS, *CHARTS, "influence-table", "prediction"])
    loaded = load(out / "report.html", tmp_path, probe=probe, dark=dark)
    assert loaded.console == []
    dom = loaded.dom
    assert "What one training run did" in dom
    assert dom.count("<svg") == len(CHARTS)
    (encoded,) = re.findall(r'data-layout="([^"]+)"', dom)
    layout = json.loads(encoded.replace("&quot;", '"'))
    content_width, window_width = layout.pop("page")
    assert content_width <= window_width, "the page scrolls sideways"
    for part, (width, height) in layout.items():
        assert width > 200, part
        assert height > 40, part
    for chart in CHARTS:
        assert layout[chart][1] > 150, chart
