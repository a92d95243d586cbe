"""The commands ``gradkern ledger``, as people run them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import gradkern as gk
from gradkern.command_line import app

MODULE = """
import torch
from torch import nn

def trained():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model.load_state_dict(torch.load("model.pt"))
    return model

def untrained():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

def other():
    return nn.Linear(2, 2)

def wrong():
    return 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A ledger ``run``, its model, and a module that makes it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = gk.AdamW(model.parameters(), lr=1e-2)
    with gk.rollback.record(model, optimizer, tmp_path / "run", steps_per_segment=2) as recorder:
        for _ in range(5):
            with recorder.batch(range(10)):
                nn.functional.cross_entropy(model(torch.randn(10, 6)), torch.arange(10) % 3).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    (tmp_path / "ledger_makers.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ledger_makers", raising=False)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["ledger", *arguments], env={"COLUMNS": "100"})


def test_info_says_what_is_there(folder):
    result = run("info", "run")
    assert result.exit_code == 0, result.output
    assert "run: 5 steps, 50 visits, complete" in result.output
    # Rank 2 of one row: int8 of 6 + 8 and two scales, and the number of the visit.
    (weight,) = [line.split() for line in result.output.splitlines() if "0.weight" in line]
    assert weight[weight.index("0.weight") + 2 :][:2] == [f"{50 * (6 + 8 + 4 + 4 + 4):,}", "│"]
    shares = [float(word[:-1]) for word in result.output.replace("│", " ").split() if word.endswith("%")]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(100.0, abs=0.3)


def test_verify_with_and_without_the_model(folder):
    assert run("verify", "run").exit_code == 0
    result = run("verify", "run", "--model", "ledger_makers:trained")
    assert result.exit_code == 0, result.output
    assert "ledger verification: pass" in result.output
    result = run("verify", "run", "--model", "ledger_makers:untrained")
    assert result.exit_code == 1
    assert "[FAIL] conservation" in result.output


def test_verify_names_what_is_damaged(folder):
    file = folder / "run" / "segments" / "000001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    result = run("verify", "run")
    assert result.exit_code == 1
    assert "000001.safetensors" in result.output


def test_compact_says_what_became_of_it(folder):
    result = run("compact", "run")
    assert result.exit_code == 0, result.output
    assert "run: 1 files of records" in result.output
    assert run("verify", "run", "--model", "ledger_makers:trained").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nowhere"], "is no ledger"),
        (["compact", "nowhere"], "is no ledger"),
        (["verify", "nowhere"], "is no ledger"),
        (["verify", "run", "--model", "ledger_makers:other"], "belongs to another model"),
        (["verify", "run", "--model", "ledger_makers:wrong"], "must return the trained model, got int"),
        (["verify", "run", "--model", "nomodule:make"], "nomodule"),
    ],
)
def test_bad_requests_say_why(folder, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_from_the_shell(folder):
    command = [sys.executable, "-m", "gradkern", "ledger", "info", "run"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    assert "5 steps" in found.stdout
