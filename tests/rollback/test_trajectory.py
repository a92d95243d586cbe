"""What steps started from: to the bit, whether all of it is kept or most of it is run once more."""

from __future__ import annotations

import copy

import pytest
import torch
from test_undo import CLASSES, SAMPLES, Classifier, blobs, fetch
from torch import nn

import gradkern as gk
from gradkern.errors import LedgerError
from gradkern.rollback import Replay, _trajectory
from gradkern.rollback._replay import Replayer
from gradkern.rollback._trajectory import Trajectory
from gradkern.testing import same_bits

STEPS = 11


def adamw(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return gk.AdamW(trained, lr=torch.tensor(1e-2), weight_decay=0.1, max_norm=0.5)


def amsgrad(model):
    groups = [{"params": model.inner.parameters()}, {"params": model.head.parameters(), "lr": 3e-3}]
    return gk.Adam(groups, lr=1e-2, amsgrad=True)


def sgd(model):
    return gk.SGD([*model.head.parameters(), *model.inner.parameters()], lr=0.1, momentum=0.9, dampening=0.5)


def zclip(model):
    return gk.AdamW(model.inner.parameters(), lr=1e-2, clip=gk.clip.ZClip())


MAKERS = [adamw, amsgrad, sgd, zclip]


def record(path, make_optimizer, **options):
    """A run with everything that a step can start from, and what its steps did start from."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    starts = []
    unowned = ["norm.*"] if make_optimizer is adamw else []
    recording = {"unowned": unowned, "replayable": True, "steps_per_segment": 4, **options}
    with gk.rollback.record(model, optimizer, path, **recording) as recorder:
        for step in range(STEPS):
            model.norm.train(step != 5)
            state = {
                names[id(parameter)]: {key: copy.deepcopy(value) for key, value in dict(kept).items()}
                for parameter, kept in dict(optimizer.state).items()
            }
            tensors = {name: each.detach().clone() for name, each in model.state_dict().items()}
            start = {"tensors": tensors, "state": state, "ids": [], "modes": [m.training for m in model.modules()]}
            starts.append(start)
            for _ in range(2):
                ids = 100 + torch.randperm(SAMPLES)[:5]
                start["ids"].append(ids)
                inputs, labels = fetch(ids)
                with recorder.batch(ids):
                    (nn.functional.cross_entropy(model(inputs), labels) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model, starts, gk.rollback.open(path)


def replayer(model, ledger, make_optimizer, fetch=fetch):
    replay = Replay(fetch, make_optimizer, nn.functional.cross_entropy, accumulate=2)
    return Replayer(ledger._store, model, replay, otherwise="nothing")


@pytest.mark.parametrize("keep_bytes", [1 << 28, 0], ids=["kept", "run once more"])
@pytest.mark.parametrize("make_optimizer", MAKERS)
def test_steps_started_from_what_they_did(make_optimizer, keep_bytes, tmp_path, monkeypatch):
    model, starts, ledger = record(tmp_path / "run", make_optimizer)
    monkeypatch.setattr(_trajectory, "_KEEP_BYTES", keep_bytes)
    trajectory = Trajectory(replayer(model, ledger, make_optimizer))
    assert len(trajectory._kept) == (STEPS if keep_bytes else 3)  # of 0, 4 and 8
    seen = 0
    for found, expected in zip(trajectory.backwards(), reversed(starts), strict=True):
        twin = found.training.model
        assert all(same_bits(each, expected["tensors"][name]) for name, each in twin.state_dict().items())
        assert [module.training for module in twin.modules()] == expected["modes"]
        assert [ids.tolist() for ids in found.step.ids] == [ids.tolist() for ids in expected["ids"]]
        assert found.state.keys() == expected["state"].keys()
        for name, kept in expected["state"].items():
            assert found.state[name].keys() == kept.keys()
            assert all(same_bits(found.state[name][key], value) for key, value in kept.items())
        with found.as_recorded():
            assert [float(loss.detach()) for loss in found.losses()] == found.told
        seen += 1
    assert seen == STEPS
    assert not trajectory._kept


def test_memory_is_bounded_by_the_root_of_the_steps(tmp_path, monkeypatch):
    model, _, ledger = record(tmp_path / "run", sgd)
    monkeypatch.setattr(_trajectory, "_KEEP_BYTES", 0)
    alive, most = [0], [0]

    class Counted(_trajectory._Snapshot):
        @classmethod
        def of(cls, training):
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            return super().of(training)

        def __del__(self):
            alive[0] -= 1

    monkeypatch.setattr(_trajectory, "_Snapshot", Counted)
    for _ in Trajectory(replayer(model, ledger, sgd)).backwards():
        pass
    assert 0 < most[0] <= 2 * 4


@pytest.mark.parametrize("keep_bytes", [1 << 28, 0])
def test_batches_that_change_when_they_are_asked_for_again_are_refused(keep_bytes, tmp_path, monkeypatch):
    model, _, ledger = record(tmp_path / "run", sgd)
    monkeypatch.setattr(_trajectory, "_KEEP_BYTES", keep_bytes)
    calls = []

    def once(ids):
        calls.append(ids)
        inputs, labels = fetch(ids)
        return inputs if len(calls) <= 2 * STEPS else inputs.flip(0), labels

    query = blobs()[0][:1], blobs()[1][:1]
    replay = Replay(once, sgd, nn.functional.cross_entropy, accumulate=2)
    read = {"loss_fn": nn.functional.cross_entropy, "estimator": "gauss_newton", "replay": replay}
    with pytest.raises(LedgerError, match=r"micro-batch of step \d+ had the loss .* fetch must give the same batch"):
        ledger.scores(model, query, **read)


def test_a_run_of_one_step(tmp_path, monkeypatch):
    monkeypatch.setattr(_trajectory, "_KEEP_BYTES", 0)
    torch.manual_seed(0)
    model = nn.Linear(6, CLASSES)
    inputs, labels = blobs()

    def make(model):
        return gk.SGD(model.parameters(), lr=0.1)

    optimizer = make(model)
    with gk.rollback.record(model, optimizer, tmp_path / "run", replayable=True) as recorder:
        with recorder.batch(range(SAMPLES)):
            nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    ledger = gk.rollback.open(tmp_path / "run")
    replay = Replay(lambda ids: (inputs[ids], labels[ids]), make, nn.functional.cross_entropy)
    query = inputs[:2], labels[:2]
    read = {"loss_fn": nn.functional.cross_entropy}
    direct = ledger.scores(model, query, estimator="direct", **read).scores
    for estimator in ("gauss_newton", "metagradient"):
        found = ledger.scores(model, query, estimator=estimator, replay=replay, **read).scores
        # Nothing came after the only step. Records are of 8 bits.
        torch.testing.assert_close(found, direct, rtol=0.02, atol=0.02 * float(direct.abs().max()))
