"""A power cut after any system call of a recorded run, whatever it takes of the unsynced, breaks no promise."""

from __future__ import annotations

import hashlib
import os
import posixpath
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from power_cut import (
    CUTS,
    Disk,
    Image,
    Operation,
    PowerCut,
    below,
    read_image,
    read_trace,
    scattered,
    torn,
    write_image,
)
from power_cut_training import LEDGER, ROWS, RUNS, STEPS, STEPS_PER_SEGMENT
from recorded_models import TokenModel

import gradkern as gk
from gradkern.errors import LedgerError
from gradkern.rollback import Ledger

HERE = Path(__file__).resolve().parent
RANDOM_CUTS = {"torn": torn, "scattered": scattered}
ROUNDS = 8

KEEP_ALL, LOSE_ALL = CUTS["nothing is lost"], CUTS["all is lost"]


@dataclass(frozen=True, slots=True)
class Recording:
    """A traced run.

    Attributes:
        trace: What it did, in order.
        folder: What it left.
        model: The trained model.
    """

    trace: list[Operation]
    folder: Path
    model: TokenModel


@dataclass(frozen=True, slots=True)
class Found:
    """What a reader makes of an image.

    Attributes:
        problem: Why there is no ledger, or what is wrong with it; empty for a sound one.
        refused: Whether it was refused on opening, as what is no ledger yet may be.
        steps: Of the ledger; None where there is none.
        complete: As of the ledger.
    """

    problem: str = ""
    refused: bool = False
    steps: int | None = None
    complete: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """One power cut: after how many operations, what was found, and what is wrong with that (empty if nothing)."""

    position: int
    found: Found
    broken: str


class Reader:
    """Opens the ledger in images, each different one once."""

    def __init__(self, model: TokenModel, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._known: dict[bytes, Found] = {}

    def read(self, image: Image) -> Found:
        key = hashlib.sha256()
        for path, content in sorted(image.items()):
            key.update(repr((path, None if content is None else len(content))).encode())
            key.update(content or b"")
        found = self._known.get(key.digest())
        if found is None:
            folder = self._folder / str(len(self._known))
            folder.mkdir()
            write_image(image, folder)
            found = self._known[key.digest()] = self._open(folder / LEDGER)
            shutil.rmtree(folder)
        return found

    def _open(self, path: Path) -> Found:
        try:
            ledger = gk.rollback.open(path)
        except LedgerError as error:
            return Found(str(error), refused=True)
        try:
            problem = self._problem(ledger)
        except Exception as error:
            # A catalog may be damaged in ways that nobody expects. It was opened all the same, so this is no refusal.
            return Found(repr(error))
        return Found(problem, steps=ledger.steps, complete=ledger.complete)

    def _problem(self, ledger: Ledger) -> str:
        report = ledger.verify(self._model if ledger.complete else None)
        # The law, in the last two, can only be checked for complete ledgers.
        expected = [True, True, True, True] if ledger.complete else [True, True, None]
        if [check.passed for check in report.checks] != expected:
            return str(report)
        if ledger.visits != ROWS * ledger.steps:
            return f"{ledger.visits} visits in {ledger.steps} steps"
        return ""


def broken_promise(found: Found, promise: str | None) -> str:
    """What is wrong with what was found, given the last promise that was made; empty if nothing is."""
    if found.problem:
        return "" if found.refused and promise is None else found.problem
    if promise == "closed":
        return "" if found.complete and found.steps == STEPS else f"promised {STEPS} steps and the end, found {found}"
    # The power may go between a commit and its report.
    promised = int(promise or 0)
    if not promised <= found.steps <= promised + STEPS_PER_SEGMENT:
        return f"promised {promised} steps, found {found}"
    return ""


def cut_everywhere(trace: list[Operation], reader: Reader, kind: str) -> Iterator[Case]:
    """Cut the power before the first operation and after each."""
    disk = Disk()
    promise: str | None = None
    for position in range(len(trace) + 1):
        if position:
            operation = trace[position - 1]
            disk.apply(operation)
            promise = operation.path if operation.name == "mark" else promise
        for cut in power_cuts(kind, position):
            found = reader.read(disk.after(cut))
            yield Case(position, found, broken_promise(found, promise))


def power_cuts(kind: str, position: int) -> list[PowerCut]:
    if kind in CUTS:
        return [CUTS[kind]]
    return [RANDOM_CUTS[kind](random.Random(f"{kind} {position} {number}")) for number in range(ROUNDS)]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> dict[str, Recording]:
    """The runs by name, traced."""
    compiler = shutil.which("cc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("system calls are recorded by a preloaded library, which needs Linux and a C compiler")
    scratch = tmp_path_factory.mktemp("power_cut").resolve()
    library, trace, models, folder = (scratch / name for name in ("trace_writes.so", "trace", "models", "folder"))
    # Some compilers fortify by default, which makes open() and its like more than declarations.
    options = ["-shared", "-fPIC", "-O1", "-U_FORTIFY_SOURCE"]
    subprocess.run([compiler, *options, HERE / "trace_writes.c", "-o", library, "-ldl", "-pthread"], check=True)
    models.mkdir()
    for name in RUNS:
        (folder / name).mkdir(parents=True)
    tracing = {
        "LD_PRELOAD": str(library),
        "TRACE_FOLDER": str(folder),
        "TRACE_FILE": str(trace),
        # It imports what this process imports.
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, HERE / "power_cut_training.py", folder, models]
    subprocess.run(command, env=os.environ | tracing, check=True, timeout=300)
    operations = read_trace(trace)
    found = {}
    for name in RUNS:
        model = TokenModel()
        model.load_state_dict(torch.load(models / name))
        found[name] = Recording(below(operations, name), folder / name, model)
    return found


@pytest.fixture(scope="module")
def recording(recordings) -> Recording:
    return recordings["untroubled"]


@pytest.fixture(scope="module")
def reader(recording, tmp_path_factory) -> Reader:
    return Reader(recording.model, tmp_path_factory.mktemp("images"))


def test_the_trace_misses_nothing(recording):
    """Replayed without a loss it gives what is really there, and SQLite's part in it is seen."""
    disk = Disk()
    for operation in recording.trace:
        disk.apply(operation)
    assert disk.after(KEEP_ALL) == read_image(recording.folder)
    assert disk.after(LOSE_ALL) == read_image(recording.folder)
    done = {(operation.name, operation.path) for operation in recording.trace}
    journal = f"{LEDGER}/catalog.sqlite-journal"
    assert {(name, journal) for name in ("open", "write", "sync", "remove")} <= done
    assert {("write", f"{LEDGER}/catalog.sqlite"), ("sync", f"{LEDGER}/catalog.sqlite")} <= done
    assert not any(path.endswith("-wal") for _, path in done)


@pytest.mark.parametrize("kind", [*CUTS, *RANDOM_CUTS])
def test_no_power_cut_breaks_a_promise(recording, reader, kind):
    cases = list(cut_everywhere(recording.trace, reader, kind))
    assert [case for case in cases if case.broken] == []
    # It has seen the ledger in every state, from not being there to complete.
    ends = [*range(0, STEPS, STEPS_PER_SEGMENT), STEPS]
    seen = {(case.found.steps, case.found.complete) for case in cases}
    assert seen == {(None, False), *((steps, False) for steps in ends), (STEPS, True)}


def first_broken(trace: list[Operation], reader: Reader, kind: str) -> str:
    return next((case.broken for case in cut_everywhere(trace, reader, kind) if case.broken), "")


@pytest.mark.parametrize(
    ("unsynced", "kind", "problem"),
    [
        (r"initial\.partial", "data is lost", r"initial\.safetensors' is damaged: it has 0 bytes"),
        (r"segments/\d+\.partial", "all is lost", r"segments/000000\.safetensors' is damaged: it has 0 bytes"),
        (r"deltas\.partial", "data is lost, sizes are not", r"deltas\.safetensors' is damaged: its checksum differs"),
        (r"segments", "names are lost", r"segments/000000\.safetensors' is missing"),
        (r"\.", "all is lost", "is no ledger"),
        (r"\.\.", "names are lost", "is no ledger"),
        (r"\.\./\.\.", "all is lost", "is no ledger"),
        (r"catalog\.sqlite", "all is lost", "cannot be read"),
        # A transaction that was half written and cannot be rolled back: it can be anything.
        (r"catalog\.sqlite-journal", "scattered", "."),
    ],
)
def test_a_missing_sync_is_noticed(recording, reader, unsynced, kind, problem):
    """Of a run that did not wait for some file or folder, here relative to the ledger, a promise is broken."""
    trace = [
        operation
        for operation in recording.trace
        if not (operation.name == "sync" and re.fullmatch(unsynced, posixpath.relpath(operation.path or ".", LEDGER)))
    ]
    assert len(trace) < len(recording.trace)
    assert re.search(problem, first_broken(trace, reader, kind))


def test_a_journal_that_comes_back_is_noticed(recording, reader):
    """As with SQLite's synchronous = FULL, which does not sync the folder once a transaction's journal has gone."""
    trace = [
        operation
        for number, operation in enumerate(recording.trace)
        # After the removal comes the opening of the folder.
        if not (operation.name == "sync" and recording.trace[number - 2].name == "remove")
    ]
    assert len(trace) < len(recording.trace)
    assert "cannot be read (no such table: meta)" in first_broken(trace, reader, "all is lost")


@pytest.mark.parametrize("run", ["segment_fails", "deltas_fail"])
def test_a_repeated_close_waits_for_the_disk(recordings, tmp_path, run):
    """A commit that fails at its very end, when the journal has gone but not for good, has to be finished."""
    trace = recordings[run].trace
    assert [operation.path for operation in trace if operation.name == "fail"] == [LEDGER]
    cases = cut_everywhere(trace, Reader(recordings[run].model, tmp_path), "all is lost")
    assert [case for case in cases if case.broken] == []


FILE, FOLDER = 3, 4


def disk_after(*operations: Operation) -> Disk:
    disk = Disk()
    for operation in (
        Operation("open", "file", FILE, os.O_CREAT),
        Operation("open", "", FOLDER),
        Operation("write", "file", FILE, data=b"abcd"),
        *operations,
    ):
        disk.apply(operation)
    return disk


SYNC_FILE, SYNC_FOLDER = Operation("sync", "file", FILE), Operation("sync", "", FOLDER)


def test_unsynced_names_and_data_are_lost():
    assert {kind: disk_after().after(cut) for kind, cut in CUTS.items()} == {
        "all is lost": {},
        "nothing is lost": {"file": b"abcd"},
        "data is lost": {"file": b""},
        "data is lost, sizes are not": {"file": b"\0\0\0\0"},
        "names are lost": {},
    }
    assert disk_after(SYNC_FILE).after(LOSE_ALL) == {}
    assert disk_after(SYNC_FOLDER).after(LOSE_ALL) == {"file": b""}
    assert disk_after(SYNC_FILE, SYNC_FOLDER).after(LOSE_ALL) == {"file": b"abcd"}


def test_a_synced_file_keeps_its_data_under_a_new_name():
    rename = Operation("rename", "file", new_path="renamed")
    assert disk_after(SYNC_FILE, SYNC_FOLDER, rename).after(LOSE_ALL) == {"file": b"abcd"}
    assert disk_after(SYNC_FILE, rename, SYNC_FOLDER).after(LOSE_ALL) == {"renamed": b"abcd"}
    assert disk_after(rename, SYNC_FOLDER).after(LOSE_ALL) == {"renamed": b""}
    found = [disk_after(SYNC_FOLDER, rename).after(scattered(random.Random(seed))) for seed in range(50)]
    assert {tuple(image) for image in found} == {(), ("file",), ("renamed",), ("file", "renamed")}


def test_a_write_is_torn_at_any_byte():
    disk = disk_after(SYNC_FILE, SYNC_FOLDER, Operation("write", "file", FILE, number=2, data=b"CDEF"))
    found = {disk.after(torn(random.Random(seed)))["file"] for seed in range(200)}
    assert found == {b"abcd", b"abCd", b"abCD", b"abCDE\0", b"abCDEF", b"abcd\0\0", b"abCd\0\0", b"abCD\0\0"}
