"""Models trained without some samples: many in a stack against one by one, and one by one against ``undo``."""

from __future__ import annotations

import copy

import pytest
import torch
from recorded_models import gpt2, token_data, token_loss
from test_undo import CLASSES, SAMPLES, Classifier, blobs, fetch
from torch import nn

import gradkern as gk
from gradkern.loss import compute_loss
from gradkern.rollback import Replay
from gradkern.rollback import _retraining as retraining
from gradkern.rollback._replay import Replayer
from gradkern.rollback._retraining import retrain
from gradkern.rollback._stacked_step import StackedOptimizer, UnstackableError
from gradkern.rollback._stacked_training import StackedTraining
from gradkern.testing import same_bits

F = nn.functional
ACCUMULATE = 2


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


OPTIMIZERS = {
    "adamw, clipped": lambda m: gk.AdamW(trained(m), lr=1e-2, weight_decay=0.1, max_norm=0.3),
    "adam, amsgrad": lambda m: gk.Adam(trained(m), lr=1e-2, amsgrad=True, betas=(0.9, 0.9)),
    "adamw, groups": lambda m: gk.AdamW(
        [{"params": trained(m)[:1], "lr": 3e-3}, {"params": trained(m)[1:], "weight_decay": 0.3}], lr=1e-2
    ),
    "sgd, momentum": lambda m: gk.SGD(trained(m), lr=0.05, momentum=0.9, dampening=0.3, max_norm=0.3),
    "sgd, maximize": lambda m: gk.SGD(trained(m), lr=0.01, maximize=True),
}


def record(model, make_optimizer, path, *, fetch=fetch, loss_fn=F.cross_entropy, steps=8, samples=SAMPLES, **options):
    """Small micro-batches, so that some of them, and some steps, have no sample left; a falling learning rate."""
    torch.manual_seed(3)
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with gk.rollback.record(model, optimizer, path, replayable=True, steps_per_segment=3, **options) as recorder:
        for _ in range(steps):
            for _ in range(ACCUMULATE):
                ids = 100 + torch.randperm(samples)[:3]
                with recorder.batch(ids):
                    (compute_loss(model, fetch(ids), loss_fn) / ACCUMULATE).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return gk.rollback.open(path), Replay(fetch, make_optimizer, loss_fn, ACCUMULATE)


def subsets(ids, share, count=4):
    generator = torch.Generator().manual_seed(7)
    return torch.rand(count, len(ids), generator=generator) < share


def replayer_of(ledger, model, replay):
    return Replayer(ledger._store, model, replay, otherwise="nothing")


def ids_of(replayer):
    return torch.unique(torch.cat([ids for step in replayer.logged() for ids in step.ids]))


def untold(*_):
    pass


class Net(nn.Module):
    """No statistics over the batch, so that a single row may be left; random numbers, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(6, 8).requires_grad_(requires_grad=False)
        self.inner, self.norm = nn.Linear(8, 10), nn.LayerNorm(10)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(10, CLASSES)

    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.norm(self.inner(self.frozen(x))))))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stack_is_trained_as_undo_trains(name, tmp_path):
    torch.manual_seed(0)
    model = Net()
    ledger, replay = record(model, OPTIMIZERS[name], tmp_path / "run")
    ids = ids_of(replayer_of(ledger, model, replay))
    left_out = subsets(ids, 0.8)
    replayer = replayer_of(ledger, model, replay)
    steps = list(replayer.logged())
    empty = [all(bool(torch.isin(each, ids[left_out[0]]).all()) for each in step.ids) for step in steps]
    assert 0 < sum(empty) < len(steps)
    stack = StackedTraining(replayer.begin(), ids, left_out)
    with replayer.as_recorded():
        for step in steps:
            stack.make(step)
    inputs, labels = blobs()
    queries = [(inputs[:3], labels[:3]), (inputs[7:9], labels[7:9])]
    losses = stack.losses(queries, F.cross_entropy)
    for number, each in enumerate(left_out):
        undone = ledger.undo(model, ids[each], replay=replay).model
        named = dict(undone.named_parameters())
        assert stack._parameters.keys() == {name for name, each in named.items() if each.requires_grad}
        for key, value in stack._parameters.items():
            torch.testing.assert_close(value[number], named[key].detach(), rtol=1e-5, atol=1e-6)
        expected = torch.stack([compute_loss(undone.eval(), query, F.cross_entropy) for query in queries])
        torch.testing.assert_close(losses[number], expected.detach().double(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(losses[0], losses[1], rtol=1e-3)


def test_running_statistics_are_those_of_each_copy(tmp_path):
    torch.manual_seed(0)
    model = Classifier()
    ledger, replay = record(model, OPTIMIZERS["sgd, momentum"], tmp_path / "run", unowned=["norm.*"])
    ids = ids_of(replayer_of(ledger, model, replay))
    replayer = replayer_of(ledger, model, replay)
    # Torch refuses statistics over one row: of every micro-batch that loses samples at least two must stay.
    batches = [each for step in replayer.logged() for each in step.ids]
    together = torch.stack([ids == one for one in ids[:4]])
    assert all(int((~torch.isin(each, ids[row])).sum()) >= 2 for row in together for each in batches)
    stack = StackedTraining(replayer.begin(), ids, together)
    with replayer.as_recorded():
        for step in replayer.logged():
            stack.make(step)
    inputs, labels = blobs()
    losses = stack.losses([(inputs, labels)], F.cross_entropy)[:, 0]
    for row, loss in zip(together, losses, strict=True):
        undone = ledger.undo(model, ids[row], replay=replay).model
        expected = F.cross_entropy(undone.eval()(inputs), labels).detach().double()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(undone.norm.running_mean, model.norm.running_mean)
    assert len(set(losses.tolist())) == len(losses)


def test_language_models_are_trained_in_stacks(tmp_path):
    torch.manual_seed(0)
    model, data = gpt2(layers=1, vocabulary=11), token_data()

    def fetch(ids):
        return data[ids - 100]

    make_optimizer = OPTIMIZERS["adamw, clipped"]
    options = {"fetch": fetch, "loss_fn": token_loss, "steps": 4, "samples": len(data)}
    ledger, replay = record(model, make_optimizer, tmp_path / "run", **options)
    ids = ids_of(replayer_of(ledger, model, replay))
    left_out = subsets(ids, 0.4, count=3)
    found = retrain(replayer_of(ledger, model, replay), ids, left_out, 2, [data[:2]], token_loss, untold)
    assert found.why is None
    assert found.apart <= 1e-3
    for each, losses in zip(left_out, found.losses, strict=True):
        undone = ledger.undo(model, ids[each], replay=replay).model
        expected = token_loss(undone.eval()(data[:2]), data[:2]).detach().double()
        torch.testing.assert_close(losses[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_steps_have_the_bits_of_the_optimizer(name):
    torch.manual_seed(0)
    copies, model = 5, nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False))
    twins = [copy.deepcopy(model) for _ in range(copies)]
    optimizers = [OPTIMIZERS[name](twin) for twin in twins]
    stacked = StackedOptimizer(OPTIMIZERS[name](model), model, copies)
    parameters = {key: each.detach().expand(copies, *each.shape).clone() for key, each in model.named_parameters()}
    for step in range(6):
        # Powers of two, so that the norm is exact however it is summed.
        gradients = {key: torch.randn_like(each).sign() * 0.5 for key, each in parameters.items()}
        has_gradient = {key: torch.rand(copies) < 0.7 for key in parameters}
        if step == 3:
            has_gradient = {key: torch.ones(copies, dtype=torch.bool) for key in parameters}
        for key, each in gradients.items():
            each[~has_gradient[key]] = 0.0
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] *= 0.9
        groups = [{key: each for key, each in group.items() if key != "params"} for group in optimizers[0].param_groups]
        stacked.step(groups, parameters, gradients, has_gradient)
        for number, (twin, optimizer) in enumerate(zip(twins, optimizers, strict=True)):
            for key, each in twin.named_parameters():
                each.grad = gradients[key][number].clone() if has_gradient[key][number] else None
            optimizer.step()
            assert all(same_bits(each, parameters[key][number]) for key, each in twin.named_parameters())


class Looks(Net):
    """Cannot be run for many sets of parameters at once."""

    def forward(self, x):
        found = super().forward(x)
        return found * 2.0 if found.sum().item() > 1e9 else found


class Box:
    """What no batch can be stacked of."""


def boxed_loss(output, target):
    return F.cross_entropy(output, target[0])


def boxed(ids):
    inputs, labels = fetch(ids)
    return inputs, (labels, Box())


ALONE = {
    "a model that looks at values": (Looks, OPTIMIZERS["sgd, maximize"], fetch, F.cross_entropy, "item"),
    "another clip policy": (
        Net,
        lambda m: gk.AdamW(trained(m), lr=1e-2, clip=gk.clip.GroupNorm(0.3)),
        fetch,
        F.cross_entropy,
        "clips by GroupNorm",
    ),
    "an object in the batch": (Net, OPTIMIZERS["sgd, maximize"], boxed, boxed_loss, "holds a Box"),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_be_stacked_is_trained_one_by_one(name, tmp_path):
    make_model, make_optimizer, fetch, loss_fn, why = ALONE[name]
    torch.manual_seed(0)
    model = make_model()
    ledger, replay = record(model, make_optimizer, tmp_path / "run", fetch=fetch, loss_fn=loss_fn, steps=4)
    ids = ids_of(replayer_of(ledger, model, replay))
    left_out, queries, told = subsets(ids, 0.3), [fetch(ids[:2]), fetch(ids[3:4])], []
    replayer = replayer_of(ledger, model, replay)
    found = retrain(replayer, ids, left_out, 3, queries, loss_fn, lambda *done: told.append(done))
    assert why in found.why
    assert found.apart is None
    assert found.losses.shape == (3, 2)
    for each, losses in zip(left_out, found.losses, strict=False):
        undone = ledger.undo(model, ids[each], replay=replay).model.eval()
        with torch.no_grad():
            expected = torch.stack([compute_loss(undone, query, loss_fn) for query in queries])
        assert torch.equal(losses, expected.double())
    assert [step for step, _ in told] == list(range(1, len(told) + 1))
    assert told[-1] == (len(told), len(told))
    assert told[7][0] < told[7][1]


def test_a_stack_that_goes_apart_from_undo_is_given_up(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = Net()
    ledger, replay = record(model, OPTIMIZERS["adamw, clipped"], tmp_path / "run")
    ids = ids_of(replayer_of(ledger, model, replay))

    class Careless(StackedTraining):
        def losses(self, queries, loss_fn):
            return super().losses(queries, loss_fn) * 1.1

    monkeypatch.setattr(retraining, "StackedTraining", Careless)
    found = retrain(replayer_of(ledger, model, replay), ids, subsets(ids, 0.3), 2, [blobs()], F.cross_entropy, untold)
    assert "of exact retraining, more than 0.05" in found.why
    assert len(found.losses) == 2


def test_stacks_are_as_large_as_memory_allows(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = Net()
    ledger, replay = record(model, OPTIMIZERS["adamw, clipped"], tmp_path / "run")
    ids = ids_of(replayer_of(ledger, model, replay))
    arguments = (ids, subsets(ids, 0.3, count=7), 2, [blobs()], F.cross_entropy)
    whole = retrain(replayer_of(ledger, model, replay), *arguments, untold)
    made, told = [], []

    class Counted(StackedTraining):
        def __init__(self, training, ids, left_out):
            made.append(len(left_out))
            super().__init__(training, ids, left_out)

    monkeypatch.setattr(retraining, "StackedTraining", Counted)
    size = 8 * sum(each.nbytes for each in model.parameters())
    monkeypatch.setattr(retraining, "_STACK_BYTES", 4 * size)
    parts = retrain(replayer_of(ledger, model, replay), *arguments, lambda *done: told.append(done))
    assert len(made) > 2
    assert max(made) <= 3
    assert sum(made) == 7
    torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-5, atol=1e-6)
    assert told[-1] == (8 * (2 + len(made)), 8 * (2 + len(made)))


def test_optimizers_without_a_stacked_step_are_named():
    model = nn.Linear(2, 2)
    with pytest.raises(UnstackableError, match="the optimizer is AdamW, not gradkern's"):
        StackedOptimizer(torch.optim.AdamW(model.parameters()), model, 3)
    with pytest.raises(UnstackableError, match="other parameters than of fp32"):
        StackedOptimizer(gk.AdamW(model.double().parameters()), model, 3)
