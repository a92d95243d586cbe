"""Per-sample deltas against recursions forwards in time, and influence by subtraction against doing it by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from recorded_models import token_data, token_loss
from test_direct import BruteForce, recorded_deltas, smoothed
from torch import nn

import gradkern as gk
from gradkern.errors import UnstableInfluenceError
from gradkern.rollback import _subtraction
from gradkern.rollback._deltas import read_deltas

OPTIMIZERS = {
    "AdamW": lambda parameters: gk.AdamW(parameters, lr=1e-2, weight_decay=0.1, max_norm=0.5),
    "SGD": lambda parameters: gk.SGD(parameters, lr=0.1, momentum=0.9, max_norm=0.5),
}


class Triples(nn.Module):
    """Two embeddings, one of which looks rows up several times a sample; no parameter but those."""

    def __init__(self) -> None:
        super().__init__()
        self.entities, self.relations = nn.Embedding(9, 4), nn.Embedding(5, 4)

    def forward(self, ids):
        entities = self.entities(ids[:, 1:])
        found = entities[:, :1] * self.relations(ids[:, :1]) * entities[:, 1:]
        return found.sum(-1)


def triples_loss(output, _):
    return nn.functional.cross_entropy(output, torch.zeros(len(output), dtype=torch.long))


def triples_data():
    generator = torch.Generator().manual_seed(2)
    return torch.cat(
        [torch.randint(0, high, (20, width), generator=generator) for high, width in ((5, 1), (9, 7))], dim=1
    )


def record_triples(path, optimizer_name="AdamW", steps=12, batch=4, lr=None):
    torch.manual_seed(0)
    model = Triples()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    if lr is not None:
        optimizer.param_groups[0]["lr"] = lr
    data = triples_data()
    with gk.rollback.record(model, optimizer, path, steps_per_segment=5) as recorder:
        for step in range(steps):
            rows = torch.arange(step * batch, (step + 1) * batch) % len(data)
            with recorder.batch(rows % 13):
                triples_loss(model(data[rows]), None).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, gk.rollback.open(path)


def all_deltas(ledger, chunk_bytes=1 << 28):
    """Of every sample by parameter, and the number of chunks."""
    chunks = list(read_deltas(ledger._store, chunk_bytes=chunk_bytes))
    ids = torch.cat([chunk.ids for chunk in chunks])
    whole = [chunk.dense(0, len(chunk.ids)) for chunk in chunks]
    return ids, {index: torch.cat([each[index] for each in whole]) for index in whole[0]}, len(chunks)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("build", ["triples", "tokens"])
def test_deltas_are_what_the_recorded_steps_did(build, optimizer, token_model, tmp_path):
    """Forwards in time, sample by sample, in fp64, from the same records and preconditioners."""
    if build == "triples":
        _, ledger = record_triples(tmp_path / "run", optimizer)
    else:
        data, parameters = token_data(), list(token_model.parameters())
        stepper = OPTIMIZERS[optimizer](parameters)
        with gk.rollback.record(token_model, stepper, tmp_path / "run", steps_per_segment=3) as recorder:
            for step in range(7):
                for half in range(2):
                    rows = torch.arange(6 * step + 3 * half, 6 * step + 3 * half + 3) % len(data)
                    with recorder.batch(rows):
                        (token_loss(token_model(data[rows]), data[rows]) / 2).backward()
                stepper.step()
                stepper.zero_grad()
        ledger = gk.rollback.open(tmp_path / "run")
    ids, deltas, _ = all_deltas(ledger)
    for index, found in deltas.items():
        expected = recorded_deltas(ledger, index)
        assert ids.tolist() == sorted(expected)
        truth = torch.stack([expected[sample] for sample in ids.tolist()])
        assert float(truth.norm()) > 1e-3
        # fp32 sums of a few steps.
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


def test_deltas_are_those_of_true_gradients_up_to_int8(token_model, tmp_path):
    token_model.eval()
    data, ids = token_data(14, 6), torch.arange(14) % 9 + 40
    optimizer = OPTIMIZERS["AdamW"](token_model.parameters())
    truth = BruteForce(token_model, data, ids, 1, 3, smoothed)
    optimizer.register_step_event_hook(truth.on_step)
    with gk.rollback.record(token_model, optimizer, tmp_path / "run", rank=64) as recorder:
        for step in range(8):
            rows = torch.arange(3 * step, 3 * step + 3) % len(data)
            truth.visit(rows)
            with recorder.batch(ids[rows]):
                token_loss(token_model(data[rows]), data[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    found_ids, deltas, _ = all_deltas(gk.rollback.open(tmp_path / "run"))
    assert found_ids.tolist() == sorted(set(ids.tolist()))
    for index, (name, _) in enumerate(token_model.named_parameters()):
        expected = torch.stack([truth.deltas[sample][name] for sample in found_ids.tolist()])
        # Half a percent of a row's largest element, which the preconditioner makes more of in small ones.
        assert float((deltas[index] - expected).norm() / expected.norm()) < 0.06, name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_all_deltas_together_are_the_movement_up_to_smoothing(optimizer, tmp_path):
    model, ledger = record_triples(tmp_path / "run", optimizer, steps=60)
    assert ledger.conservation(model).error <= ledger.conservation(model).bound
    _, deltas, _ = all_deltas(ledger)
    moved = ledger._store.load_role("deltas")
    for index, found in deltas.items():
        expected = moved[ledger._layout.parameters[index].name]
        error = float((found.sum(0) - expected).norm() / expected.norm())
        # SGD's preconditioner is one number, which bf16 rounds by up to 2^-8, and int8 codes by half a percent a row.
        assert error < (0.02 if optimizer == "SGD" else 0.4), error


@pytest.mark.parametrize("chunk_bytes", [1, 2000])
def test_chunks_change_nothing(chunk_bytes, tmp_path):
    _, ledger = record_triples(tmp_path / "run")
    ids, deltas, count = all_deltas(ledger)
    assert count == 1
    again, pieces, count = all_deltas(ledger, chunk_bytes)
    assert count == len(ids) if chunk_bytes == 1 else 1 < count < len(ids)
    assert torch.equal(again, ids)
    assert all(torch.equal(pieces[index], deltas[index]) for index in deltas)


def test_of_an_embedding_only_used_rows_are_held(tmp_path):
    _, ledger = record_triples(tmp_path / "run")
    (chunk,) = read_deltas(ledger._store)
    assert not chunk.whole
    data = triples_data()
    for index, columns in ((0, slice(1, None)), (1, slice(0, 1))):
        pairs = {(row % 13, used) for row in range(20) for used in data[row, columns].tolist()}
        held = set(zip(chunk.ids[chunk.rows[index].position].tolist(), chunk.rows[index].row.tolist(), strict=True))
        # Shorter lists of rows are padded with row 0.
        assert pairs <= held <= pairs | {(sample, 0) for sample in range(13)}


def by_hand(model, ledger, query, loss_fn, deltas):
    """Subtract from a copy and evaluate, sample by sample."""
    with torch.no_grad():
        before = loss_fn(model(query), query)
        scores = []
        for sample in range(len(next(iter(deltas.values())))):
            twin = copy.deepcopy(model).eval()
            named = dict(twin.named_parameters())
            for index, each in deltas.items():
                named[ledger._layout.parameters[index].name].sub_(each[sample])
            scores.append(float(loss_fn(twin(query), query) - before))
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("batched", [True, False])
def test_scores_are_what_subtracting_by_hand_gives(batched, token_model, train, monkeypatch):
    run = train(token_model, token_data(), steps=9)
    monkeypatch.setattr(_subtraction, "_MOST_MODELS", 7)
    calls = 0

    def loss_fn(output, target):
        nonlocal calls
        calls += 1
        loss = token_loss(output, target)
        if not batched:
            assert float(loss) > 0  # looks at a value, which vmap refuses
        return loss

    queries = [token_data()[3:5], token_data()[10:11]]
    ledger = run.ledger()
    token_model.train()
    found = ledger.scores(token_model, queries, loss_fn=loss_fn, estimator="paper")
    assert token_model.training
    assert (calls < len(found.ids)) == batched
    ids, deltas, _ = all_deltas(ledger)
    assert torch.equal(found.ids, ids)
    for query, scores in zip(queries, found.scores, strict=True):
        expected = by_hand(token_model, ledger, query, token_loss, deltas)
        assert float(expected.abs().max()) > 1e-3
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=2e-6)
    # Small deltas act to first order.
    direct = ledger.scores(token_model, queries, loss_fn=token_loss, estimator="direct").scores
    assert torch.corrcoef(torch.stack([direct[0], found.scores[0]]))[0, 1] > 0.9


def test_a_sample_that_helped_has_a_positive_score(tmp_path):
    model, ledger = record_triples(tmp_path / "run", "SGD", steps=5)
    query = triples_data()[2:3]
    best = ledger.explain(model, query, k=3, loss_fn=triples_loss, estimator="paper")
    found = ledger.scores(model, query, loss_fn=triples_loss, estimator="paper")
    assert [each.id for each in best] == found.ids[found.scores.argsort(descending=True, stable=True)[:3]].tolist()
    # It was trained on the query itself.
    assert 2 in [each.id for each in best]
    assert float(found.scores[found.ids == 2]) > 0


def test_the_loss_needs_no_gradient(tmp_path):
    model, ledger = record_triples(tmp_path / "run", steps=40)
    query = triples_data()[2:3]

    def rank_of_right(output, _):
        return (output > output[:, :1]).sum().float()

    found = ledger.scores(model, query, loss_fn=rank_of_right, estimator="paper").scores
    assert float(found.abs().max()) >= 1
    assert torch.equal(found, found.round())
    with pytest.raises(ValueError, match="depends on no recorded parameter"):
        ledger.scores(model, query, loss_fn=rank_of_right, estimator="direct")


def test_parameters_of_no_sample_stay(train):
    """Of an unowned parameter nothing is subtracted; the owned ones are by their own names."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 4), nn.LayerNorm(4), nn.Linear(4, 11))
    run = train(model, token_data(), steps=6, unowned=["1.*"])
    ledger = run.ledger()
    found = ledger.scores(model, token_data()[:1], loss_fn=token_loss, estimator="paper")
    _, deltas, _ = all_deltas(ledger)
    names = {ledger._layout.parameters[index].name for index in deltas}
    assert names == {"0.weight", "2.weight", "2.bias"}
    expected = by_hand(model, ledger, token_data()[:1], token_loss, deltas)
    torch.testing.assert_close(found.scores, expected, rtol=1e-3, atol=2e-6)


def test_losses_that_are_not_finite_are_refused(tmp_path):
    model, ledger = record_triples(tmp_path / "run")

    def loss_fn(output, _):
        return torch.where((output - expected).abs().max() > 0, torch.inf, 1.0)

    query = triples_data()[2:3]
    expected = model(query).detach()
    with pytest.raises(UnstableInfluenceError, match="loss is not finite") as caught:
        ledger.scores(model, [query, query], loss_fn=loss_fn, estimator="paper")
    assert all(growth != growth for growth in caught.value.growth)


def test_there_is_no_expected_mode(tmp_path):
    model, ledger = record_triples(tmp_path / "run", steps=2)
    with pytest.raises(ValueError, match="estimator='paper' with mode='run'"):
        ledger.explain(model, triples_data()[:1], loss_fn=triples_loss, estimator="paper", mode="expected")


def test_an_empty_ledger_has_no_scores(tmp_path):
    model, ledger = record_triples(tmp_path / "run", steps=0)
    found = ledger.scores(model, triples_data()[:1], loss_fn=triples_loss, estimator="paper")
    assert found.ids.shape == found.scores.shape == (0,)


def test_a_frozen_step_is_no_step(tmp_path):
    """A parameter without a gradient is left alone: its momentum waits."""
    torch.manual_seed(0)
    model = Triples()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    data = triples_data()
    with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder:
        for step in range(6):
            rows = torch.arange(2 * step, 2 * step + 2)
            model.relations.requires_grad_(step not in (2, 3))
            with recorder.batch(rows):
                triples_loss(model(data[rows]), None).backward()
            optimizer.step()
            optimizer.zero_grad()
    ledger = gk.rollback.open(tmp_path / "run")
    found = all_deltas(ledger)[1]
    total = ledger._store.load_role("deltas")["relations.weight"]
    assert float(total.norm()) > 0
    error = float((found[1].sum(0) - total).norm() / total.norm())
    assert error < 0.02


def test_some_samples_of_a_chunk_are_those_of_all(tmp_path):
    _, ledger = record_triples(tmp_path / "run")
    (chunk,) = read_deltas(ledger._store)
    part, full = chunk.dense(2, 5), chunk.dense(0, len(chunk.ids))
    assert all(torch.equal(part[index], full[index][2:5]) for index in full)
