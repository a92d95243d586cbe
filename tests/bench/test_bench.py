"""The benchmarks measure what they say and the README shows what they measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import accumulate, cycle, step
from bench.cases import CASES
from bench.harness import Report, Triad, interleave
from bench.table import readme_table

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"suite", "case", "system", "metric", "value", "unit", "env"}


def test_every_system_has_its_turn_in_every_round_and_the_order_rotates():
    calls = []
    systems = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = interleave(systems, torch.device("cpu"), rounds=7, warm_up=2)
    assert {name: len(seconds) for name, seconds in timings.items()} == dict.fromkeys("abc", 7)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert all(sorted(turn) == list("abc") for turn in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def test_cases_are_what_they_say():
    sizes = {name: [torch.Size(shape).numel() for shape in shapes()] for name, shapes in CASES.items()}
    assert len(sizes["gpt2_124m"]) == 148
    assert sum(sizes["gpt2_124m"]) == 124_439_808
    assert len(sizes["small_1500"]) == 1500
    assert 2.2e6 < sum(sizes["small_1500"]) < 2.4e6
    assert sum(sizes["large_8x4096x4096"]) == 8 * 4096**2


@pytest.mark.parametrize("suite", [step, cycle, accumulate], ids=["step", "cycle", "accumulate"])
def test_a_suite_runs_and_writes_records(suite, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suite, "CASES", {"tiny": lambda: [(100,), (5000, 3)]})
    monkeypatch.setattr(suite, "Triad", lambda device: Triad(device, 1 << 14))
    report = Report(suite.__name__, torch.device("cpu"))
    suite.run(report, rounds=7)
    file = tmp_path / "new" / "records.json"
    report.write(str(file))
    records = json.loads(file.read_text())
    assert records
    assert all(set(record) == KEYS and record["value"] > 0 for record in records)
    assert capsys.readouterr().out.count("\n") == len(records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cycle", "--rounds", "3"], "--rounds is 3, expected at least 7"),
        (["nothing"], "invalid choice: 'nothing'"),
        pytest.param(
            ["step", "--device", "cuda"],
            "torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)
def test_bad_arguments(arguments, message):
    run = subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert message in run.stderr


def test_readme_shows_the_published_run():
    records = json.loads((ROOT / "bench" / "results" / "cycle.json").read_text())
    readme = (ROOT / "README.md").read_text()
    begin = "<!-- benchmark figures: begin; from bench/results/cycle.json -->\n"
    shown = readme.partition(begin)[2].partition("<!-- benchmark figures: end -->")[0]
    assert shown == readme_table(records)
