"""The exact derivative: against weights that are really changed, and against autograd through a whole training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_undo import CLASSES, SAMPLES, blobs, fetch
from torch import nn

import gradkern as gk
from gradkern.errors import LedgerError, UnstableInfluenceError
from gradkern.rollback import Replay

F = nn.functional
BATCH, ACCUMULATE = 5, 2


def tanh_net():
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, CLASSES))


class Busy(nn.Module):
    """Draws random numbers, has a frozen layer, and statistics of the batch in its way."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(6, 8).requires_grad_(requires_grad=False)
        self.inner, self.norm = nn.Linear(8, 10), nn.BatchNorm1d(10, track_running_stats=False)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(10, CLASSES)

    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.norm(self.inner(self.frozen(x))))))


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# Of each the optimizer, and its namesake's options; smooth enough that steps of 1e-5 tell their derivatives.
OPTIMIZERS = {
    "adamw, clipped": lambda m: gk.AdamW(trained(m), lr=1e-2, weight_decay=0.1, eps=1e-4, max_norm=0.3),
    "adamw": lambda m: gk.AdamW(trained(m), lr=1e-2, betas=(0.8, 0.95), eps=1e-3),
    "adam, amsgrad": lambda m: gk.Adam(trained(m), lr=1e-2, amsgrad=True, eps=1e-3, betas=(0.9, 0.9)),
    "adamw, groups": lambda m: gk.AdamW(
        [{"params": trained(m)[:1], "lr": 3e-3}, {"params": trained(m)[1:], "weight_decay": 0.3}], lr=1e-2, eps=1e-3
    ),
    "sgd, momentum": lambda m: gk.SGD(trained(m), lr=0.2, momentum=0.9, dampening=0.3, max_norm=0.3),
    "sgd": lambda m: gk.SGD(trained(m), lr=0.3),
}


def record(model, make_optimizer, path, steps=6, loss_fn=F.cross_entropy, **options):
    """Ids and random states of micro-batches, the learning rates of steps, and the ledger."""
    torch.manual_seed(3)
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    batches, states = [], []
    with gk.rollback.record(model, optimizer, path, replayable=True, steps_per_segment=4, **options) as recorder:
        for at in range(ACCUMULATE * steps):
            batches.append(100 + torch.randperm(SAMPLES)[:BATCH])
            states.append(torch.get_rng_state())
            inputs, labels = fetch(batches[-1])
            with recorder.batch(batches[-1]):
                (loss_fn(model(inputs), labels) / ACCUMULATE).backward()
            if at % ACCUMULATE:
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    replay = Replay(fetch, make_optimizer, loss_fn, ACCUMULATE)
    return batches, states, gk.rollback.open(path), replay


def queries():
    inputs, labels = blobs()
    return [(inputs[:3], labels[:3]), (inputs[7:8], labels[7:8])]


def retrain(start, make_optimizer, batches, weights):
    """The queries' losses after training in fp64 by torch, each sample's terms times its weight."""
    model = copy.deepcopy(start).double()
    ours = make_optimizer(model)
    namesake = next(kind for kind in type(ours).__mro__ if kind.__module__.startswith("torch.optim"))
    names = {"lr", "betas", "eps", "weight_decay", "amsgrad", "momentum", "dampening", "params"}
    optimizer = namesake([{key: value for key, value in group.items() if key in names} for group in ours.param_groups])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for at, ids in enumerate(batches):
        inputs, labels = fetch(ids)
        rows = F.cross_entropy(model(inputs.double()), labels, reduction="none")
        ((rows * weights[ids - 100]).sum() / BATCH / ACCUMULATE).backward()
        if at % ACCUMULATE:
            if ours.max_norm is not None:
                nn.utils.clip_grad_norm_(trained(model), ours.max_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return torch.stack([F.cross_entropy(model(inputs.double()), labels) for inputs, labels in queries()])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scores_are_what_changed_weights_do(name, tmp_path):
    make_optimizer = OPTIMIZERS[name]
    torch.manual_seed(0)
    model = tanh_net()
    start = copy.deepcopy(model)
    batches, _, ledger, replay = record(model, make_optimizer, tmp_path / "run")
    found = ledger.scores(model, queries(), loss_fn=F.cross_entropy, estimator="metagradient", replay=replay)
    some = found.ids[::3].tolist()
    expected = torch.empty(2, len(some), dtype=torch.float64)
    for column, id in enumerate(some):
        losses = []
        for change in (-1e-5, 1e-5):
            weights = torch.ones(SAMPLES, dtype=torch.float64)
            weights[id - 100] += change
            losses.append(retrain(start, make_optimizer, batches, weights))
        expected[:, column] = (losses[0] - losses[1]) / 2e-5
    error = (found.scores[:, ::3] - expected).norm(dim=1) / expected.norm(dim=1)
    assert bool((error < 1e-4).all()), error
    assert bool((expected > 0).any())
    assert bool((expected < 0).any())


def test_a_sample_that_helped_is_missed(tmp_path):
    """Positive scores are rises of the loss where a sample's terms are really gone."""

    def make_optimizer(model):
        return gk.SGD(model.parameters(), lr=0.05, momentum=0.5)

    torch.manual_seed(0)
    model = tanh_net()
    start = copy.deepcopy(model)
    batches, _, ledger, replay = record(model, make_optimizer, tmp_path / "run")
    found = ledger.scores(model, queries(), loss_fn=F.cross_entropy, estimator="metagradient", replay=replay)
    whole = retrain(start, make_optimizer, batches, torch.ones(SAMPLES))
    gained = []
    for id in found.ids.tolist():
        weights = torch.ones(SAMPLES)
        weights[id - 100] = 0.0
        gained.append(retrain(start, make_optimizer, batches, weights) - whole)
    expected = torch.stack(gained, dim=1)
    assert bool(((found.scores - expected).norm(dim=1) < 0.05 * expected.norm(dim=1)).all())


def unrolled_scores(start, make_optimizer, batches, states, ids):
    """Autograd through a whole training in one graph, its rules written out."""
    model = copy.deepcopy(start)
    ours = make_optimizer(model)
    names = {id(each): name for name, each in model.named_parameters()}
    options = {names[id(each)]: group for group in ours.param_groups for each in group["params"]}
    parameters = {name: dict(model.named_parameters())[name].detach().requires_grad_() for name in options}
    weights = torch.ones(SAMPLES, requires_grad=True)
    first, second = ({name: torch.zeros_like(each) for name, each in parameters.items()} for _ in range(2))
    factor = 1.0
    for step in range(len(batches) // ACCUMULATE):
        total = 0.0
        for at in range(ACCUMULATE * step, ACCUMULATE * (step + 1)):
            torch.set_rng_state(states[at])
            inputs, labels = fetch(batches[at])
            output = torch.func.functional_call(model, parameters, (inputs,))
            rows = F.cross_entropy(output, labels, reduction="none")
            total = total + (rows * weights[batches[at] - 100]).sum() / BATCH / ACCUMULATE
        gradients = dict(
            zip(parameters, torch.autograd.grad(total, list(parameters.values()), create_graph=True), strict=True)
        )
        norm = torch.stack([each.square().sum() for each in gradients.values()]).sum().sqrt()
        clip = (ours.max_norm / (norm + 1e-6)).clamp(max=1.0)
        for name, gradient in gradients.items():
            group = options[name]
            (beta1, beta2), lr = group["betas"], group["lr"] * factor
            gradient = gradient * clip
            first[name] = beta1 * first[name] + (1 - beta1) * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * gradient.square()
            # Where a gradient is zero for good (a bias before statistics of the batch may be), the root is flat.
            safe = torch.where(second[name] > 0, second[name], 1.0)
            root = torch.where(second[name] > 0, safe.sqrt(), 0.0)
            denominator = root / math.sqrt(1 - beta2 ** (step + 1)) + group["eps"]
            moved = first[name] / (1 - beta1 ** (step + 1)) / denominator
            parameters[name] = parameters[name] * (1 - lr * group["weight_decay"]) - lr * moved
        factor *= 0.9
    model.eval()
    losses = [F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y) for x, y in queries()[:1]]
    return -torch.stack([torch.autograd.grad(loss, weights)[0] for loss in losses])[:, ids - 100]


def test_dropout_frozen_layers_and_batch_statistics_are_differentiated_exactly(tmp_path):
    """And parameters that are trained but not recorded."""
    make_optimizer = OPTIMIZERS["adamw, clipped"]
    torch.manual_seed(0)
    model = Busy()
    start = copy.deepcopy(model)
    batches, states, ledger, replay = record(model, make_optimizer, tmp_path / "run", unowned=["norm.*"])
    found = ledger.scores(model, queries()[:1], loss_fn=F.cross_entropy, estimator="metagradient", replay=replay)
    expected = unrolled_scores(start, make_optimizer, batches, states, found.ids)
    error = float((found.scores - expected).norm() / expected.norm())
    assert error < 1e-3, error


def test_gradients_that_are_always_zero_do_no_harm(tmp_path):
    """Their second moments are zero, where the root has no derivative."""
    make_optimizer = OPTIMIZERS["adamw, clipped"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, CLASSES))
    with torch.no_grad():
        model[0].bias[:3] = -100.0
    start = copy.deepcopy(model)
    batches, states, ledger, replay = record(model, make_optimizer, tmp_path / "run")
    found = ledger.scores(model, queries()[:1], loss_fn=F.cross_entropy, estimator="metagradient", replay=replay)
    expected = unrolled_scores(start, make_optimizer, batches, states, found.ids)
    torch.testing.assert_close(found.scores, expected.double(), rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_outputs_may_have_several_rows_a_sample(tmp_path):
    def loss_fn(output, labels):
        return F.cross_entropy(output.flatten(1), labels)

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, CLASSES)

        def forward(self, x):
            return self.head(x).reshape(-1, CLASSES // 2)

    def pairs_loss(output, labels):
        return loss_fn(output.reshape(len(labels), -1), labels)

    make_optimizer = OPTIMIZERS["adamw"]
    scores = []
    for model, loss in ((nn.Linear(6, CLASSES), loss_fn), (Pairs(), pairs_loss)):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), (0.1, 0.2), strict=True):
                parameter.copy_(value * torch.arange(parameter.numel()).reshape(parameter.shape).sin())
        _, _, ledger, replay = record(model, make_optimizer, tmp_path / type(model).__name__, loss_fn=loss)
        scores.append(ledger.scores(model, queries(), loss_fn=loss, estimator="metagradient", replay=replay).scores)
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-8)


@pytest.fixture
def recorded(tmp_path):
    torch.manual_seed(0)
    model = tanh_net()
    _, _, ledger, replay = record(model, OPTIMIZERS["adamw"], tmp_path / "run")
    return model, ledger, replay


@pytest.mark.parametrize(
    ("make_optimizer", "message"),
    [
        (lambda m: gk.Lion(m.parameters()), "Adam, AdamW and SGD, got Lion"),
        (lambda m: torch.optim.AdamW(m.parameters()), "Adam, AdamW and SGD, got AdamW"),
        (lambda m: gk.AdamW(m.parameters(), state="int8"), "cannot differentiate these steps: .*rounded stochastic"),
        (lambda m: gk.Adam(m.parameters(), weight_decay=0.1), "cannot differentiate these steps: .*weight decay"),
        (lambda m: gk.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True), "these steps: .*nesterov"),
        (lambda m: gk.AdamW(m.parameters(), clip=gk.clip.ZClip()), "clipping by the 2-norm .* got ZClip"),
        (lambda m: gk.AdamW(m.parameters(), clip=gk.clip.GroupNorm(1.0)), "clipping by the 2-norm .* got GroupNorm"),
        (lambda m: gk.AdamW(m.parameters(), clip=gk.clip.GlobalNorm(1.0, 1.0)), "the 2-norm .* norm_type=1"),
    ],
)
def test_what_cannot_be_differentiated_is_refused_before_anything_runs(recorded, make_optimizer, message):
    model, ledger, _ = recorded

    def never(ids):
        raise AssertionError

    replay = Replay(never, make_optimizer, F.cross_entropy, ACCUMULATE)
    with pytest.raises(LedgerError, match=message):
        ledger.scores(model, queries(), loss_fn=F.cross_entropy, estimator="metagradient", replay=replay)


def test_buffers_that_training_changes_are_refused(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, CLASSES))
    _, _, ledger, replay = record(model, OPTIMIZERS["adamw"], tmp_path / "run", unowned=["1.*"])
    with pytest.raises(LedgerError, match=r"changed the buffers 1.running_mean, 1.running_var .*'gauss_newton'"):
        ledger.scores(model, queries(), loss_fn=F.cross_entropy, estimator="metagradient", replay=replay)
    found = ledger.scores(model, queries(), loss_fn=F.cross_entropy, estimator="gauss_newton", replay=replay)
    assert bool(found.scores.isfinite().all())


def test_steps_that_do_more_than_their_rule_are_refused(tmp_path):
    def make_optimizer(model):
        optimizer = gk.AdamW(model.parameters(), lr=1e-2)
        optimizer.register_step_post_hook(lambda *_: model[2].bias.data.clamp_(-0.01, 0.01))
        return optimizer

    torch.manual_seed(0)
    model = tanh_net()
    _, _, ledger, replay = record(model, make_optimizer, tmp_path / "run")
    with pytest.raises(LedgerError, match=r"step \d moved '2.bias' by .* something besides the rule changes"):
        ledger.scores(model, queries(), loss_fn=F.cross_entropy, estimator="metagradient", replay=replay)


def contrast(output, labels):
    """Every row against all others of the batch."""
    return F.cross_entropy(output @ output.t(), torch.arange(len(output)))


def last_two(output, labels):
    return F.cross_entropy(output, labels) + 0.1 * (output[-1] * output[-2]).sum()


@pytest.mark.parametrize("loss_fn", [contrast, last_two])
def test_a_loss_that_ties_samples_together_is_refused(loss_fn, tmp_path):
    torch.manual_seed(0)
    model = tanh_net()
    _, _, ledger, replay = record(model, OPTIMIZERS["adamw"], tmp_path / "run", loss_fn=loss_fn)
    with pytest.raises(LedgerError, match="not a sum of one term for each sample"):
        ledger.scores(model, queries(), loss_fn=F.cross_entropy, estimator="metagradient", replay=replay)


def test_an_output_that_is_of_no_sample_is_refused(tmp_path):
    class Means(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, CLASSES)

        def forward(self, x):
            return self.head(x)[1:]

    torch.manual_seed(0)
    model = Means()
    _, _, ledger, replay = record(
        model, OPTIMIZERS["adamw"], tmp_path / "run", loss_fn=lambda output, labels: output.square().mean()
    )
    with pytest.raises(LedgerError, match=r"output has shape \(4, 4\) for 5 samples, expected equally many"):
        ledger.scores(
            model,
            (torch.ones(3, 6), torch.ones(3)),
            loss_fn=lambda output, _: output.sum(),
            estimator="metagradient",
            replay=replay,
        )


def test_a_derivative_that_is_not_finite_is_an_error(recorded):
    model, ledger, replay = recorded
    with pytest.raises(UnstableInfluenceError, match="2 of 2 queries is not finite"):
        ledger.scores(
            model,
            queries(),
            loss_fn=lambda output, _: (1e30 * output).square().sum(),
            estimator="metagradient",
            replay=replay,
        )
