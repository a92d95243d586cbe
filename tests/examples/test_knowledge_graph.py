"""The example names facts whose absence makes predictions less probable, checked by training without them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import knowledge_graph
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight people of two clubs; friends are of one club, rivals of two; a few facts are held back."""
    people = ["ada", "bo", "cy", "di", "ed", "flo", "gus", "hal"]
    facts = [
        f"{one}\t{'friend' if (i - j) % 2 == 0 else 'rival'}\t{other}"
        for i, one in enumerate(people)
        for j, other in enumerate(people)
        if i != j
    ]
    order = torch.randperm(len(facts), generator=torch.Generator().manual_seed(0)).tolist()
    parts = {"test": order[:4], "valid": order[4:6], "train": order[6:]}
    for part, chosen in parts.items():
        (tmp_path / f"{part}.txt").write_text("".join(f"{facts[number]}\n" for number in chosen))
    return tmp_path


def test_without_the_named_facts_predictions_fall(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert knowledge_graph.main([str(folder), "--predictions", "2", "--facts", "6", "--epochs", "16"]) == 0
    printed = capsys.readouterr().out
    before = [float(each) for each in re.findall(r"^\w+ \w+ \w+: (\d\.\d\d)$", printed, re.MULTILINE)]
    these, neighbours = (
        [float(each) for each in re.findall(rf"without 6 {what}: (\d\.\d\d)", printed)]
        for what in ("these", "neighbours")
    )
    assert len(before) == len(these) == len(neighbours) == 2
    assert sum(these) < 0.8 * sum(before)
    assert sum(these) < sum(neighbours)
    reasons = re.findall(r"because (\w+) (\w+) (\w+) \((.\d\.\d+)\)", printed)
    assert len(reasons) == 6
    known = (folder / "train.txt").read_text().splitlines()
    assert all("\t".join(fact) in known and float(score) > 0 for *fact, score in reasons)


def test_skipped_facts_are_never_seen(folder: Path) -> None:
    graph = knowledge_graph.Graph(folder)
    expected = knowledge_graph.train(graph, 3, without=[1, 4])
    graph.train[[1, 4]] = graph.train[[0, 0]]  # whatever they say
    found = knowledge_graph.train(graph, 3, without=[1, 4])
    assert all(torch.equal(*pair) for pair in zip(found.parameters(), expected.parameters(), strict=True))


def test_predictions_are_no_known_facts(folder: Path) -> None:
    graph = knowledge_graph.Graph(folder)
    tails, probabilities = knowledge_graph.predict(graph, knowledge_graph.train(graph, 1), graph.test)
    known = {tuple(fact) for fact in torch.cat([graph.train, graph.valid]).tolist()}
    assert not {(*fact[:2], tail) for fact, tail in zip(graph.test.tolist(), tails.tolist(), strict=True)} & known
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(graph.test)))


def test_a_folder_without_a_graph_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert knowledge_graph.main([str(tmp_path)]) == 1
    assert "expected a folder with train.txt, valid.txt and test.txt" in capsys.readouterr().err


def test_it_is_a_command() -> None:
    command = [sys.executable, "examples/knowledge_graph.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("(default: ") == 3
