"""Asking a ledger: order and sign of influences, whose model it is, and what the report says."""

from __future__ import annotations

import copy

import pytest
import torch
from recorded_models import TokenModel, token_data, token_loss
from torch import nn

import gradkern as gk
from gradkern.errors import LedgerError
from gradkern.rollback._reading import read_segments


def test_influences_are_sorted_and_positive_means_helped(train):
    """Half of the samples teach the query's answer, the others the opposite."""
    torch.manual_seed(0)
    model = TokenModel(vocabulary=4)
    data = torch.tensor([[0, 1, 0, 1]] * 6 + [[0, 2, 0, 2]] * 6)
    run = train(model, data, steps=12, accumulate=1, micro_batch=12, ids=range(12), max_norm=None)
    query = torch.tensor([[0, 1]])
    found = run.ledger().explain(model, query, k=100, loss_fn=token_loss)
    assert [influence.score for influence in found] == sorted((i.score for i in found), reverse=True)
    assert {influence.id for influence in found[:6]} == set(range(6))
    assert all(influence.score > 0 for influence in found[:6])
    assert all(influence.score < 0 for influence in found[6:])
    assert run.ledger().explain(model, query, k=3, loss_fn=token_loss) == found[:3]


def test_a_query_leaves_the_model_as_it_was(token_model, train):
    run = train(token_model, token_data())
    token_model.train()
    token_model.norm.eval()
    before = copy.deepcopy(token_model.state_dict())
    run.ledger().explain(token_model, token_data()[:1], loss_fn=token_loss)
    assert token_model.training
    assert not token_model.norm.training
    assert all(parameter.grad is None for parameter in token_model.parameters())
    assert all(torch.equal(before[name], value) for name, value in token_model.state_dict().items())


def test_parameters_the_query_does_not_reach_count_as_zero(token_model, train):
    run = train(token_model, token_data())
    found = run.ledger().scores(
        token_model, token_data()[:1], loss_fn=lambda output, ids: token_model.hidden.bias.square().sum()
    )
    assert found.scores.abs().sum() > 0


def test_bad_questions_are_refused(token_model, train):
    ledger = train(token_model, token_data()).ledger()
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        ledger.explain(token_model, token_data(), k=0, loss_fn=token_loss)
    with pytest.raises(ValueError, match=r"there are estimator='direct' with mode='run'.*got estimator='magic' with"):
        ledger.explain(token_model, token_data(), loss_fn=token_loss, estimator="magic")


def test_another_model_is_refused(token_model, train):
    ledger = train(token_model, token_data()).ledger()
    for other, difference in (
        (TokenModel(width=8), r"'embed\.weight' of shape \(11, 6\).*has 'embed\.weight' of shape \(11, 8\)"),
        (copy.deepcopy(token_model).double(), "dtype float64"),
        (nn.Sequential(nn.Linear(2, 2)), r"has '0\.weight'"),
    ):
        with pytest.raises(LedgerError, match=f"another model.*{difference}"):
            ledger.explain(other, token_data(), loss_fn=token_loss)
        with pytest.raises(LedgerError, match="another model"):
            ledger.verify(other)
    longer = nn.ModuleDict({name: copy.deepcopy(child) for name, child in token_model.named_children()})
    longer["extra"] = nn.Linear(1, 1)
    with pytest.raises(LedgerError, match="another model"):
        ledger.verify(longer)


def test_other_parameter_values_are_refused(token_model, train):
    ledger = train(token_model, token_data()).ledger()
    with torch.no_grad():
        token_model.norm.weight[0] += 1e-6
    with pytest.raises(LedgerError, match="differ from those at the end of the recording"):
        ledger.explain(token_model, token_data(), loss_fn=token_loss)


def test_the_report_reads_well_and_counts_compression_apart(token_model, train):
    ledger = train(token_model, token_data(), rank=1).ledger()
    report = ledger.verify(token_model)
    assert report.passed
    assert str(report).startswith("ledger verification: pass\n")
    assert "[info] compression: mean cosine" in str(report)
    by_parameter = {(entry.layer, entry.parameter): entry for entry in report.compression}
    assert set(by_parameter) >= {("embed", "embed.weight"), ("head", "embed.weight"), ("norm", "norm.bias")}
    assert by_parameter["norm", "norm.bias"].cosine > 0.999
    assert 0.3 < by_parameter["hidden", "hidden.weight"].cosine < 0.99
    assert 0 < by_parameter["hidden", "hidden.weight"].energy < 0.99


def test_compression_is_measured_against_the_true_gradient(token_model, tmp_path):
    data = token_data(3, 8)
    # The first sample's share of the mean over three.
    single = copy.deepcopy(token_model)
    (expected,) = torch.autograd.grad(token_loss(single(data[:1]), data[:1]) / 3, [single.hidden.weight])
    optimizer = gk.AdamW(token_model.parameters())
    with gk.rollback.record(token_model, optimizer, tmp_path / "run", rank=1) as recorder:
        with recorder.batch(range(3)):
            token_loss(token_model(data), data).backward()
        optimizer.step()
    ledger = gk.rollback.open(tmp_path / "run")
    (segment,) = read_segments(ledger._store, backwards=True)
    streams = {(stream.layer, stream.kind): index for index, stream in enumerate(ledger._layout.streams)}
    stream = streams["hidden", "matrix"]
    record = segment.records[stream]
    left = record.left[0].float() * record.left_scale[0][:, None]
    right = record.right[0].float() * record.right_scale[0][:, None]
    stored = left.t() @ right
    (row,) = (row for row in segment.fidelity.tolist() if row[0] == stream)
    assert row[1:] == pytest.approx(
        [float(expected.square().sum()), float((expected * stored).sum()), float(stored.square().sum())],
        rel=1e-4,
    )


def test_without_a_model_the_law_counts_as_not_checked(token_model, train):
    report = train(token_model, token_data()).ledger().verify()
    assert not report.passed
    assert [check.passed for check in report.checks] == [True, True, None]
    assert "pass the trained model" in str(report)


def test_a_ledger_without_steps_is_a_ledger(token_model, tmp_path):
    gk.rollback.record(token_model, gk.AdamW(token_model.parameters()), tmp_path / "run").close()
    ledger = gk.rollback.open(tmp_path / "run")
    assert (ledger.steps, ledger.visits, ledger.complete) == (0, 0, True)
    assert ledger.explain(token_model, token_data(), loss_fn=token_loss) == []
    assert ledger.verify(token_model).passed


def test_warnings_point_at_the_line_that_asked(token_model, tmp_path):
    recorder = gk.rollback.record(token_model, gk.AdamW(token_model.parameters()), tmp_path / "run")
    ledger = gk.rollback.open(tmp_path / "run")
    for ask in (ledger.explain, ledger.scores):
        with recorder.paused(), pytest.warns(UserWarning, match="without close") as caught:
            ask(token_model, token_data(), loss_fn=token_loss)
        assert caught[0].filename == __file__
    recorder.close()
