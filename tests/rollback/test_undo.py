"""Samples taken back: by training again to the last bit, or to first order and only where that can be trusted."""

from __future__ import annotations

import copy

import pytest
import torch
from recorded_models import TokenModel, token_data, token_loss
from torch import nn

import gradkern as gk
from gradkern.errors import LedgerError, UndoRefusedError
from gradkern.rollback import Replay, _undo
from gradkern.rollback._estimators import query_gradients
from gradkern.rollback._reading import read_segments
from gradkern.rollback._undo import propagate
from gradkern.testing import same_bits

SAMPLES, CLASSES = 40, 4


class Classifier(nn.Module):
    """Draws random numbers and keeps buffers; its first layer is not trained."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(6, 8).requires_grad_(requires_grad=False)
        self.inner, self.norm = nn.Linear(8, 12), nn.BatchNorm1d(12)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.head(self.drop(torch.relu(self.norm(self.inner(self.frozen(x))))))


def blobs():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(SAMPLES) % CLASSES
    centres = torch.randn(CLASSES, 6, generator=generator)
    return centres[labels] + 0.7 * torch.randn(SAMPLES, 6, generator=generator), labels


def fetch(ids):
    inputs, labels = blobs()
    return inputs[ids - 100], labels[ids - 100]


def make_optimizer(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return gk.AdamW(trained, lr=1e-2, weight_decay=0.1, max_norm=0.5)


REPLAY = Replay(fetch, make_optimizer, nn.functional.cross_entropy, accumulate=2)


def train(model, optimizer, batches, states, recorder=None):
    """Train on micro-batches of ids, two a step, with a learning rate that falls; ``states`` gives or takes them."""
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    given = list(states)
    for number, ids in enumerate(batches):
        if given:
            torch.set_rng_state(given[number])
        else:
            states.append(torch.get_rng_state())
        if len(ids):
            inputs, labels = fetch(ids)
            if recorder is None:
                (nn.functional.cross_entropy(model(inputs), labels) / 2).backward()
            else:
                with recorder.batch(ids):
                    (nn.functional.cross_entropy(model(inputs), labels) / 2).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@pytest.fixture
def recorded(tmp_path):
    """A recorded run of twelve steps: its start, its end, micro-batches, random numbers, and the ledger."""
    torch.manual_seed(0)
    start = Classifier()
    model = copy.deepcopy(start)
    batches = [100 + torch.randperm(SAMPLES)[:5] for _ in range(24)]
    states = []
    optimizer = make_optimizer(model)
    options = {"unowned": ["norm.*"], "replayable": True, "steps_per_segment": 5}
    with gk.rollback.record(model, optimizer, tmp_path / "run", **options) as recorder:
        train(model, optimizer, batches, states, recorder)
    return start, model, batches, states, gk.rollback.open(tmp_path / "run")


def everything(model):
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("count", [1, 7, SAMPLES])
def test_exact_is_a_training_without_the_samples(recorded, count):
    start, model, batches, states, ledger = recorded
    forgotten = torch.arange(100, 100 + count)
    expected = copy.deepcopy(start)
    kept = [ids[~torch.isin(ids, forgotten)] for ids in batches]
    assert any(len(ids) < 5 for ids in kept)
    train(expected, make_optimizer(expected), kept, states)
    before, random_numbers = [each.clone() for each in everything(model)], torch.get_rng_state()
    told = []
    undone = ledger.undo(model, forgotten, replay=REPLAY, progress=lambda *done: told.append(done))
    assert all(map(same_bits, everything(undone.model), everything(expected)))
    assert undone.method == "exact"
    assert told == [(step, 24) for step in range(1, 25)]
    assert undone.model.training
    assert all(map(same_bits, everything(model), before))
    assert torch.equal(torch.get_rng_state(), random_numbers)


def test_a_resumed_run_is_trained_again_over_the_break(tmp_path):
    torch.manual_seed(0)
    model, data, path = TokenModel(), token_data(), tmp_path / "run"
    start = copy.deepcopy(model)

    def make(model):
        return gk.AdamW(model.parameters(), lr=1e-2, max_norm=0.5)

    def go_on(model, optimizer, recorder, steps):
        for step in steps:
            rows = (torch.arange(6) + 6 * step) % len(data)
            with recorder.batch(rows):
                token_loss(model(data[rows]), data[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()

    optimizer = make(model)
    recorder = gk.rollback.record(model, optimizer, path, replayable=True)
    go_on(model, optimizer, recorder, range(5))
    state = recorder.state_dict()
    recorder.close()
    with pytest.raises(LedgerError, match="replayable="):
        gk.rollback.record(model, optimizer, path, resume=state)
    with gk.rollback.record(model, optimizer, path, replayable=True, resume=state) as recorder:
        go_on(model, optimizer, recorder, range(5, 11))
    gk.rollback.compact(path)
    replay = Replay(lambda ids: data[ids], make, token_loss)
    undone = gk.rollback.open(path).undo(model, [3, 17], replay=replay)
    expected = start
    optimizer = make(expected)
    for step in range(11):
        rows = (torch.arange(6) + 6 * step) % len(data)
        rows = rows[(rows != 3) & (rows != 17)]
        token_loss(expected(data[rows]), data[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(same_bits, undone.model.parameters(), expected.parameters()))


@pytest.mark.parametrize(
    "replay",
    [
        Replay(lambda ids: fetch(ids.flip(0)), make_optimizer, nn.functional.cross_entropy, 2),
        Replay(fetch, make_optimizer, nn.functional.cross_entropy),
        Replay(fetch, lambda m: gk.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1), nn.functional.cross_entropy, 2),
        Replay(fetch, make_optimizer, lambda y, t: nn.functional.cross_entropy(y, t, label_smoothing=0.1), 2),
    ],
    ids=["data", "accumulation", "clipping", "loss"],
)
def test_another_training_is_noticed_first(recorded, replay):
    _, model, _, _, ledger = recorded
    told = []
    with pytest.raises(LedgerError, match="gave other parameters after 8 steps than were recorded"):
        ledger.undo(model, [100], replay=replay, progress=lambda *done: told.append(done))
    assert len(told) == 7


def test_what_changed_late_in_the_training_is_noticed(tmp_path):
    """Whatever the log does not follow: no sample is missing before the end of the check."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, CLASSES))
    inputs, labels = blobs()

    def recorded_run(name, disturb):
        twin = copy.deepcopy(model)
        optimizer = make_optimizer(twin)
        options = {"unowned": ["1.*"], "replayable": True}
        with gk.rollback.record(twin, optimizer, tmp_path / name, **options) as recorder:
            for step in range(20):
                rows = torch.arange(5 * step, 5 * step + 5) % SAMPLES
                if step == 10:
                    disturb(twin, optimizer, recorder)
                with recorder.batch(rows + 100):
                    (nn.functional.cross_entropy(twin(inputs[rows]), labels[rows]) / 2).backward()
                optimizer.step()
                optimizer.zero_grad()
        return twin, gk.rollback.open(tmp_path / name)

    def clip_harder(model, optimizer, recorder):
        optimizer.max_norm = 0.05

    def discard(model, optimizer, recorder):
        with recorder.batch(range(100, 105)):
            model(3 * inputs[:5]).sum().backward()
        recorder.discard()
        optimizer.zero_grad()

    def reload(model, optimizer, recorder):
        optimizer.load_state_dict(optimizer.state_dict())  # which gives it other groups
        optimizer.param_groups[0]["lr"] = 1e-3

    for name, follow in {"as it should be": lambda *_: None, "reload": reload}.items():
        trained, ledger = recorded_run(name, follow)
        ledger.undo(trained, [101], replay=REPLAY)
    for name, disturb in {"clip": clip_harder, "discard": discard}.items():
        trained, ledger = recorded_run(name, disturb)
        with pytest.raises(LedgerError, match="after 16 steps than were recorded"):
            ledger.undo(trained, [101], replay=REPLAY)


def test_a_ledger_that_tells_nothing_of_what_came_out_is_refused(token_model, tmp_path):
    data = token_data()
    optimizer = gk.AdamW(token_model.parameters(), lr=1e-2)
    recorder = gk.rollback.record(token_model, optimizer, tmp_path / "run", replayable=True)
    for _ in range(3):
        with recorder.batch(range(24)):
            token_loss(token_model(data), data).backward()
        optimizer.step()
        optimizer.zero_grad()
    recorder.state_dict()
    replay = Replay(lambda ids: data[ids], lambda m: gk.AdamW(m.parameters(), lr=1e-2), token_loss)
    with (
        pytest.warns(UserWarning, match=r"without close\(\)"),
        pytest.raises(LedgerError, match="before the first of its digests"),
    ):
        gk.rollback.open(tmp_path / "run").undo(token_model, [1], replay=replay)
    recorder.close()


def test_changed_frozen_parameters_are_noticed(recorded):
    _, model, _, _, ledger = recorded
    with torch.no_grad():
        model.frozen.bias[0] += 1e-3
    with pytest.raises(LedgerError, match="parameters that are not trained have changed"):
        ledger.undo(model, [100], replay=REPLAY)


def test_a_short_run_is_checked_by_its_end(token_model, train_few):
    data = token_data()
    ledger = train_few(token_model, steps=3)

    def make(lr_factor):
        return lambda model: gk.AdamW(model.parameters(), lr=1e-2, max_norm=lr_factor)

    with pytest.raises(LedgerError, match="after 3 steps"):
        ledger.undo(token_model, [1], replay=Replay(lambda ids: data[ids], make(0.1), token_loss))
    ledger.undo(token_model, [1], replay=Replay(lambda ids: data[ids], make(0.5), token_loss))


@pytest.fixture
def train_few(tmp_path):
    def run(model, steps, **options):
        data = token_data()
        optimizer = gk.AdamW(model.parameters(), lr=1e-2, max_norm=0.5)
        with gk.rollback.record(model, optimizer, tmp_path / "few", **{"replayable": True, **options}) as recorder:
            for step in range(steps):
                rows = (torch.arange(6) + 6 * step) % len(data)
                with recorder.batch(rows):
                    token_loss(model(data[rows]), data[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
        return gk.rollback.open(tmp_path / "few")

    return run


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        ([100], {"method": "subtract"}, ValueError, "hundreds of times worse than leaving the model alone"),
        ([100], {"method": "magic"}, ValueError, "must be 'exact' or 'fast', got 'magic'"),
        ([100], {}, ValueError, r"needs replay=Replay\(fetch, make_optimizer\)"),
        ([100], {"method": "fast"}, ValueError, "needs probe="),
        ([100], {"method": "fast", "probe": torch.zeros(2, 6), "share": 1.5}, ValueError, "share must be above 0"),
        ([100, 7, 99], {"replay": REPLAY}, LedgerError, r"2 of 3 ids were never recorded, the first of them \[7, 99\]"),
        ([], {"replay": REPLAY}, ValueError, "ids must be one-dimensional"),
        ([0.5], {"replay": REPLAY}, TypeError, "integer"),
    ],
)
def test_bad_requests_are_refused(recorded, ids, options, error, message):
    _, model, _, _, ledger = recorded
    with pytest.raises(error, match=message):
        ledger.undo(model, ids, **options)


def test_a_ledger_without_a_log_is_refused_by_name(token_model, train_few):
    ledger = train_few(token_model, steps=2, replayable=False)
    replay = Replay(lambda ids: token_data()[ids], make_optimizer, token_loss)
    with pytest.raises(LedgerError, match="recorded without replayable=True"):
        ledger.undo(token_model, [1], replay=replay)


def test_other_parameter_values_are_refused(recorded):
    _, model, _, _, ledger = recorded
    with torch.no_grad():
        model.head.bias[0] += 1
    with pytest.raises(LedgerError, match="parameters differ"):
        ledger.undo(model, [100], replay=REPLAY)


def longer_run(path, steps=60):
    torch.manual_seed(0)
    inputs, labels = blobs()
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    start = copy.deepcopy(model)
    batches = [torch.randperm(SAMPLES)[:10] for _ in range(steps)]
    optimizer = gk.AdamW(model.parameters(), lr=3e-3)
    with gk.rollback.record(model, optimizer, path, replayable=True) as recorder:
        for ids in batches:
            with recorder.batch(ids):
                nn.functional.cross_entropy(model(inputs[ids]), labels[ids]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, start, batches, gk.rollback.open(path)


def test_fast_is_the_sweep_of_scores_forwards(tmp_path):
    """What a query gains by the change is what its scores foretell, whatever the query."""
    model, _, _, ledger = longer_run(tmp_path / "run")
    inputs, labels = blobs()
    forgotten = torch.tensor([3, 8, 11, 30])
    owned = ledger._layout.owned(tuple(model.parameters()))
    changes, growth = propagate(ledger._layout, owned, read_segments(ledger._store), forgotten)
    assert 0.0 < growth < 1.0
    for row in range(3):
        query = inputs[row : row + 1], labels[row : row + 1]
        found = ledger.scores(model, query, loss_fn=nn.functional.cross_entropy, estimator="ref")
        expected = float(found.scores[torch.isin(found.ids, forgotten)].sum())
        gradients = query_gradients(model, owned, query, nn.functional.cross_entropy)
        gained = sum(float((gradients[index].double() * change.double()).sum()) for index, change in changes.items())
        assert gained == pytest.approx(expected, rel=1e-4)


def divergence(model, other, inputs):
    with torch.no_grad():
        logs = [torch.log_softmax(each(inputs).double(), dim=-1) for each in (model, other)]
    return float(nn.functional.kl_div(logs[1], logs[0], reduction="batchmean", log_target=True))


def test_fast_comes_nearer_to_the_exact_model_than_nothing(tmp_path):
    model, _, _, ledger = longer_run(tmp_path / "run")
    inputs, labels = blobs()
    replay = Replay(
        lambda ids: (inputs[ids], labels[ids]), lambda m: gk.AdamW(m.parameters(), lr=3e-3), nn.functional.cross_entropy
    )
    better = 0
    for first in range(0, 40, 4):
        forgotten = torch.arange(first, first + 4)
        exact = ledger.undo(model, forgotten, replay=replay).model
        fast = ledger.undo(model, forgotten, method="fast", probe=inputs)
        assert fast.method == "fast"
        assert 0.0 < fast.nonlinearity < 0.5
        better += divergence(exact, fast.model, inputs) < divergence(exact, model, inputs)
    assert better >= 8


def test_fast_makes_the_share_that_was_asked_for(tmp_path):
    model, _, _, ledger = longer_run(tmp_path / "run")
    inputs, _ = blobs()
    half, whole = (ledger.undo(model, [3], method="fast", probe=inputs, share=share).model for share in (0.5, 1.0))
    for before, some, all_of in zip(model.parameters(), half.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(2 * (some - before), all_of - before, rtol=1e-4, atol=1e-7)
    assert half is not model
    assert all(module.training for module in half.modules())


def test_fast_is_refused_where_it_cannot_be_trusted(tmp_path, monkeypatch):
    model, _, _, ledger = longer_run(tmp_path / "run")
    inputs, _ = blobs()
    with pytest.raises(UndoRefusedError, match="do not move by the change"):
        ledger.undo(model, [3], method="fast", probe=inputs[:0])
    with monkeypatch.context() as patch:
        patch.setattr(_undo, "_MOST_NONLINEAR", 1e-3)
        with pytest.raises(UndoRefusedError, match=r"% is not linear in that of the parameters.*method='exact'"):
            ledger.undo(model, [3, 7, 9], method="fast", probe=inputs)
    monkeypatch.setattr(_undo, "_MOST_GROWTH", 1e-6)
    with pytest.raises(UndoRefusedError, match="the change grew to"):
        ledger.undo(model, [3], method="fast", probe=inputs)


def test_fast_of_a_language_model_with_tied_weights(token_model, train_few):
    data = token_data()
    ledger = train_few(token_model, steps=6)
    undone = ledger.undo(token_model, [1, 2], method="fast", probe=data[:4])
    assert undone.model.head.weight is undone.model.embed.weight
    moved = [not torch.equal(a, b) for a, b in zip(undone.model.parameters(), token_model.parameters(), strict=True)]
    assert all(moved)
