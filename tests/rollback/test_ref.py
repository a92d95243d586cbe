"""The reweighted empirical Fisher sweep: against the recursion forwards in time, and when it must not answer."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from recorded_models import TokenModel, gpt2, token_data, token_loss
from test_direct import stored_gradients
from torch import nn

import gradkern as gk
from gradkern.checkpoint import measure_peak
from gradkern.errors import LedgerError, UnstableInfluenceError
from gradkern.rollback import _estimators
from gradkern.rollback._reading import read_segments
from gradkern.rollback._smoothing import unsmooth


def deltas(ledger, curvature):
    """By sample, what its steps and all reactions to them did to every parameter: forwards in time, in fp64."""
    infos = ledger._layout.parameters
    zeros = [torch.zeros(info.shape, dtype=torch.float64) for info in infos]
    momenta = defaultdict(lambda: [zero.clone() for zero in zeros])
    found = defaultdict(lambda: [zero.clone() for zero in zeros])
    for segment in list(read_segments(ledger._store, backwards=True))[::-1]:
        for step in range(segment.steps):
            first, end = segment.visit_bounds[step : step + 2].tolist()
            visits = defaultdict(lambda: [zero.clone() for zero in zeros])  # of this step, by visit
            for index in range(len(infos)):
                for visit, gradient in by_visit(ledger, segment, step, index):
                    visits[visit][index] += gradient
            shares = defaultdict(lambda: [zero.clone() for zero in zeros])
            for visit, gradient in visits.items():
                own = shares[int(segment.visit_ids[visit])]
                for index in range(len(infos)):
                    own[index] += gradient[index]
            for sample in [*found]:
                for visit in range(first, end):
                    gradient, bend = visits[visit], curvature * float(segment.curvature[visit])
                    inner = sum(float((g * d).sum()) for g, d in zip(gradient, found[sample], strict=True))
                    for index in range(len(infos)):
                        shares[sample][index] += bend * inner * gradient[index]
            for index in range(len(infos)):
                scalars = segment.step_scalars(step, index)
                stored = [tensor[step] for tensor in segment.preconditioners[index]]
                step_size = unsmooth(stored, infos[index].shape).double()
                for sample in {*found, *shares}:
                    momentum, delta = momenta[sample][index], found[sample][index]
                    momentum.mul_(scalars.momentum).add_(
                        shares[sample][index], alpha=scalars.grad_weight * scalars.multiplier
                    )
                    delta.mul_(scalars.decay).sub_(step_size * momentum)
    return found


def by_visit(ledger, segment, step, index):
    """As ``stored_gradients``, by visit instead of by sample."""
    numbered = type("Numbered", (), {"visit_ids": torch.arange(len(segment.visit_ids))})
    view = type("View", (numbered,), {"visit_bounds": segment.visit_bounds, "records": segment.records})
    return stored_gradients(ledger, view, step, index)


@pytest.mark.parametrize(("mode", "curvature"), [("run", 1.0), ("expected", 0.5)])
@pytest.mark.parametrize("build", ["token model", "gpt2"])
def test_the_sweep_equals_the_recursion_forwards_in_time(build, mode, curvature, train):
    torch.manual_seed(1)
    model = TokenModel() if build == "token model" else gpt2(layers=1, width=8, length=8, vocabulary=11)
    data = token_data(10)
    ids = [at % 6 for at in range(10)]
    run = train(model, data, steps=12, steps_per_segment=5, ids=ids, lr=1e-2)
    ledger = run.ledger()
    queries = [data[3:5], data[:1].flip(1)]
    found = ledger.scores(model, queries, loss_fn=token_loss, mode=mode)
    model.eval()
    every = deltas(ledger, curvature)
    direct = deltas(ledger, 0.0)
    assert found.ids.tolist() == sorted(every)
    for row, query in enumerate(queries):
        gradients = torch.autograd.grad(token_loss(model(query), query), list(model.parameters()))
        for expected, is_ref in ((every, True), (direct, False)):
            truth = torch.tensor(
                [
                    -sum(float((g.double() * d).sum()) for g, d in zip(gradients, expected[sample], strict=True))
                    for sample in sorted(every)
                ],
                dtype=torch.float64,
            )
            error = (found.scores[row] - truth).norm() / truth.norm()
            assert (error < 1e-4) if is_ref else (error > 3e-3), error


def test_a_list_of_queries_is_scored_as_each_alone(token_model, train):
    run = train(token_model, token_data(), steps=6, lr=3e-3)
    queries = [token_data()[:1], token_data()[4:7]]
    together = run.ledger().scores(token_model, queries, loss_fn=token_loss)
    assert together.scores.shape == (2, len(together.ids))
    for row, query in enumerate(queries):
        alone = run.ledger().scores(token_model, query, loss_fn=token_loss)
        torch.testing.assert_close(alone.scores, together.scores[row], rtol=1e-4, atol=1e-9)
        best = run.ledger().explain(token_model, query, k=1, loss_fn=token_loss)
        assert best[0].id == int(alone.ids[alone.scores.argmax()])
    with pytest.raises(ValueError, match="list of queries is empty"):
        run.ledger().scores(token_model, [], loss_fn=token_loss)


def test_growing_influence_is_an_error_not_a_score(token_model, train, monkeypatch):
    run = train(token_model, token_data(), steps=8)
    monkeypatch.setitem(_estimators._CURVATURE, ("ref", "run"), 1e4)
    with pytest.raises(UnstableInfluenceError, match=r"influence grew .*-fold .*1 of 1 queries.*direct") as raised:
        run.ledger().scores(token_model, token_data()[:2], loss_fn=token_loss)
    assert raised.value.growth[0] > 1.0
    assert torch.isfinite(
        run.ledger().scores(token_model, token_data()[:2], loss_fn=token_loss, estimator="direct").scores
    ).all()


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def record_regression(path, loss_fn, **options):
    torch.manual_seed(0)
    model = Regression()
    optimizer = gk.AdamW(model.parameters())
    with gk.rollback.record(model, optimizer, path, **options) as recorder:
        for _ in range(3):
            with recorder.batch(range(5)):
                loss_fn(model(torch.randn(5, 4))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, gk.rollback.open(path)


def test_a_loss_that_is_no_cross_entropy_is_refused(tmp_path):
    model, ledger = record_regression(tmp_path / "run", lambda y: y.square().mean())
    query = torch.randn(1, 4)
    with pytest.raises(LedgerError, match=r"no cross-entropy.*estimator='direct'"):
        ledger.scores(model, query, loss_fn=lambda y, _: y.sum(), estimator="ref")
    direct = ledger.scores(model, query, loss_fn=lambda y, _: y.sum(), estimator="direct").scores
    with pytest.warns(UserWarning, match=r"no cross-entropy.*estimator='direct', whose scores these are") as told:
        assert torch.equal(ledger.scores(model, query, loss_fn=lambda y, _: y.sum()).scores, direct)
    assert told[0].filename == __file__
    with pytest.raises(LedgerError, match="no cross-entropy"):
        ledger.scores(model, query, loss_fn=lambda y, _: y.sum(), mode="expected")


def test_logits_may_be_those_of_another_layer_by_name(tmp_path):
    labels = torch.arange(5) % 2

    def loss(y):
        return nn.functional.cross_entropy(y, labels)

    query, read = torch.randn(1, 4), {"loss_fn": lambda y, _: y.sum()}
    model, ledger = record_regression(tmp_path / "right", loss, output="head")
    assert len(ledger.scores(model, query, **read).scores) == 5
    model, ledger = record_regression(tmp_path / "wrong", loss, output="body")
    with pytest.raises(LedgerError, match=r"record\(output=\)"):
        ledger.scores(model, query, **read, estimator="ref")
    with pytest.raises(ValueError, match=r"got 'neck'; there are 'body', 'head'"):
        record_regression(tmp_path / "none", loss, output="neck")


@pytest.mark.parametrize("loss_fn", [lambda y, _: torch.ones(()), lambda y, _: torch.ones((), requires_grad=True)])
def test_a_query_that_depends_on_no_parameter_is_refused(loss_fn, token_model, train):
    run = train(token_model, token_data(), steps=2)
    with pytest.raises(ValueError, match="depends on no recorded parameter"):
        run.ledger().explain(token_model, token_data()[:1], loss_fn=loss_fn)


class ChangesItsLogits(Regression):
    def forward(self, x):
        return super().forward(x).mul_(20)


def test_logits_that_are_changed_in_place_are_not_taken_for_those_of_the_loss(tmp_path):
    torch.manual_seed(0)
    model = ChangesItsLogits()
    optimizer = gk.AdamW(model.parameters())
    with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder:
        with recorder.batch(range(6)):
            nn.functional.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 2).backward()
        optimizer.step()
    (segment,) = read_segments(gk.rollback.open(tmp_path / "run")._store, backwards=True)
    assert segment.curvature.isnan().sum() >= 5  # one of them sets the scale


def test_rows_may_have_weights_of_their_own_where_the_layer_is_named(tmp_path):
    labels, weight = torch.arange(5) % 2, torch.tensor([1.0, 3.0])

    def loss(y):
        return nn.functional.cross_entropy(y, labels, weight=weight)

    for name in (None, "head"):
        _, ledger = record_regression(tmp_path / str(name), loss, output=name)
        (segment,) = read_segments(ledger._store, backwards=True)
        assert bool(segment.curvature.isnan().any()) == (name is None)


def test_nothing_is_held_for_large_logits(tmp_path):
    """The output layer's logits are computed once more in backward, not kept until then."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 16_000))
    optimizer = gk.SGD(model.parameters(), lr=0.1)
    inputs, labels = torch.randn(64, 4), torch.zeros(64, dtype=torch.int64)
    held = {}

    def forward():
        return nn.functional.cross_entropy(model(inputs), labels)

    held["plain"] = measure_peak(lambda: forward(), model=model)
    with gk.rollback.record(model, optimizer, tmp_path / "run") as recorder, recorder.batch(range(64)):
        held["recorded"] = measure_peak(lambda: forward(), model=model)
    after = {name: found.timeline[-1][1] - found.start_bytes for name, found in held.items()}
    assert after["recorded"] - after["plain"] < 64 * 16_000  # of 4 bytes each
