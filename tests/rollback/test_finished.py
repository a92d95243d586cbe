"""A finished ledger gives back the deltas that its ledger has, as exactly as its rank allows, or refuses."""

from __future__ import annotations

import os

import pytest
import torch
from recorded_models import token_data, token_loss
from safetensors.torch import load_file, save_file
from test_paper import all_deltas, record_triples, triples_data, triples_loss
from torch import nn

import gradkern as gk
from gradkern.errors import LedgerError
from gradkern.rollback import _finished, _tensor_file
from gradkern.rollback._json_tensor import from_tensor, to_tensor


@pytest.fixture
def token_run(token_model, train):
    run = train(token_model, token_data(), steps=9)
    return token_model, run


def largest_error(found, expected):
    return float((found - expected).norm() / expected.norm())


def expected_by_name(ledger):
    ids, deltas, _ = all_deltas(ledger)
    return ids, {ledger._layout.parameters[index].name: each for index, each in deltas.items()}


def test_with_full_rank_deltas_come_back_up_to_int8(token_run, tmp_path):
    model, run = token_run
    ids, expected = expected_by_name(run.ledger())
    finished = gk.rollback.finish(run.path, tmp_path / "all.safetensors", rank=12)
    assert torch.equal(finished.ids, ids)
    found = finished.deltas(ids)
    assert found.keys() == expected.keys() == {name for name, _ in model.named_parameters()}
    for name, each in expected.items():
        assert found[name].shape == each.shape
        assert largest_error(found[name], each) < 0.02, name


@pytest.mark.parametrize("rank", [1, 2])
def test_at_low_rank_they_are_near_the_best_approximation(rank, token_run, tmp_path):
    _, run = token_run
    ids, expected = expected_by_name(run.ledger())
    finished = gk.rollback.finish(run.path, tmp_path / "low.safetensors", rank=rank)
    assert finished.rank == rank
    for name, found in finished.deltas(ids).items():
        if found.dim() == 3:
            left, sizes, right = torch.linalg.svd(expected[name], full_matrices=False)
            best = (left[..., :rank] * sizes[:, None, :rank]) @ right[:, :rank]
            # One power iteration from random directions, and int8.
            best_error = largest_error(best, expected[name])
            assert best_error <= largest_error(found, expected[name]) <= 1.25 * best_error + 0.02, name
            assert torch.linalg.matrix_rank(found, rtol=1e-4).max() <= rank
        else:
            assert largest_error(found, expected[name]) < 0.02, name


def test_rows_of_embeddings_come_back_and_no_others(tmp_path):
    _, ledger = record_triples(tmp_path / "run", steps=30)
    ids, expected = expected_by_name(ledger)
    finished = gk.rollback.finish(tmp_path / "run", tmp_path / "out.safetensors", rank=4)
    for name, found in finished.deltas(ids).items():
        assert largest_error(found, expected[name]) < 0.02
        assert not found[(expected[name] == 0).all(dim=-1)].any()
    # One relation a sample: one row, whatever the rank.
    assert load_file(tmp_path / "out.safetensors")["delta/1/right"].shape[1] <= 2


def test_samples_are_given_in_the_order_asked_for(token_run, tmp_path):
    _, run = token_run
    finished = gk.rollback.finish(run.path, tmp_path / "out.safetensors")
    every = finished.deltas(finished.ids)
    places = torch.tensor([5, 0, 5])
    for name, found in finished.deltas(finished.ids[places]).items():
        assert torch.equal(found, every[name][places])


def test_chunks_come_to_the_same_file(tmp_path, monkeypatch):
    record_triples(tmp_path / "run")
    gk.rollback.finish(tmp_path / "run", tmp_path / "one.safetensors")
    read = _finished.read_deltas
    monkeypatch.setattr(_finished, "read_deltas", lambda store: read(store, chunk_bytes=2000))
    finished = gk.rollback.finish(tmp_path / "run", tmp_path / "many.safetensors")
    whole = gk.rollback.open_finished(tmp_path / "one.safetensors")
    for name, each in whole.deltas(whole.ids).items():
        torch.testing.assert_close(
            finished.deltas(whole.ids)[name], each, rtol=0.0, atol=0.01 * float(each.abs().max())
        )


def test_scores_are_those_of_the_direct_estimator(token_run, tmp_path):
    model, run = token_run
    query = token_data()[2:4]
    finished = gk.rollback.finish(run.path, tmp_path / "out.safetensors", rank=12)
    found = finished.scores(model, query, loss_fn=token_loss)
    expected = run.ledger().scores(model, query, loss_fn=token_loss, estimator="direct")
    assert torch.equal(found.ids, expected.ids)
    assert largest_error(found.scores, expected.scores) < 0.02
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.raises(LedgerError, match="differ from those at the end of the recording"):
        finished.scores(model, query, loss_fn=token_loss)
    with pytest.raises(LedgerError, match="another model"):
        finished.scores(nn.Linear(2, 2), query, loss_fn=token_loss)


def test_a_linear_takes_the_bytes_of_its_rank(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = gk.AdamW(model.parameters(), lr=3e-3)
    inputs, labels = torch.randn(300, 64), torch.randint(0, 10, (300,))
    with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder:
        for rows in torch.arange(300).split(50):
            with recorder.batch(rows):
                nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    finished = gk.rollback.finish(tmp_path / "run", tmp_path / "out.safetensors")
    per_sample = 8 + (64 + 64 + 8) + (64 + 4) + (64 + 10 + 8) + (10 + 4)
    assert 0 <= finished.nbytes - 300 * per_sample < 4096
    assert finished.nbytes == (tmp_path / "out.safetensors").stat().st_size
    ids, expected = expected_by_name(gk.rollback.open(tmp_path / "run"))
    flat = [torch.cat([each[name].flatten(1) for name in expected], dim=1) for each in (finished.deltas(ids), expected)]
    assert float(nn.functional.cosine_similarity(*flat, dim=1).mean()) > 0.95


def test_what_interrupts_writing_leaves_no_file(tmp_path, monkeypatch):
    record_triples(tmp_path / "run")

    def fail(descriptor):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(_tensor_file.os, "fsync", fail)
        with pytest.raises(OSError, match="no space left"):
            gk.rollback.finish(tmp_path / "run", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    # A second attempt takes over what the first left.
    gk.rollback.finish(tmp_path / "run", tmp_path / "out.safetensors")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.safetensors", "run"]


def test_the_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    record_triples(tmp_path / "run")
    seen = []
    fsync = os.fsync

    def note(descriptor):
        seen.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "out.safetensors").exists()))
        fsync(descriptor)

    monkeypatch.setattr(_tensor_file.os, "fsync", note)
    gk.rollback.finish(tmp_path / "run", tmp_path / "out.safetensors")
    assert seen == [(str(tmp_path / "out.partial"), False), (str(tmp_path), True)]


@pytest.mark.parametrize("place", [0, 100, -1])
def test_damage_is_refused(place, tmp_path):
    record_triples(tmp_path / "run")
    file = tmp_path / "out.safetensors"
    gk.rollback.finish(tmp_path / "run", file)
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(LedgerError, match="damaged"):
        gk.rollback.open_finished(file)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(LedgerError, match="damaged"):
        gk.rollback.open_finished(file)


def test_what_is_none_is_refused(tmp_path):
    with pytest.raises(LedgerError, match="is no file"):
        gk.rollback.open_finished(tmp_path / "none.safetensors")
    save_file({"ids": torch.arange(3)}, tmp_path / "other.safetensors")
    with pytest.raises(LedgerError, match="is no finished ledger"):
        gk.rollback.open_finished(tmp_path / "other.safetensors")
    record_triples(tmp_path / "run")
    gk.rollback.finish(tmp_path / "run", tmp_path / "out.safetensors")
    tensors = load_file(tmp_path / "out.safetensors")
    tensors["head"] = to_tensor({**from_tensor(tensors["head"]), "format_version": 2})
    save_file(tensors, tmp_path / "newer.safetensors")
    with pytest.raises(LedgerError, match="has format version 2, this gradkern reads version 1"):
        gk.rollback.open_finished(tmp_path / "newer.safetensors")


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path):
    record_triples(tmp_path / "run")
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        gk.rollback.finish(tmp_path / "run", tmp_path / "out.safetensors", rank=0)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        gk.rollback.finish(tmp_path / "run", tmp_path / "out")
    with pytest.raises(LedgerError, match="exists and is never overwritten"):
        gk.rollback.finish(tmp_path / "run", tmp_path / "there.safetensors")
    with pytest.raises(LedgerError, match="is no ledger"):
        gk.rollback.finish(tmp_path, tmp_path / "out.safetensors")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run", "there.safetensors"]
    assert (tmp_path / "there.safetensors").read_bytes() == b""


def test_ids_that_were_never_recorded_are_named(tmp_path):
    record_triples(tmp_path / "run")
    finished = gk.rollback.finish(tmp_path / "run", tmp_path / "out.safetensors")
    with pytest.raises(LedgerError, match=r"2 of 3 ids were never recorded, the first of them \[77, 99\]"):
        finished.deltas([77, 3, 99])


def test_a_recording_that_was_killed_is_refused(tmp_path):
    model = nn.Embedding(9, 4)
    optimizer = gk.AdamW(model.parameters())
    recorder = gk.rollback.record(model, optimizer, tmp_path / "run", steps_per_segment=1)
    with recorder.batch([0]):
        model(triples_data()[:1, 1:]).sum().backward()
    optimizer.step()
    recorder.state_dict()  # everything so far is durable
    with pytest.raises(LedgerError, match=r"ended without close\(\)"):
        gk.rollback.finish(tmp_path / "run", tmp_path / "out.safetensors")
    recorder.close()
    assert gk.rollback.finish(tmp_path / "run", tmp_path / "out.safetensors").ids.tolist() == [0]


def test_an_empty_ledger_has_a_finished_one(tmp_path):
    model, _ = record_triples(tmp_path / "run", steps=0)
    finished = gk.rollback.finish(tmp_path / "run", tmp_path / "out.safetensors")
    assert finished.ids.shape == (0,)
    assert finished.scores(model, triples_data()[:1], loss_fn=triples_loss).scores.shape == (0,)
