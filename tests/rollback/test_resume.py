"""Recording goes on from a checkpoint as if there had been no break, whatever became of the process meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import shutil

import pytest
import torch
from recorded_models import PRELOADED, TokenModel, token_data, token_loss

import gradkern as gk
from gradkern.errors import LedgerError
from gradkern.rollback._segment import StepRecord
from gradkern.rollback._store import StoreReader
from gradkern.testing import same_bits

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(PRELOADED)

STEPS = 11
CHECKPOINT_EVERY = 4


def made(seed=0):
    torch.manual_seed(seed)
    model = TokenModel()
    return model, gk.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, max_norm=0.5)


def step_once(model, optimizer, recorder, step) -> None:
    data = token_data()
    for half in (0, 1):
        rows = (torch.arange(3) + 6 * step + 3 * half) % len(data)
        with recorder.batch(rows + 100):
            (token_loss(model(data[rows]), data[rows]) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()


def checkpoint(path, model, optimizer, recorder, step) -> None:
    """As people write them: to a temporary file first."""
    state = {"model": model, "optimizer": optimizer, "recorder": recorder}
    torch.save({"step": step, **{name: each.state_dict() for name, each in state.items()}}, f"{path}.partial")
    os.replace(f"{path}.partial", path)


def train(ledger, saved, steps=STEPS) -> TokenModel:
    """Train to the end, from the checkpoint if there is one."""
    model, optimizer = made()
    first, resume = 0, None
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, resume = state["step"], state["recorder"]
    elif ledger.exists():
        shutil.rmtree(ledger)
    with gk.rollback.record(model, optimizer, ledger, steps_per_segment=3, resume=resume) as recorder:
        for step in range(first, steps):
            step_once(model, optimizer, recorder, step)
            if (step + 1) % CHECKPOINT_EVERY == 0:
                checkpoint(saved, model, optimizer, recorder, step + 1)
    return model


def contents(ledger):
    """Every committed file's bytes, by role and steps."""
    store = StoreReader(ledger)
    return {(entry.role, entry.first_step, entry.end_step): (ledger / entry.name).read_bytes() for entry in store.files}


@pytest.fixture
def unbroken(tmp_path):
    model = train(tmp_path / "unbroken", tmp_path / "unbroken.pt")
    return model, contents(tmp_path / "unbroken")


def test_a_resumed_ledger_is_the_unbroken_one(tmp_path, unbroken):
    """Also where the run before went on past its checkpoint, and even was closed."""
    expected_model, expected = unbroken
    assert [key[1:] for key in expected if key[0] == "segment"] == [(0, 3), (3, 4), (4, 7), (7, 8), (8, 11)]
    for stop_after in (4, 6, 8, 9):
        ledger, saved = tmp_path / f"ledger{stop_after}", tmp_path / f"{stop_after}.pt"
        train(ledger, saved, steps=stop_after)
        assert gk.rollback.open(ledger).complete
        (ledger / "segments" / "000099.partial").write_bytes(b"left by a kill")
        model = train(ledger, saved)
        assert contents(ledger) == expected
        assert all(map(same_bits, model.parameters(), expected_model.parameters()))
        assert gk.rollback.open(ledger).verify(model).passed
        named = {entry.name for entry in StoreReader(ledger).files}
        files = {file.relative_to(ledger).as_posix() for file in ledger.rglob("*.*") if file.is_file()}
        assert files == named | {"catalog.sqlite", "writer.lock"}


def test_state_is_taken_between_steps_alone(tmp_path, token_model):
    optimizer = gk.AdamW(token_model.parameters(), lr=1e-2)
    recorder = gk.rollback.record(token_model, optimizer, tmp_path / "ledger")
    with recorder.batch(range(24)):
        token_loss(token_model(token_data()), token_data()).backward()
    with pytest.raises(LedgerError, match="gradients of 24 visits wait for a step"):
        recorder.state_dict()
    recorder.discard()
    optimizer.zero_grad()
    assert recorder.state_dict()["steps"] == 0
    recorder.close()
    with pytest.raises(LedgerError, match="is closed"):
        recorder.state_dict()


@pytest.fixture
def broken_off(tmp_path):
    """A ledger of six steps with a checkpoint after four, and what was saved."""
    train(tmp_path / "ledger", tmp_path / "saved.pt", steps=6)
    return tmp_path / "ledger", torch.load(tmp_path / "saved.pt", weights_only=True)


def restored(state):
    model, optimizer = made()
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return model, optimizer


def everything(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({"ledger_id": "f00"}, {}, LedgerError, r"is another ledger \(.*\) than the one that the state_dict\(\) is of"),
        ({"steps": 8}, {}, LedgerError, "cannot go on after step 8: it holds 6 steps"),
        ({"parameter_digest": ""}, {}, LedgerError, "differ from those of the checkpoint"),
        ({}, {"rank": 3}, LedgerError, "another rank="),
        ({}, {"unowned": ["norm.*"]}, LedgerError, "unowned="),
        ({"sums": None}, {}, ValueError, "a mapping without sums"),
    ],
)
def test_what_does_not_belong_together_is_refused(broken_off, change, options, error, message):
    ledger, state = broken_off
    given = {**state["recorder"], **change}
    if change == {"sums": None}:
        del given["sums"]
    model, optimizer = restored(state)
    before = everything(ledger)
    with pytest.raises(error, match=message):
        gk.rollback.record(model, optimizer, ledger, resume=given, **options)
    assert everything(ledger) == before
    assert "forward" not in vars(model.hidden)
    gk.rollback.record(model, optimizer, ledger, resume=state["recorder"]).close()


def test_a_damaged_or_missing_ledger_is_not_gone_on_with(broken_off, tmp_path):
    ledger, state = broken_off
    with pytest.raises(LedgerError, match="is no ledger"):
        gk.rollback.record(*restored(state), tmp_path / "nowhere", resume=state["recorder"])
    assert not (tmp_path / "nowhere").exists()
    (ledger / "segments" / "000000.safetensors").write_bytes(b"")
    with pytest.raises(LedgerError, match="has 0 bytes"):
        gk.rollback.record(*restored(state), ledger, resume=state["recorder"])


def test_an_optimizer_that_was_not_loaded_is_refused(broken_off):
    ledger, state = broken_off
    model, optimizer = made()
    model.load_state_dict(state["model"])
    before = everything(ledger)
    with pytest.raises(LedgerError, match="has made 0 steps, expected 4"):
        gk.rollback.record(model, optimizer, ledger, resume=state["recorder"])
    assert everything(ledger) == before


def test_a_step_that_was_interrupted_is_not_forgotten(tmp_path, token_model, monkeypatch):
    optimizer = gk.AdamW(token_model.parameters(), lr=1e-2)
    recorder = gk.rollback.record(token_model, optimizer, tmp_path / "ledger")
    step_once(token_model, optimizer, recorder, 0)
    with monkeypatch.context() as patch:
        patch.setattr(StepRecord, "nbytes", lambda self: interrupt())
        with pytest.raises(KeyboardInterrupt):
            step_once(token_model, optimizer, recorder, 1)
    optimizer.zero_grad()
    step_once(token_model, optimizer, recorder, 2)
    with pytest.raises(LedgerError, match="lacks it for good; go back to a checkpoint"):
        recorder.state_dict()
    recorder.close()


def interrupt():
    raise KeyboardInterrupt


def test_momentum_without_its_ledger_is_refused(broken_off, tmp_path):
    _, state = broken_off
    with pytest.raises(LedgerError, match=r"already made 4 steps.*resume="):
        gk.rollback.record(*restored(state), tmp_path / "other")


def test_one_records_at_a_time(broken_off):
    ledger, state = broken_off
    first = gk.rollback.record(*restored(state), ledger, resume=state["recorder"])
    with pytest.raises(LedgerError, match=r"something records into .* already"):
        gk.rollback.record(*restored(state), ledger, resume=state["recorder"])
    first.close()
    gk.rollback.record(*restored(state), ledger, resume=state["recorder"]).close()


def hold(ledger, state, is_open, may_end) -> None:
    with gk.rollback.record(*restored(state), ledger, resume=state["recorder"]):
        is_open.set()
        may_end.wait()


def test_nor_does_another_process(broken_off):
    ledger, state = broken_off
    is_open, may_end = PROCESSES.Event(), PROCESSES.Event()
    process = PROCESSES.Process(target=hold, args=(ledger, state, is_open, may_end))
    process.start()
    assert is_open.wait(60)
    with pytest.raises(LedgerError, match="something records into"):
        gk.rollback.record(*restored(state), ledger, resume=state["recorder"])
    process.kill()  # a lock must not outlive the process
    process.join()
    gk.rollback.record(*restored(state), ledger, resume=state["recorder"]).close()
