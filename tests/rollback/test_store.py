"""The ledger on disk survives being killed, and never hands out a damaged record."""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import os
import random
import signal
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from recorded_models import PRELOADED, TokenModel, token_data, token_loss

import gradkern as gk
from gradkern.errors import LedgerError
from gradkern.rollback._layout import Layout, ParameterInfo, Stream
from gradkern.rollback._sharing import unshare
from gradkern.rollback._store import StoreReader, StoreWriter
from gradkern.testing import same_bits

# A server process imports torch once; its children fork from it in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(PRELOADED)

LAYOUT = Layout(
    model=(("weight", (4, 3), "float32"),),
    parameters=(ParameterInfo("weight", (4, 3), owned=True),),
    streams=(Stream("", 0, "matrix"),),
)


def segment_tensors(number: int) -> dict[str, torch.Tensor]:
    return {"number": torch.tensor([number]), "filling": torch.full((20_000,), float(number))}


def write_until_killed(path, committed) -> None:
    store = StoreWriter.create(path, LAYOUT, {"weight": torch.zeros(4, 3)}, {})
    committed.value = 0
    for number in range(1_000_000):
        store.commit_segment(segment_tensors(number), steps=3, visits=7)
        committed.value = number + 1


def train_until_killed(path, committed) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, data = TokenModel(), token_data()
    optimizer = gk.AdamW(model.parameters(), lr=1e-3, max_norm=1.0)
    recorder = gk.rollback.record(model, optimizer, path, steps_per_segment=2)
    for step in range(1_000_000):
        with recorder.batch(range(24)):
            token_loss(model(data), data).backward()
        optimizer.step()
        optimizer.zero_grad()
        # A file of two steps is handed over once the one before it is durable.
        committed.value = (step + 1) // 2 * 2 - 2


def kill_at_random(target, path, seed: int) -> int:
    """Run ``target``, kill it a random moment after its first commit, return what it had reported committed."""
    committed = PROCESSES.Value("q", -1)
    process = PROCESSES.Process(target=target, args=(path, committed))
    process.start()
    deadline = time.monotonic() + 60
    while committed.value < 1:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(random.Random(seed).uniform(0.0, 0.08))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return committed.value


@pytest.mark.parametrize("seed", range(12))
def test_no_committed_segment_is_lost_to_a_kill(tmp_path, seed):
    path = tmp_path / "ledger"
    reported = kill_at_random(write_until_killed, path, seed)
    store = StoreReader(path)
    # The kill may fall between a commit and its report, never the other way round.
    assert reported <= len(store.segments) <= reported + 1
    for number, entry in enumerate(store.segments):
        assert (entry.first_step, entry.end_step, entry.visits) == (3 * number, 3 * number + 3, 7)
        loaded = store.load(entry)
        assert all(torch.equal(loaded[name], value) for name, value in segment_tensors(number).items())
    assert store.closing is None


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_recording_opens_up_to_its_last_commit(tmp_path, seed):
    path = tmp_path / "ledger"
    reported = kill_at_random(train_until_killed, path, seed)
    ledger = gk.rollback.open(path)
    assert not ledger.complete
    assert reported <= ledger.steps <= reported + 4
    assert ledger.visits == 24 * ledger.steps
    model, query = TokenModel(), token_data()[:1]
    with pytest.warns(UserWarning, match=f"ends with step {ledger.steps}"):
        found = ledger.explain(model, query, k=24, loss_fn=token_loss)
    assert len(found) == 24
    report = ledger.verify(model)
    assert not report.passed
    assert [check.passed for check in report.checks] == [True, True, None]
    with pytest.raises(LedgerError, match=r"ended without close\(\)"):
        ledger.conservation(model)


def rewrite(path, name, change) -> None:
    """Change a committed file together with its checksum: what a bug in the writer would leave."""
    tensors = safetensors.torch.load((path / name).read_bytes())
    change(tensors)
    content = safetensors.torch.save(tensors)
    (path / name).write_bytes(content)
    connection = sqlite3.connect(path / "catalog.sqlite")
    with connection:
        connection.execute(
            "UPDATE files SET sha256 = ?, bytes = ? WHERE name = ?",
            (hashlib.sha256(content).hexdigest(), len(content), name),
        )
    connection.close()


def lose_a_visit(tensors):
    tensors["visit/bounds"][-1] -= 1


def point_past_the_visits(tensors):
    tensors["stream/0/visit"][-1] = 99


def change_a_decay(tensors):
    tensors["step/scalars"][0, :, 1] *= 0.999


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_a_visit, "bounds 11 of 12 visits, 12 were committed"),
        (point_past_the_visits, "has records of stream 0 for visits that it does not hold"),
        (change_a_decay, "the decays of embed.weight multiply to"),
    ],
)
def test_records_that_do_not_fit_fail_the_report(recorded, change, message):
    rewrite(recorded.path, "segments/000000.safetensors", change)
    report = recorded.ledger().verify(recorded.model)
    assert [check.passed for check in report.checks] == [True, False, True, True]
    assert message in str(report)


def test_a_parameter_that_moved_without_a_record_fails_the_report(recorded):
    def forget(tensors):
        left = {name: tensor for name, tensor in unshare(tensors).items() if not name.startswith("stream/2/")}
        tensors.clear()
        tensors.update(left)

    for file in sorted((recorded.path / "segments").iterdir()):
        rewrite(recorded.path, f"segments/{file.name}", forget)
    report = recorded.ledger().verify(recorded.model)
    assert not report.passed
    assert "norm.bias moved but has no record" in str(report)


def test_every_damaged_file_is_named(recorded):
    files = sorted((recorded.path / "segments").iterdir())[:2]
    for file in files:
        file.write_bytes(b"")
    report = str(recorded.ledger().verify(recorded.model))
    assert all(file.name in report for file in files)


@pytest.fixture
def recorded(token_model, train):
    return train(token_model, token_data(), steps_per_segment=2)


def test_every_damaged_byte_is_noticed(recorded):
    generator = random.Random(0)
    for file in sorted(recorded.path.rglob("*.safetensors")):
        content = file.read_bytes()
        for position in {0, 7, 8, len(content) - 1, *generator.sample(range(len(content)), 40)}:
            file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            ledger = gk.rollback.open(recorded.path)
            report = ledger.verify(recorded.model)
            assert not report.passed
            assert file.name in str(report)
            with pytest.raises(LedgerError, match=file.name):
                use_everything(ledger, recorded.model)
        file.write_bytes(content)
    assert gk.rollback.open(recorded.path).verify(recorded.model).passed


def use_everything(ledger, model):
    ledger.explain(model, token_data()[:1], loss_fn=token_loss)
    ledger.conservation(model)


def test_every_truncation_is_noticed(recorded):
    for file in sorted(recorded.path.rglob("*.safetensors")):
        content = file.read_bytes()
        for length in {0, 1, 8, len(content) // 2, len(content) - 1}:
            file.write_bytes(content[:length])
            ledger = gk.rollback.open(recorded.path)
            with pytest.raises(LedgerError, match=rf"{file.name}.*has {length} bytes, {len(content)} were"):
                use_everything(ledger, recorded.model)
            assert not ledger.verify(recorded.model).passed
        file.unlink()
        with pytest.raises(LedgerError, match=f"{file.name}.*is missing"):
            use_everything(gk.rollback.open(recorded.path), recorded.model)
        file.write_bytes(content)


def test_the_last_segment_cut_off_at_any_byte_is_noticed(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2, bias=False)
    optimizer = gk.AdamW(model.parameters(), lr=1e-2)
    with gk.rollback.record(model, optimizer, tmp_path / "run", steps_per_segment=1) as recorder:
        for _ in range(2):
            with recorder.batch([0, 1]):
                model(torch.eye(2)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    ledger = gk.rollback.open(tmp_path / "run")
    file = max((tmp_path / "run" / "segments").iterdir())
    size = file.stat().st_size
    assert ledger.verify(model).passed
    for length in reversed(range(size)):
        os.truncate(file, length)
        (files, *_) = ledger.verify().checks
        assert not files.passed
        assert f"has {length} bytes, {size} were committed" in files.detail


def test_a_folder_without_a_ledger_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(LedgerError, match="is no ledger: it has no catalog"):
            gk.rollback.open(path)


def test_a_damaged_catalog_is_refused(recorded):
    catalog = recorded.path / "catalog.sqlite"
    catalog.write_bytes(b"not a database" * 100)
    with pytest.raises(LedgerError, match=r"catalog\.sqlite.*cannot be read"):
        gk.rollback.open(recorded.path)
    catalog.write_bytes(b"")
    with pytest.raises(LedgerError, match="killed before its first commit"):
        gk.rollback.open(recorded.path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", "2", "format version 2, this gradkern reads version 1"),
        ("layout", "{", "does not parse"),
    ],
)
def test_unknown_formats_are_refused(recorded, key, value, message):
    connection = sqlite3.connect(recorded.path / "catalog.sqlite")
    with connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = ?", (value, key))
    connection.close()
    with pytest.raises(LedgerError, match=message):
        gk.rollback.open(recorded.path)


def test_reading_changes_no_file(recorded):
    def state():
        return {
            file: (file.stat().st_mtime_ns, file.read_bytes()) for file in recorded.path.rglob("*") if file.is_file()
        }

    before = state()
    ledger = recorded.ledger()
    ledger.verify(recorded.model)
    use_everything(ledger, recorded.model)
    assert state() == before


@pytest.fixture
def disk(monkeypatch):
    """A disk that can be full: set its only element."""
    original, is_full = os.fsync, [False]

    def fsync(descriptor):
        if is_full[0]:
            raise OSError(28, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return is_full


def step_once(model, optimizer, recorder) -> None:
    data = token_data()
    with recorder.batch(range(24)):
        token_loss(model(data), data).backward()
    try:
        optimizer.step()
    finally:
        optimizer.zero_grad()


def test_a_full_disk_loses_nothing_that_can_still_be_written(token_model, tmp_path, disk):
    """A file that cannot be written is told by the step that hands over the next, and is written with it."""
    optimizer = gk.AdamW(token_model.parameters(), lr=1e-2)
    with gk.rollback.record(token_model, optimizer, tmp_path / "run", steps_per_segment=1) as recorder:
        step_once(token_model, optimizer, recorder)
        recorder.state_dict()
        disk[0] = True
        step_once(token_model, optimizer, recorder)
        with pytest.raises(OSError, match="No space left"):
            step_once(token_model, optimizer, recorder)
        with pytest.raises(OSError, match="No space left"):
            recorder.state_dict()
        step_once(token_model, optimizer, recorder)
        with pytest.raises(OSError, match="No space left"):
            recorder.state_dict()
        assert gk.rollback.open(tmp_path / "run").steps == 1
        disk[0] = False
        step_once(token_model, optimizer, recorder)
        recorder.state_dict()
        assert gk.rollback.open(tmp_path / "run").steps == 5
        disk[0] = True
        step_once(token_model, optimizer, recorder)
        with pytest.raises(OSError, match="No space left"):
            recorder.close()
        assert "forward" not in vars(token_model.hidden)
        with pytest.raises(LedgerError, match="recorder is closed"), recorder.batch([1]):
            pass
        disk[0] = False
        recorder.close()
    ledger = gk.rollback.open(tmp_path / "run")
    assert (ledger.steps, ledger.visits) == (6, 144)
    assert ledger.verify(token_model).passed


def test_on_a_full_disk_training_can_go_on_without_the_recorder(token_model, tmp_path, disk):
    alone = copy.deepcopy(token_model)
    other = gk.AdamW(alone.parameters(), lr=1e-2)
    optimizer = gk.AdamW(token_model.parameters(), lr=1e-2)
    recorder = gk.rollback.record(token_model, optimizer, tmp_path / "run", steps_per_segment=1, on_write_error="stop")
    step_once(token_model, optimizer, recorder)
    recorder.state_dict()
    disk[0] = True
    step_once(token_model, optimizer, recorder)
    with pytest.warns(UserWarning, match=r"No space left.*ends with step 1 of 3\. Training goes on"):
        step_once(token_model, optimizer, recorder)
    disk[0] = False
    assert "forward" not in vars(token_model.hidden)
    step_once(token_model, optimizer, recorder)
    with pytest.raises(LedgerError, match="has stopped"):
        recorder.state_dict()
    recorder.close()
    recorder.close()
    ledger = gk.rollback.open(tmp_path / "run")
    assert (ledger.steps, ledger.complete) == (1, False)
    assert ledger.verify().checks[0].passed
    data = token_data()
    for _ in range(4):
        token_loss(alone(data), data).backward()
        other.step()
        other.zero_grad()
    assert all(map(same_bits, token_model.parameters(), alone.parameters()))


def test_a_disk_that_is_full_at_the_end_can_be_left_at_that(token_model, tmp_path, disk):
    optimizer = gk.AdamW(token_model.parameters(), lr=1e-2)
    recorder = gk.rollback.record(token_model, optimizer, tmp_path / "run", on_write_error="stop")
    step_once(token_model, optimizer, recorder)
    disk[0] = True
    with pytest.warns(UserWarning, match="ends with step 0 of 1"):
        recorder.close()
    assert not gk.rollback.open(tmp_path / "run").complete


def test_steps_wait_for_a_disk_that_is_slow(token_model, tmp_path, monkeypatch):
    """No more than two files of steps are ever in memory."""
    optimizer = gk.AdamW(token_model.parameters(), lr=1e-2)
    commit, turns = StoreWriter.commit_segment, threading.Semaphore(0)
    behind = []

    def slow(self, *args):
        turns.acquire()
        commit(self, *args)

    monkeypatch.setattr(StoreWriter, "commit_segment", slow)
    with gk.rollback.record(token_model, optimizer, tmp_path / "run", steps_per_segment=2) as recorder:
        for _ in range(3):
            step_once(token_model, optimizer, recorder)
        trainer = threading.Thread(target=step_once, args=(token_model, optimizer, recorder))
        trainer.start()
        trainer.join(timeout=1.0)
        behind.append(trainer.is_alive())
        turns.release(100)
        trainer.join()
        behind.append(trainer.is_alive())
    assert behind == [True, False]
    assert recorder.held_bytes() > 0
    assert gk.rollback.open(tmp_path / "run").steps == 4


def test_a_folder_that_another_process_created_meanwhile_is_not_removed(token_model, tmp_path, monkeypatch):
    path = tmp_path / "run"
    make = Path.mkdir

    def lose_the_race(self, *args, **kwargs):
        if self == path:
            make(self)
            (self / "theirs").write_text("precious")
            raise FileExistsError(self)
        make(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", lose_the_race)
    with pytest.raises(LedgerError, match="exists, expected a new folder"):
        gk.rollback.record(token_model, gk.AdamW(token_model.parameters()), path)
    assert (path / "theirs").read_text() == "precious"
    assert "forward" not in vars(token_model.hidden)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupted_commit_is_made_once(token_model, tmp_path, monkeypatch, moment):
    """Ctrl-C around a COMMIT: whether it took effect or not, closing afterwards leaves every step exactly once."""
    optimizer = gk.AdamW(token_model.parameters(), lr=1e-2, max_norm=1.0)
    recorder = gk.rollback.record(token_model, optimizer, tmp_path / "run", steps_per_segment=2)
    commit = StoreWriter._commit
    calls = []

    def interrupted(self, entry, facts, schema=()):
        calls.append(entry.name)
        if len(calls) == 1 and moment == "before":
            raise KeyboardInterrupt
        commit(self, entry, facts, schema)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(StoreWriter, "_commit", interrupted)
    for _ in range(3):
        step_once(token_model, optimizer, recorder)
    with pytest.raises(KeyboardInterrupt):
        step_once(token_model, optimizer, recorder)
    recorder.close()
    assert len(set(calls)) == len(calls), "a file was written twice under one name"
    ledger = gk.rollback.open(tmp_path / "run")
    assert ledger.steps == 4
    assert ledger.visits == 96
    assert ledger.verify(token_model).passed


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupted_close_can_be_repeated(token_model, tmp_path, monkeypatch, moment):
    optimizer = gk.AdamW(token_model.parameters(), lr=1e-2, max_norm=1.0)
    recorder = gk.rollback.record(token_model, optimizer, tmp_path / "run")
    data = token_data()
    with recorder.batch(range(24)):
        token_loss(token_model(data), data).backward()
    optimizer.step()
    commit = StoreWriter._commit

    def interrupted(self, entry, facts, schema=()):
        if entry.role != "deltas" or moment == "after":
            commit(self, entry, facts, schema)
        if entry.role == "deltas":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "_commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recorder.close()
    recorder.close()
    ledger = gk.rollback.open(tmp_path / "run")
    assert (ledger.steps, ledger.visits, ledger.complete) == (1, 24, True)
    assert ledger.verify(token_model).passed
