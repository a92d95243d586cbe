"""Compacting changes how many files there are, and nothing else."""

from __future__ import annotations

import copy
import multiprocessing
import random
import time

import pytest
import torch
from recorded_models import PRELOADED, TokenModel, token_data, token_loss
from torch import nn

import gradkern as gk
from gradkern.errors import LedgerError
from gradkern.rollback._segment import Segment
from gradkern.rollback._sharing import unshare
from gradkern.rollback._store import StoreReader

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(PRELOADED)


@pytest.fixture
def recorded(token_model, train):
    return train(token_model, token_data(), steps=9, steps_per_segment=2, name="ledger")


def whole(path) -> dict[str, torch.Tensor]:
    """All records as one segment."""
    store = StoreReader(path)
    parts = [Segment.from_tensors(store.layout, store.load(entry)) for entry in store.segments]
    return unshare(Segment.join(store.layout, parts).tensors())


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.nan_to_num(), expected[name].nan_to_num()), name


def test_all_that_was_recorded_is_still_there(recorded):
    before, tensors = recorded.ledger(), whole(recorded.path)
    scores = before.scores(recorded.model, token_data()[:2], loss_fn=token_loss)
    (recorded.path / "segments" / "000099.safetensors").write_bytes(b"left by a kill")
    (recorded.path / "segments" / "000100.partial").write_bytes(b"left by a kill")
    for name in ("notes.txt", "model.safetensors", "saved.partial", "segments/mine.safetensors"):
        (recorded.path / name).write_text("the user's own")
    assert gk.rollback.compact(recorded.path) == 1
    after = recorded.ledger()
    assert (after.steps, after.visits, after.complete) == (before.steps, before.visits, True)
    assert_equal(whole(recorded.path), tensors)
    assert after.verify(recorded.model).passed
    found = after.scores(recorded.model, token_data()[:2], loss_fn=token_loss)
    assert torch.equal(found.ids, scores.ids)
    torch.testing.assert_close(found.scores, scores.scores, rtol=1e-6, atol=0.0)
    assert len(list((recorded.path / "segments").iterdir())) == 2
    for name in ("notes.txt", "model.safetensors", "saved.partial", "segments/mine.safetensors"):
        assert (recorded.path / name).read_text() == "the user's own"


def test_files_stay_below_what_was_asked_for(recorded):
    tensors = whole(recorded.path)
    sizes = [entry.bytes for entry in StoreReader(recorded.path).segments]
    assert gk.rollback.compact(recorded.path, segment_bytes=sizes[0] + sizes[1]) == 3
    entries = StoreReader(recorded.path).segments
    assert [(entry.first_step, entry.end_step) for entry in entries] == [(0, 4), (4, 8), (8, 9)]
    assert max(entry.bytes for entry in entries) <= sizes[0] + sizes[1]
    assert gk.rollback.compact(recorded.path, segment_bytes=1) == 3
    assert_equal(whole(recorded.path), tensors)


class Branches(nn.Module):
    """Uses one layer in the first steps and the other in the last."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, use_second):
        return (self.second if use_second else self.first)(x)


def test_steps_that_left_a_parameter_alone(tmp_path):
    """Short files joined are the one long file that could have been written."""

    def record(path, steps_per_segment):
        torch.manual_seed(0)
        model = Branches()
        optimizer = gk.AdamW(model.parameters(), lr=1e-2)
        with gk.rollback.record(model, optimizer, path, steps_per_segment=steps_per_segment) as recorder:
            for step in range(6):
                with recorder.batch(range(4)):
                    model(torch.randn(4, 3), step >= 2).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return model

    model = record(tmp_path / "short", 2)
    record(tmp_path / "long", 6)
    assert gk.rollback.compact(tmp_path / "short") == 1
    assert gk.rollback.open(tmp_path / "short").verify(model).passed
    long = StoreReader(tmp_path / "long")
    (entry,) = long.segments
    assert_equal(whole(tmp_path / "short"), unshare(long.load(entry)))


def test_a_ledger_can_be_resumed_inside_a_file(tmp_path):
    """From a checkpoint at which a file ended once: that file comes back, byte for byte."""
    torch.manual_seed(0)
    model = TokenModel()
    optimizer, path, data = gk.AdamW(model.parameters(), lr=1e-2), tmp_path / "ledger", token_data()
    states = []

    def train(recorder, steps):
        for _ in range(steps):
            with recorder.batch(range(24)):
                token_loss(model(data), data).backward()
            optimizer.step()
            optimizer.zero_grad()

    with gk.rollback.record(model, optimizer, path) as recorder:
        for steps in (2, 3):
            train(recorder, steps)
            parts = {"model": model, "optimizer": optimizer, "recorder": recorder}
            states.append({name: copy.deepcopy(part.state_dict()) for name, part in parts.items()})
    files = [(path / entry.name).read_bytes() for entry in StoreReader(path).segments]
    assert gk.rollback.compact(path) == 1
    for steps, state in zip((5, 2), reversed(states), strict=True):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        with gk.rollback.record(model, optimizer, path, resume=state["recorder"]) as recorder:
            assert gk.rollback.open(path).steps == steps
            train(recorder, 3)
        assert gk.rollback.open(path).verify(model).passed
    first, second = StoreReader(path).segments
    assert [(path / first.name).read_bytes(), (path / second.name).read_bytes()] == files


def test_bad_requests_are_refused(recorded, tmp_path):
    with pytest.raises(ValueError, match="segment_bytes must be at least 1, got 0"):
        gk.rollback.compact(recorded.path, segment_bytes=0)
    with pytest.raises(LedgerError, match="is no ledger"):
        gk.rollback.compact(tmp_path / "nowhere")
    model = TokenModel()
    with (
        gk.rollback.record(model, gk.AdamW(model.parameters()), tmp_path / "open"),
        pytest.raises(LedgerError, match="something records into"),
    ):
        gk.rollback.compact(tmp_path / "open")
    files = sorted((recorded.path / "segments").iterdir())
    files[1].write_bytes(files[1].read_bytes()[:-1] + b"x")
    before = {file: file.read_bytes() for file in files}
    with pytest.raises(LedgerError, match=r"000001.* is damaged"):
        gk.rollback.compact(recorded.path)
    assert {file: file.read_bytes() for file in files} == before


def compact_in_child(path, started) -> None:
    started.set()
    gk.rollback.compact(path, segment_bytes=1 << 14)


@pytest.mark.parametrize("seed", range(6))
def test_kills_lose_nothing(recorded, seed):
    tensors, drawn = whole(recorded.path), random.Random(seed)
    started = PROCESSES.Event()
    process = PROCESSES.Process(target=compact_in_child, args=(recorded.path, started))
    process.start()
    assert started.wait(60)
    time.sleep(drawn.uniform(0.0, 0.04))
    process.kill()
    process.join()
    assert recorded.ledger().verify(recorded.model).passed
    assert_equal(whole(recorded.path), tensors)
    gk.rollback.compact(recorded.path)
    assert_equal(whole(recorded.path), tensors)
