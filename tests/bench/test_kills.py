"""Kills of recording processes are survived, and the count of those that are not can be trusted."""

from __future__ import annotations

import multiprocessing
import sqlite3

import pytest
import torch

from bench import kills
from bench.harness import Report


@pytest.fixture
def trained(tmp_path):
    """A training that ended."""
    threads = torch.get_num_threads()
    heard, told = multiprocessing.Pipe(duplex=False)
    kills.train(tmp_path, told)
    torch.set_num_threads(threads)
    told.close()
    return tmp_path, heard


def test_kills_change_no_byte(monkeypatch):
    monkeypatch.setattr(kills, "KILLS", 10)
    report = Report("rollback", torch.device("cpu"))
    kills.run_kills(report)
    found = {record["metric"]: record["value"] for record in report.records}
    assert found["kills"] == found["kills_tail_identical"] == 10
    assert (found["kills_lost"], found["kills_torn"]) == (0, 0)
    assert found["kills_opening"] + found["kills_training"] + found["kills_closing"] == 10


def test_a_training_tells_what_is_durable_once_it_is(trained):
    _, heard = trained
    told = [heard.recv() for _ in range(7)]
    with pytest.raises(EOFError):
        heard.recv()
    assert told == [
        ("opening", 0),
        ("training", 0),
        ("training", 5),
        ("training", 10),
        ("training", 15),
        ("closing", 15),
        ("closed", 16),
    ]


def lose_a_segment(ledger):
    connection = sqlite3.connect(ledger / "catalog.sqlite")
    with connection:
        connection.execute("DELETE FROM files WHERE role = 'segment' AND end_step = 16")
    connection.close()


def tear_a_segment(ledger):
    file = max((ledger / "segments").iterdir())
    file.write_bytes(file.read_bytes()[:-1])


def lose_the_catalog(ledger):
    (ledger / "catalog.sqlite").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "lost", "torn"),
    [
        (lambda ledger: None, 0, 0),
        (lose_a_segment, 1, 1),
        (tear_a_segment, 0, 1),
        (lose_the_catalog, 1, 1),
    ],
)
def test_damage_is_counted(trained, damage, lost, torn):
    folder, _ = trained
    found = kills.Found()
    damage(folder / "ledger")
    kills.check(folder, "closed", 16, found)
    assert (found.lost, found.torn) == (lost, torn)


def test_a_tail_that_differs_is_seen(trained):
    folder, _ = trained
    before = kills.contents(folder)
    assert kills.contents(folder) == before
    file = max((folder / "ledger" / "segments").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert kills.contents(folder) != before
