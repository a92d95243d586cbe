"""Error bars: the bootstrap over visits, drawn and in closed form, and the scatter over runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gradkern as gk
from gradkern.rollback import Replay, Scores
from gradkern.rollback._sweep import collect_scores

F = nn.functional
SAMPLES, BATCH, STEPS = 12, 6, 9


def data():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(SAMPLES) % 3
    return torch.randn(3, 5, generator=generator)[labels] + torch.randn(SAMPLES, 5, generator=generator), labels


def queries():
    inputs, labels = data()
    return [(inputs[:3], labels[:3]), (inputs[7:8], labels[7:8])]


def make_optimizer(model):
    return gk.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.1, max_norm=1.0)


def record(path, *, every_visit_its_own):
    """A run; ids are the rows of samples, or numbers of visits."""
    inputs, labels = data()
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, SAMPLES - 1, (STEPS, BATCH), generator=generator)
    rows[4, 2] = SAMPLES - 1  # visited once
    ids = torch.arange(rows.numel()).reshape(rows.shape) if every_visit_its_own else rows
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    optimizer = make_optimizer(model)
    with gk.rollback.record(model, optimizer, path, replayable=True, steps_per_segment=4) as recorder:
        for step in range(STEPS):
            with recorder.batch(ids[step]):
                F.cross_entropy(model(inputs[rows[step]]), labels[rows[step]]).backward()
            optimizer.step()
            optimizer.zero_grad()

    def fetch(wanted):
        at = rows.flatten()[wanted] if every_visit_its_own else wanted
        return inputs[at], labels[at]

    return model, gk.rollback.open(path), Replay(fetch, make_optimizer, F.cross_entropy), rows.flatten()


@pytest.mark.parametrize("estimator", ["direct", "ref", "gauss_newton", "metagradient"])
def test_errors_are_the_scatter_of_visits_that_are_drawn_anew(estimator, tmp_path):
    needs_replay = estimator in ("gauss_newton", "metagradient")
    found = {}
    for own in (False, True):
        model, ledger, replay, samples = record(tmp_path / f"{own}", every_visit_its_own=own)
        given = replay if needs_replay else None
        options = {"loss_fn": F.cross_entropy, "estimator": estimator, "replay": given}
        found[own] = ledger.scores(model, queries(), **options)
        if not own:
            first = ledger.scores(model, queries()[0], **options)
            explained = ledger.explain(model, queries()[0], k=SAMPLES, **options)
    visits = found[True]
    assert visits.ids.tolist() == list(range(STEPS * BATCH))
    assert visits.errors.isnan().all()
    generator = torch.Generator().manual_seed(0)
    for at, sample in enumerate(found[False].ids.tolist()):
        parts = visits.scores[:, samples == sample]
        count = parts.shape[1]
        torch.testing.assert_close(parts.sum(1), found[False].scores[:, at], rtol=1e-4, atol=1e-6)
        errors = found[False].errors[:, at]
        if count == 1:
            assert errors.isnan().all()
            continue
        drawn = torch.randint(0, count, (20_000, count), generator=generator)
        scatter = parts[:, drawn].sum(2).std(dim=1, correction=0)
        # A standard deviation of 20,000 draws is within 3 % of its limit (six times its own).
        torch.testing.assert_close(scatter * math.sqrt(count / (count - 1)), errors, rtol=0.03, atol=1e-7)
    torch.testing.assert_close(first.errors, found[False].errors[0], rtol=1e-4, atol=1e-7, equal_nan=True)
    by_id = dict(zip(first.ids.tolist(), first.errors.tolist(), strict=True))
    assert len(explained) == SAMPLES
    assert all(each.error == by_id[each.id] or math.isnan(each.error) for each in explained)
    once = (samples.bincount() == 1).nonzero().flatten().tolist()
    assert SAMPLES - 1 in once
    assert sorted(each.id for each in explained if math.isnan(each.error)) == once


@pytest.mark.parametrize("count", [2, 3, 20])
def test_squared_errors_have_the_variance_of_sums_for_their_mean(count):
    samples = 20_000
    generator = torch.Generator().manual_seed(count)
    parts = 3.0 + 2.0 * torch.randn(1, count * samples, generator=generator, dtype=torch.float64)
    ids = torch.arange(samples).repeat(count)
    half = len(ids) // 2
    _, scores, errors = collect_scores([(ids[:half], parts[:, :half]), (ids[half:], parts[:, half:])], 1)
    assert errors.square().mean().item() == pytest.approx(4.0 * count, rel=0.04)
    assert errors.square().mean().item() == pytest.approx(scores.var().item(), rel=0.06)


def test_visits_that_all_agree_leave_no_error():
    _, scores, errors = collect_scores([(torch.zeros(7, dtype=torch.int64), torch.full((1, 7), -0.1).double())], 1)
    assert scores.item() == pytest.approx(-0.7)
    assert errors.item() <= 1e-7


def test_estimators_that_do_not_tell_visits_apart_have_no_errors(tmp_path):
    model, ledger, _, _ = record(tmp_path / "run", every_visit_its_own=False)
    options = {"loss_fn": F.cross_entropy, "estimator": "paper"}
    assert ledger.scores(model, queries(), **options).errors is None
    assert ledger.scores(model, queries()[0], **options).errors is None
    assert all(math.isnan(each.error) for each in ledger.explain(model, queries()[0], **options))


def test_the_mean_over_runs_has_the_standard_error_over_seeds():
    runs = [
        Scores(torch.tensor([3, 5]), torch.tensor([[1.0, -2.0], [0.5, 0.0]]).double()),
        Scores(torch.tensor([3, 5, 9]), torch.tensor([[2.0, 4.0, 6.0], [0.5, 0.0, 0.0]]).double()),
        Scores(torch.tensor([5]), torch.tensor([[1.0], [3.0]]).double()),
    ]
    found = gk.rollback.mean_over_runs(runs)
    each = torch.tensor([[[1, -2, 0], [0.5, 0, 0]], [[2, 4, 6], [0.5, 0, 0]], [[0, 1, 0], [0, 3, 0]]]).double()
    assert found.ids.tolist() == [3, 5, 9]
    mean = sum(each) / 3
    torch.testing.assert_close(found.scores, mean)
    torch.testing.assert_close(found.errors, (sum((one - mean) ** 2 for one in each) / (3 * 2)).sqrt())
    single = [Scores(run.ids, run.scores[0]) for run in runs]
    assert torch.equal(gk.rollback.mean_over_runs(single).scores, found.scores[0])


def test_runs_that_cannot_be_averaged_are_refused():
    one = Scores(torch.tensor([3]), torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least two runs, got 1"):
        gk.rollback.mean_over_runs([one])
    two = Scores(torch.tensor([3]), torch.zeros(2, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="2 different numbers"):
        gk.rollback.mean_over_runs([one, two])
