"""The self-test: the score against its definition, its interval against its meaning, and what makes it fail."""

from __future__ import annotations

import copy

import pytest
import torch
from recorded_models import EventTap, scale_preconditioner
from torch import nn

import gradkern as gk
from gradkern.errors import LedgerError
from gradkern.rollback import Ledger, Replay, Scores, _datamodeling
from gradkern.rollback._datamodeling import datamodeling_score
from gradkern.testing import same_bits

F = nn.functional
SAMPLES, CLASSES, BATCH, EPOCHS = 60, 3, 12, 5


def blobs(samples, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % CLASSES
    centres = torch.randn(CLASSES, 5, generator=torch.Generator().manual_seed(0))
    return centres[labels] + torch.randn(samples, 5, generator=generator), labels


def fetch(ids):
    inputs, labels = blobs(SAMPLES, 1)
    return inputs[ids - 100], labels[ids - 100]


def make_optimizer(model):
    return gk.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, max_norm=1.0)


REPLAY = Replay(fetch, make_optimizer, F.cross_entropy)


def queries():
    inputs, labels = blobs(12, 2)
    return list(zip(inputs.split(1), labels.split(1), strict=True))


def record(path, *, alter=None, make_optimizer=make_optimizer, middle=nn.GELU, batch=BATCH, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), middle(), nn.Linear(16, CLASSES))
    optimizer = make_optimizer(model)
    source = optimizer if alter is None else EventTap(optimizer, alter)
    with gk.rollback.record(model, source, path, replayable=True, **options) as recorder:
        for _ in range(EPOCHS):
            for ids in (100 + torch.randperm(SAMPLES)).split(batch):
                inputs, labels = fetch(ids)
                with recorder.batch(ids):
                    F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    return model, gk.rollback.open(path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return record(tmp_path_factory.mktemp("self_test") / "run")


def by_name(test):
    return {check.name: check for check in test.checks}


def rank(values, at):
    """The mean of the places that a value takes in order, from 1."""
    below = sum(1 for each in values if each < values[at])
    equal = sum(1 for each in values if each == values[at])
    return below + (equal + 1) / 2


def spearman(left, right):
    ranks = torch.tensor([[rank(each, at) for at in range(len(each))] for each in (left, right)]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def test_the_score_is_the_mean_rank_correlation():
    generator = torch.Generator().manual_seed(4)
    scores = torch.randint(-3, 4, (3, 6), generator=generator).double()  # with ties among sums
    left_out = torch.rand(15, 6, generator=generator) < 0.5
    losses = (torch.randn(15, 3, generator=generator) * 2.0).round()  # and among losses
    expected = []
    for query in range(3):
        sums = [float(scores[query][row].sum()) for row in left_out]
        expected.append(spearman(sums, losses[:, query].tolist()))
    found = datamodeling_score(scores, left_out, losses)
    assert found.by_query.tolist() == pytest.approx(expected)
    assert found.value == pytest.approx(sum(expected) / 3)
    perfect = datamodeling_score(scores, left_out, (left_out.double() @ scores.t()).exp())
    assert perfect.value == pytest.approx(1.0)
    assert perfect.interval == pytest.approx((1.0, 1.0))
    assert datamodeling_score(scores, left_out, torch.ones(15, 3)).value == 0.0


def test_the_interval_covers_the_score_of_infinitely_many_subsets():
    generator = torch.Generator().manual_seed(5)
    queries, samples, subsets = 4, 20, 40
    scores = torch.randn(queries, samples, generator=generator).double()

    def draw(count):
        left_out = torch.rand(count, samples, generator=generator) < 0.3
        common = torch.randn(count, 1, generator=generator)  # losses of a model go up and down together
        noise = 2.0 * common + torch.randn(count, queries, generator=generator)
        return left_out, left_out.double() @ scores.t() + noise

    def many():
        left_out, losses = draw(3_000)
        predicted = scores @ left_out.double().t()
        ranks = [each.argsort(dim=1).argsort(dim=1).double() for each in (predicted, losses.t())]
        rows = zip(*ranks, strict=True)
        return float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in rows]).mean())

    truth = many()
    intervals = [datamodeling_score(scores, *draw(subsets)).interval for _ in range(100)]
    covered = sum(low <= truth <= high for low, high in intervals)
    # 95 are expected, with a standard deviation of 2.2; the interval of 40 subsets is approximate.
    assert 86 <= covered <= 99
    assert 0.2 < truth < 0.8


@pytest.mark.parametrize(("freedom", "quantile"), [(3, 3.1824), (9, 2.2622), (24, 2.0639), (199, 1.9720)])
def test_the_quantile_is_students(freedom, quantile):
    assert _datamodeling._student_95(freedom) == pytest.approx(quantile, abs=5e-3 if freedom < 9 else 2e-4)


def test_a_sound_ledger_passes(recorded, tmp_path):
    model, ledger = recorded
    before = [each.clone() for each in model.parameters()]
    random_numbers, told = torch.get_rng_state(), []
    test = ledger.self_test(model, queries(), replay=REPLAY, subsets=40, progress=lambda *done: told.append(done))
    assert test.passed
    assert test.together
    assert test.subsets == 40
    assert test.lds > 0.6
    low, high = test.interval
    assert low < test.lds < high
    assert test.by_query.mean().item() == pytest.approx(test.lds)
    assert test.cosine == pytest.approx(1.0, abs=0.02)
    names = ["damaged files", "records", "conservation", "conservation by parameter"]
    assert [check.name for check in test.checks] == [*names, "reconstruction", "linear datamodeling score"]
    text = str(test)
    assert text.startswith("ledger self-test: pass")
    assert f"linear datamodeling score: {test.lds:.3g} (at least 0.3) 95 % interval {low:.3f} to {high:.3f}" in text
    assert "40 models without 6 of 60 samples each, trained together" in text
    assert told == [(step, 3 * ledger.steps) for step in range(1, 3 * ledger.steps + 1)]
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert all(map(same_bits, model.parameters(), before))
    assert model.training
    page = tmp_path / "report.html"
    ledger.report(page, verified=test)
    html = page.read_text()
    assert "verification" in html
    assert "reconstruction" in html
    assert "linear datamodeling score" in html
    assert "at least 0.3" in html
    assert "mean over samples, the lowest of the parameters" in html


def test_the_score_is_that_of_models_from_undo(recorded):
    model, ledger = recorded
    some = queries()[:3]
    test = ledger.self_test(model, some, replay=REPLAY, subsets=10, seed=3, share=0.2, estimator="direct")
    order = torch.rand(10, SAMPLES, generator=torch.Generator().manual_seed(3)).argsort(dim=1)
    scores = ledger.scores(model, some, loss_fn=F.cross_entropy, estimator="direct")
    sums, losses = [], []
    for left_out in order[:, :12]:
        undone = ledger.undo(model, scores.ids[left_out], replay=REPLAY).model.eval()
        with torch.no_grad():
            losses.append([float(F.cross_entropy(undone(inputs), labels)) for inputs, labels in some])
        sums.append(scores.scores[:, left_out].sum(dim=1).tolist())
    expected = [spearman([each[at] for each in sums], [each[at] for each in losses]) for at in range(len(some))]
    assert test.by_query.tolist() == pytest.approx(expected)


def test_scores_that_foretell_nothing_fail(recorded, monkeypatch):
    model, ledger = recorded
    real = Ledger._score

    def shuffled(self, *arguments):
        found = real(self, *arguments)
        order = torch.randperm(len(found.ids), generator=torch.Generator().manual_seed(0))
        return Scores(found.ids, found.scores[:, order])

    monkeypatch.setattr(Ledger, "_score", shuffled)
    test = ledger.self_test(model, queries(), replay=REPLAY, subsets=40)
    assert not test.passed
    assert by_name(test)["linear datamodeling score"].passed is False
    assert abs(test.lds) < 0.3
    assert "[FAIL] linear datamodeling score" in str(test)


def test_thresholds_count(recorded):
    model, ledger = recorded
    options = {"replay": REPLAY, "subsets": 10}
    low, _ = ledger.self_test(model, queries(), **options).interval
    at_it = ledger.self_test(model, queries(), least_lds=low, **options)
    assert at_it.passed
    assert at_it.interval[0] == low
    above = ledger.self_test(model, queries(), least_lds=low + 1e-6, least_cosine=1.01, **options)
    assert above.lds > low + 1e-6
    assert by_name(above)["linear datamodeling score"].passed is False
    assert by_name(above)["reconstruction"].passed is False


def test_the_estimators_that_train_again_are_tested_too(recorded):
    model, ledger = recorded
    test = ledger.self_test(model, queries()[:4], replay=REPLAY, estimator="gauss_newton", subsets=20, least_lds=0.2)
    assert test.passed


def test_one_by_one_takes_fewer_models_and_says_why(tmp_path):
    def make_optimizer(model):
        return gk.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, clip=gk.clip.GroupNorm(1.0))

    model, ledger = record(tmp_path / "run", make_optimizer=make_optimizer)
    replay = Replay(fetch, make_optimizer, F.cross_entropy)
    test = ledger.self_test(model, queries(), replay=replay)
    assert not test.together
    assert test.subsets == 25
    assert "trained one by one, because the optimizer clips by GroupNorm" in str(test)


def test_a_broken_law_fails(tmp_path):
    model, ledger = record(tmp_path / "run", alter=lambda event: scale_preconditioner(event, 1.001))
    test = ledger.self_test(model, queries(), replay=REPLAY, subsets=10)
    assert by_name(test)["conservation"].passed is False
    assert not test.passed


def test_an_estimator_that_refuses_the_run_fails(tmp_path):
    def make_optimizer(model):
        return gk.AdamW(model.parameters(), lr=0.5)

    model, ledger = record(tmp_path / "run", make_optimizer=make_optimizer)
    test = ledger.self_test(model, queries(), replay=Replay(fetch, make_optimizer, F.cross_entropy))
    check = by_name(test)["linear datamodeling score"]
    assert check.passed is False
    assert "influence grew" in check.detail
    assert (test.lds, test.subsets) == (None, 0)


def test_models_that_diverge_are_no_test(recorded):
    model, ledger = recorded

    def loss_fn(output, target):  # infinite, and its gradient is not
        return F.cross_entropy(output, target) + torch.inf

    test = ledger.self_test(model, queries(), replay=REPLAY, loss_fn=loss_fn, estimator="direct", subsets=10)
    check = by_name(test)["linear datamodeling score"]
    assert check.passed is None
    assert "10 models have a loss that is not finite" in check.detail
    assert not test.passed


def test_scores_that_are_not_finite_fail(recorded):
    model, ledger = recorded

    def loss_fn(output, target):  # finite, and its gradient is not
        return F.cross_entropy(output, target) + (0.0 * output.sum()).abs().sqrt()

    test = ledger.self_test(model, queries(), replay=REPLAY, loss_fn=loss_fn, estimator="direct", subsets=10)
    check = by_name(test)["linear datamodeling score"]
    assert (check.passed, check.detail) == (False, "scores are not finite")


def test_a_damaged_file_is_reported(tmp_path):
    model, ledger = record(tmp_path / "run")
    damaged = max((tmp_path / "run").glob("segments/*"), key=lambda each: each.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    test = ledger.self_test(model, queries(), replay=REPLAY)
    checks = by_name(test)
    assert checks["damaged files"].passed is False
    assert checks["linear datamodeling score"].passed is None
    assert "damaged" in checks["linear datamodeling score"].detail


def test_what_cannot_be_tested_is_refused(recorded, tmp_path):
    model, ledger = recorded
    for options, message in [
        ({"subsets": 9}, "at least 10, got 9"),
        ({"share": 0.0}, "share must be above 0"),
        ({"share": 1.0}, "below 1, got 1.0"),
        ({"estimator": "best"}, "got estimator='best'"),
    ]:
        with pytest.raises(ValueError, match=message):
            ledger.self_test(model, queries(), replay=REPLAY, **options)
    for wrong in ([], queries()[0]):
        with pytest.raises(ValueError, match="a list of at least one batch"):
            ledger.self_test(model, wrong, replay=REPLAY)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight += 1.0
    with pytest.raises(LedgerError, match="parameters differ"):
        ledger.self_test(other, queries(), replay=REPLAY)

    plain = nn.Linear(5, CLASSES)
    optimizer = make_optimizer(plain)
    with gk.rollback.record(plain, optimizer, tmp_path / "plain") as recorder:
        inputs, labels = fetch(torch.tensor([100]))
        with recorder.batch([100]):
            F.cross_entropy(plain(inputs), labels).backward()
        optimizer.step()
    with pytest.raises(LedgerError, match="without replayable=True"):
        gk.rollback.open(tmp_path / "plain").self_test(plain, queries(), replay=REPLAY)


def test_a_training_that_fails_without_samples_says_so(tmp_path):
    """BatchNorm takes no micro-batch of one row, of which 60 subsets leave some."""
    model, ledger = record(tmp_path / "run", middle=lambda: nn.BatchNorm1d(16), batch=3, unowned=["1.*"])
    with pytest.raises(ValueError, match=r"failed without some samples \(.*few rows are left: pass a smaller share"):
        ledger.self_test(model, queries(), replay=REPLAY, estimator="direct", subsets=60, share=0.5)


def test_a_ledger_of_one_sample_cannot_do_without_it(tmp_path):
    model = nn.Linear(5, CLASSES)
    optimizer = make_optimizer(model)
    with gk.rollback.record(model, optimizer, tmp_path / "run", replayable=True) as recorder:
        inputs, labels = fetch(torch.tensor([100]))
        with recorder.batch([100]):
            F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    with pytest.raises(ValueError, match="at least two, the ledger has 1"):
        gk.rollback.open(tmp_path / "run").self_test(model, queries(), replay=REPLAY)
