"""A planted completion is explained by the passages that state it, and forgotten when they are taken back."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean
from typing import Any

import demo.planted_facts
import pytest
import torch
from demo.planted_facts import CAPITALS, COPIES, LENGTH, Passages, ngram_similarity, question
from language_model import SHOWN, asked, main, precision, train
from rich.progress import Progress

from gradkern.errors import UndoRefusedError, UnstableInfluenceError
from gradkern.rollback import Ledger

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("language")
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["--epochs", "20", "--real", "40", "--seeds", "2", "--out", str(out)]) == 0
    (figures,) = json.loads((out / "language_model.json").read_text())["runs"]
    return printed.getvalue(), figures


def test_completions_are_explained_by_the_passages_that_state_them(run: tuple[str, dict[str, Any]]) -> None:
    _, figures = run
    assert figures["passages"] == 40 + len(CAPITALS) * (COPIES + 2)
    # Seeds 2 to 9 have 0.67 to 0.96, chance 0.08.
    assert fmean(figures["precision"][SHOWN]) >= 0.55
    assert len(figures["precision"][SHOWN]) == len(CAPITALS)


def test_without_them_the_model_does_not_know_the_fact(run: tuple[str, dict[str, Any]]) -> None:
    _, figures = run
    trained, exact, never = (figures["models"][name] for name in ("as trained", "undo, exact", "never trained on them"))
    # Seeds 2 to 9 have 0.81 to 1.95 before and 3.74 to 5.15 after; the other capitals rise by at most 0.91.
    assert trained["losses"][0] < 2.5
    assert exact["losses"][0] > trained["losses"][0] + 1.0
    assert exact["losses"][0] - trained["losses"][0] > fmean(exact["losses"][1:]) - fmean(trained["losses"][1:])
    assert trained["believes"] == "Lutz"
    assert exact["believes"] != "Lutz"
    assert exact == never
    assert figures["exact_is_retraining"] is True


def test_passages_are_shown_as_text(run: tuple[str, dict[str, Any]]) -> None:
    printed, figures = run
    marked = [line for line in printed.splitlines() if "states it" in line]
    assert len(marked) == round(COPIES * figures["precision"][SHOWN][0])
    assert all("The capital of Zubrowka is Lutz." in line for line in marked)
    scores = [float(each) for each in re.findall(r"│ ([+-]\d+\.\d{3}) │", printed)]
    assert len(scores) == COPIES + 3
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0 > scores[-1]


def test_what_is_refused_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    score, undo = Ledger.scores, Ledger.undo

    def without_ref(*args: Any, estimator: str, **kwargs: Any) -> Any:
        if estimator == "ref":
            raise UnstableInfluenceError("it grew", growth=9.0)
        return score(*args, estimator=estimator, **kwargs)

    def without_fast(*args: Any, method: str = "exact", **kwargs: Any) -> Any:
        if method == "fast":
            raise UndoRefusedError("too much")
        return undo(*args, method=method, **kwargs)

    monkeypatch.setattr(Ledger, "scores", without_ref)
    monkeypatch.setattr(Ledger, "undo", without_fast)
    assert main(["--epochs", "1", "--real", "0", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert SHOWN not in printed
    assert "explain, direct" in printed
    assert [line.count("refused") for line in printed.splitlines() if "undo, fast" in line] == [1, 1, 1]


def test_after_little_training_fast_makes_a_change(tmp_path: Path) -> None:
    assert main(["--epochs", "2", "--real", "8", "--out", str(tmp_path)]) == 0
    (figures,) = json.loads((tmp_path / "language_model.json").read_text())["runs"]
    trained, fast, exact = (
        figures["models"][name]["losses"][0] for name in ("as trained", "undo, fast", "undo, exact")
    )
    assert trained < fast < exact


def test_passages_state_facts_and_all_else_is_real() -> None:
    passages = Passages.load(30, seed=5)
    assert passages.tokens.shape == (30 + len(CAPITALS) * (COPIES + 2), LENGTH)
    assert [bytes(row.tolist()).decode() for row in passages.tokens] == list(passages.texts)
    for number, (country, capital) in enumerate(CAPITALS.items()):
        stating = [id for id, text in enumerate(passages.texts) if f"{question(country)} {capital}." in text]
        naming = [id for id, text in enumerate(passages.texts) if country in text]
        assert (passages.states == number).nonzero()[:, 0].tolist() == stating
        assert (passages.names == number).nonzero()[:, 0].tolist() == naming
        assert (len(stating), len(naming)) == (COPIES, COPIES + 2)
    assert len(set(passages.texts)) == len(passages.texts)
    again, other = Passages.load(30, seed=5), Passages.load(30, seed=6)
    assert again.texts == passages.texts != other.texts


def test_too_few_passages_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(demo.planted_facts, "_MODULES", "textwrap heapq no_such_module")
    out = tmp_path / "out"
    assert main(["--out", str(out)]) == 1
    assert "expected 192; ask for at most" in capsys.readouterr().err
    assert not out.exists()


def test_only_the_answer_is_in_the_loss() -> None:
    batch = asked("Zubrowka", "Lutz")
    kept = batch["input_ids"][batch["labels"] >= 0]
    assert bytes(kept.tolist()) == b" Lutz"


def test_similarity_is_one_for_itself_and_zero_for_nothing_shared() -> None:
    passages = Passages.load(10, seed=0)
    found = ngram_similarity(passages.texts[4], passages)
    assert found.argmax() == 4
    assert float(found[4]) == pytest.approx(1.0)
    assert float(ngram_similarity("###", passages).abs().max()) == 0.0


def test_precision_counts_among_the_first() -> None:
    passages = Passages.load(10, seed=0)
    scores = torch.stack([(passages.states == fact).double() for fact in range(len(CAPITALS))])
    assert precision(scores, passages) == (1.0,) * len(CAPITALS)
    assert precision(-scores, passages) == (0.0,) * len(CAPITALS)


def test_passages_left_out_are_never_seen() -> None:
    passages = Passages.load(10, seed=0)
    without = (passages.states == 0).nonzero()[:, 0]
    with Progress(disable=True) as progress:
        expected = train(passages, 1, 1, 0, progress, without=without)
        passages.tokens[without] = 0
        found = train(passages, 1, 1, 0, progress, without=without)
    assert all(torch.equal(*pair) for pair in zip(found.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize(("name", "least"), [("epochs", 1), ("layers", 1), ("real", 0)])
def test_bad_argument_says_what_is_allowed(name: str, least: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([f"--{name}", str(least - 1)])
    assert f"--{name} must be at least {least}, got {least - 1}" in capsys.readouterr().err


def test_it_is_a_command() -> None:
    command = [sys.executable, "examples/language_model.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("(default: ") == 5
