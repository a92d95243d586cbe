"""The Gauss-Newton sweep: its products against dense matrices, the whole of it against a recursion in fp64."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from recorded_models import TokenModel, gpt2, token_data, token_loss
from test_direct import stored_gradients
from test_undo import CLASSES, REPLAY, SAMPLES, Classifier, blobs, fetch, make_optimizer
from test_undo import train as train_classifier
from torch import nn

import gradkern as gk
from gradkern.errors import LedgerError, UnstableInfluenceError
from gradkern.rollback import Replay, _estimators
from gradkern.rollback._gauss_newton import GaussNewton, gauss_newton_product
from gradkern.rollback._reading import read_segments
from gradkern.rollback._replay import Replayer
from gradkern.rollback._smoothing import unsmooth
from gradkern.rollback._sweep import StepBack
from gradkern.rollback._trajectory import Trajectory
from gradkern.testing import same_bits

F = nn.functional


def dense_product(loss, output, parameters, directions):
    """``Jᵀ H J`` written out, row by row, times directions."""
    (residual,) = torch.autograd.grad(loss, output, create_graph=True)

    def rows(of, by):
        each = [torch.autograd.grad(value, by, retain_graph=True, allow_unused=True) for value in of.flatten()]
        return torch.stack(
            [
                torch.cat(
                    [
                        torch.zeros(to.numel(), dtype=to.dtype) if part is None else part.flatten()
                        for part, to in zip(row, by, strict=True)
                    ]
                )
                for row in each
            ]
        )

    jacobian, hessian = rows(output, parameters), rows(residual, [output])
    flat = torch.cat([each.flatten(1) for each in directions], dim=1)
    found = flat @ (jacobian.t() @ hessian @ jacobian).t()
    sizes = [each.numel() for each in parameters]
    return [part.reshape(-1, *each.shape) for part, each in zip(found.split(sizes, dim=1), parameters, strict=True)]


LABELS, TARGETS = torch.tensor([0, 2, 1, 2, 0]), torch.rand(5, 3, generator=torch.Generator().manual_seed(0)).double()
NETS = {
    "tanh": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3), nn.GroupNorm(1, 2), nn.GELU(), nn.Flatten(), nn.Linear(4, 3)
    ),
    "dropout, batch statistics": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.4), nn.ReLU(), nn.Linear(6, 3)
    ),
}
LOSSES = {
    "cross-entropy": lambda z: F.cross_entropy(z, LABELS),
    "smoothed labels": lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.1),
    "squares": lambda z: F.mse_loss(z, TARGETS),
    "two classes": lambda z: F.binary_cross_entropy_with_logits(z, TARGETS),
    "huber": lambda z: F.huber_loss(z, TARGETS, delta=0.3),
    "by hand": lambda z: z.softmax(1)[range(5), LABELS].square().mean() + z[0] @ z[1],
}


@pytest.mark.parametrize("name_of_loss", LOSSES)
@pytest.mark.parametrize("name_of_net", NETS)
def test_products_are_those_of_the_dense_matrix(name_of_net, name_of_loss):
    torch.manual_seed(1)
    net = NETS[name_of_net]().double()
    parameters = list(net.parameters())
    output = net(torch.randn(5, 4, dtype=torch.float64))
    loss = LOSSES[name_of_loss](output)
    directions = [torch.randn(7, *each.shape, dtype=torch.float64) for each in parameters]
    expected = dense_product(loss, output, parameters, directions)
    found = gauss_newton_product(loss, output, parameters, directions)
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-9, atol=1e-12)
    assert max(float(each.abs().max()) for each in expected) > 1e-3


def test_the_matrix_of_a_cross_entropy_is_that_of_its_probabilities():
    torch.manual_seed(0)
    net = NETS["tanh"]().double()
    inputs, parameters = torch.randn(5, 4, dtype=torch.float64), list(net.parameters())
    names = [name for name, _ in net.named_parameters()]
    u = [torch.randn(1, *each.shape, dtype=torch.float64) for each in parameters]
    output = net(inputs)
    found = gauss_newton_product(LOSSES["cross-entropy"](output), output, parameters, u)
    jacobians = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (inputs,)))(
        dict(zip(names, parameters, strict=True))
    )
    moved = sum((jacobians[name] * each).flatten(2).sum(2) for name, each in zip(names, u, strict=True))
    p = output.softmax(1)
    bent = (p * moved - p * (p * moved).sum(1, keepdim=True)) / 5
    for name, each in zip(names, found, strict=True):
        torch.testing.assert_close(each[0], torch.einsum("bk,bk...->...", bent, jacobians[name]))


@pytest.mark.parametrize("loss", [lambda z: F.l1_loss(z, TARGETS), lambda z: z.sum(), lambda z: F.relu(z).mean()])
def test_a_loss_that_does_not_bend_has_no_curvature(loss):
    net = NETS["tanh"]().double()
    output = net(torch.randn(5, 4, dtype=torch.float64))
    found = gauss_newton_product(
        loss(output), output, list(net.parameters()), [torch.ones(2, *each.shape).double() for each in net.parameters()]
    )
    assert not any(each.any() for each in found)


def products(model, ledger, replay, count=3, curvature=None):
    """Of every step from the last: number, directions, and what :class:`GaussNewton` makes of them."""
    layout = ledger._layout
    owned = layout.owned(layout.trained_parameters(model))
    if curvature is None:
        curvature = GaussNewton(layout, Trajectory(Replayer(ledger._store, model, replay, otherwise="nothing")))
    for step in reversed(range(ledger.steps)):
        directions = {index: torch.randn(count, *each.shape) for index, each in owned.items()}
        sums = {index: torch.zeros_like(each) for index, each in directions.items()}
        back = StepBack(torch.empty(0), [], torch.empty(count, 0), lambda given=directions: given)
        curvature.add_product(back, sums)
        yield step, directions, sums


def assert_near(found, expected, tolerance=1e-4):
    largest = max(float(each.norm()) for each in expected)
    for one, other in zip(found, expected, strict=True):
        # What a norm behind it takes out of a bias's gradient is rounding.
        assert float((one - other).norm()) < tolerance * float(other.norm()) + 1e-6 * largest


def test_dropout_accumulation_frozen_layers_and_batch_statistics_are_those_of_the_run(tmp_path):
    torch.manual_seed(0)
    model = Classifier()
    twin = copy.deepcopy(model)
    batches, states = [100 + torch.randperm(SAMPLES)[:5] for _ in range(12)], []
    optimizer = make_optimizer(model)
    options = {"unowned": ["norm.*"], "replayable": True}
    with gk.rollback.record(model, optimizer, tmp_path / "run", **options) as recorder:
        train_classifier(model, optimizer, batches, states, recorder)
    ledger = gk.rollback.open(tmp_path / "run")
    owned = [info.name for info in ledger._layout.parameters if info.owned]
    assert owned == ["inner.weight", "inner.bias", "head.weight", "head.bias"]
    starts = []
    optimizer = make_optimizer(twin)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(6):
        starts.append(copy.deepcopy(twin))
        for at in (2 * step, 2 * step + 1):
            torch.set_rng_state(states[at])
            inputs, labels = fetch(batches[at])
            (F.cross_entropy(twin(inputs), labels) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for step, directions, sums in products(model, ledger, REPLAY):
        start = starts[step]
        parameters = [dict(start.named_parameters())[name] for name in owned]
        expected = [torch.zeros_like(each) for each in directions.values()]
        for at in (2 * step, 2 * step + 1):
            torch.set_rng_state(states[at])
            inputs, labels = fetch(batches[at])
            output = start(inputs)
            loss = F.cross_entropy(output, labels) / 2
            for sum_, part in zip(
                expected, dense_product(loss, output, parameters, list(directions.values())), strict=True
            ):
                sum_ += part
        assert_near(list(sums.values()), expected)


@pytest.mark.parametrize("build", ["token model", "gpt2"])
def test_language_models_with_tied_weights_and_attention(build, tmp_path):
    torch.manual_seed(0)
    model = TokenModel(vocabulary=7) if build == "token model" else gpt2(layers=1, width=8, length=6, vocabulary=7)
    data = token_data(6, length=6, vocabulary=7)
    model.train()

    def make(model):
        return gk.AdamW(model.parameters(), lr=1e-2)

    optimizer, states = make(model), []
    start = copy.deepcopy(model)
    with gk.rollback.record(model, optimizer, tmp_path / "run", replayable=True) as recorder:
        for step in range(2):
            states.append(torch.get_rng_state())
            with recorder.batch([step, step + 1]):
                token_loss(model(data[step : step + 2]), data[step : step + 2]).backward()
            optimizer.step()
            optimizer.zero_grad()
    replay = Replay(lambda ids: data[ids], make, token_loss)
    ledger = gk.rollback.open(tmp_path / "run")
    *_, (step, directions, sums) = products(model, ledger, replay)
    assert step == 0
    torch.set_rng_state(states[0])
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        made = start(data[:2])
    output = getattr(made, "logits", made)
    named = dict(start.named_parameters())
    parameters = [named[info.name] for info in ledger._layout.parameters]
    expected = dense_product(token_loss(output, data[:2]), output, parameters, list(directions.values()))
    assert_near(list(sums.values()), expected, tolerance=1e-3)
    found = ledger.scores(model, data[3:5], loss_fn=token_loss, estimator="gauss_newton", replay=replay)
    assert found.ids.tolist() == [0, 1, 2]
    assert bool(found.scores.isfinite().all())


def linear_run(path, steps=12):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    inputs, targets = torch.randn(10, 4), torch.randn(10, 2)

    def make(model):
        return gk.AdamW(model.parameters(), lr=3e-2, weight_decay=0.1, max_norm=0.5)

    optimizer, rows = make(model), [torch.randperm(10)[:4] for _ in range(2 * steps)]
    with gk.rollback.record(model, optimizer, path, replayable=True, steps_per_segment=5) as recorder:
        for at, ids in enumerate(rows):
            with recorder.batch(ids):
                (F.mse_loss(model(inputs[ids]), targets[ids]) / 2).backward()
            if at % 2:
                optimizer.step()
                optimizer.zero_grad()
    replay = Replay(lambda ids: (inputs[ids], targets[ids]), make, F.mse_loss, accumulate=2)
    return model, inputs, targets, rows, gk.rollback.open(path), replay


def test_of_a_linear_model_and_squares_it_is_the_exact_recursion(tmp_path):
    """Forwards in time in fp64, with the Hessian matrix, which is known."""
    model, inputs, targets, rows, ledger, replay = linear_run(tmp_path / "run")
    found = {}
    deltas, momenta = (defaultdict(lambda: torch.zeros(2, 5, dtype=torch.float64)) for _ in range(2))
    number = 0
    for segment in read_segments(ledger._store):
        for step in range(segment.steps):
            inner = torch.zeros(5, 5, dtype=torch.float64)
            for ids in rows[2 * number : 2 * number + 2]:
                with_one = torch.cat([inputs[ids], torch.ones(4, 1)], dim=1).double()
                inner += with_one.t() @ with_one * 2 / (4 * 2) / 2  # of 4 rows and 2 outputs, of 2 micro-batches
            gradients = [list(stored_gradients(ledger, segment, step, index)) for index in (0, 1)]
            scalars = segment.step_scalars(step, 0)
            sizes = [
                unsmooth([each[step] for each in segment.preconditioners[index]], shape).double()
                for index, shape in enumerate([(2, 4), (2,)])
            ]
            size = torch.cat([sizes[0], sizes[1].unsqueeze(1)], dim=1)
            for sample in range(10):
                own = torch.zeros(2, 5, dtype=torch.float64)
                for index, part in enumerate((own[:, :4], own[:, 4])):
                    for visit_sample, gradient in gradients[index]:
                        if visit_sample == sample:
                            part += gradient
                own += deltas[sample] @ inner
                momenta[sample] = scalars.momentum * momenta[sample] + scalars.grad_weight * scalars.multiplier * own
                deltas[sample] = scalars.decay * deltas[sample] - size * momenta[sample]
            number += 1
    query = inputs[:3], targets[:3]
    gradient = torch.autograd.grad(F.mse_loss(model(query[0]), query[1]), list(model.parameters()))
    flat = torch.cat([gradient[0], gradient[1].unsqueeze(1)], dim=1).double()
    expected = torch.tensor([-float((flat * deltas[sample]).sum()) for sample in range(10)], dtype=torch.float64)
    for estimator in ("gauss_newton", "direct"):
        given = {"replay": replay} if estimator == "gauss_newton" else {}
        scores = ledger.scores(model, query, loss_fn=F.mse_loss, estimator=estimator, **given).scores
        found[estimator] = float((scores - expected).norm() / expected.norm())
    assert found["gauss_newton"] < 1e-4, found
    assert found["direct"] > 0.05, found


@pytest.fixture
def linear(tmp_path):
    return linear_run(tmp_path / "run", steps=10)


def test_a_list_of_queries_is_scored_as_each_alone(linear):
    model, inputs, targets, _, ledger, replay = linear
    queries = [(inputs[:1], targets[:1]), (inputs[4:6], targets[4:6])]
    read = {"loss_fn": F.mse_loss, "estimator": "gauss_newton", "replay": replay}
    together = ledger.scores(model, queries, **read)
    for row, query in enumerate(queries):
        alone = ledger.scores(model, query, **read)
        torch.testing.assert_close(alone.scores, together.scores[row], rtol=1e-4, atol=1e-9)
        best = ledger.explain(model, query, k=1, **read)
        assert best[0].id == int(alone.ids[alone.scores.argmax()])


@pytest.mark.parametrize("estimator", ["gauss_newton", "metagradient"])
def test_everything_of_the_users_is_left_as_it_was(linear, estimator):
    model, inputs, targets, _, ledger, replay = linear
    model.weight.grad = torch.ones_like(model.weight)
    model.eval()
    before = [each.clone() for each in model.parameters()]
    random_numbers, threads = torch.get_rng_state(), torch.get_num_threads()
    read = {"loss_fn": F.mse_loss, "estimator": estimator, "replay": replay}
    first = ledger.scores(model, (inputs[:2], targets[:2]), **read).scores
    with torch.no_grad():
        assert same_bits(ledger.scores(model, (inputs[:2], targets[:2]), **read).scores, first)
    assert all(map(same_bits, model.parameters(), before))
    assert torch.equal(model.weight.grad, torch.ones_like(model.weight))
    assert model.bias.grad is None
    assert not model.training
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert torch.get_num_threads() == threads
    assert not model._forward_hooks


@pytest.mark.parametrize("estimator", ["gauss_newton", "metagradient"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"needs replay=Replay\(fetch, make_optimizer, loss_fn\), got None"),
        ({"mode": "expected"}, r"there are .*'gauss_newton' with mode='run'.* with mode='expected'"),
    ],
)
def test_without_a_replay_or_in_another_mode_it_is_refused(linear, estimator, options, message):
    model, inputs, targets, _, ledger, replay = linear
    given = {"replay": replay, **options} if options else {}
    with pytest.raises(ValueError, match=message):
        ledger.scores(model, (inputs, targets), loss_fn=F.mse_loss, estimator=estimator, **given)


@pytest.mark.parametrize("estimator", [None, "ref", "direct"])
def test_a_replay_that_is_not_used_is_refused(linear, estimator):
    model, inputs, targets, _, ledger, replay = linear
    with pytest.raises(ValueError, match=r"does not run the training again, got replay="):
        ledger.explain(model, (inputs, targets), loss_fn=F.mse_loss, estimator=estimator, replay=replay)


@pytest.mark.parametrize("estimator", ["gauss_newton", "metagradient"])
def test_another_training_is_refused(linear, estimator):
    model, inputs, targets, _, ledger, replay = linear
    wrong = Replay(lambda ids: (inputs[ids], targets[ids.flip(0)]), replay.make_optimizer, F.mse_loss, 2)
    with pytest.raises(LedgerError, match="gave other parameters after 8 steps than were recorded"):
        ledger.scores(model, (inputs, targets), loss_fn=F.mse_loss, estimator=estimator, replay=wrong)


@pytest.mark.parametrize("estimator", ["gauss_newton", "metagradient"])
def test_a_ledger_without_a_log_is_refused(estimator, token_model, train):
    run = train(token_model, token_data(), steps=2)
    replay = Replay(lambda ids: token_data()[ids], make_optimizer, token_loss)
    with pytest.raises(LedgerError, match=r"without replayable=True.* needs no replay: estimator='ref' or 'direct'"):
        run.ledger().scores(token_model, token_data()[:1], loss_fn=token_loss, estimator=estimator, replay=replay)


def test_growing_influence_is_an_error_not_a_score(linear, monkeypatch):
    model, inputs, targets, _, ledger, replay = linear
    monkeypatch.setattr(_estimators, "_MOST_GROWTH", 1e-6)
    with pytest.raises(UnstableInfluenceError, match="estimator='gauss_newton' would be noise"):
        ledger.scores(model, (inputs, targets), loss_fn=F.mse_loss, estimator="gauss_newton", replay=replay)


class Returns(nn.Module):
    """What training sees of a model can be many things."""

    def __init__(self, how):
        super().__init__()
        self.head, self.how = nn.Linear(6, CLASSES), how

    def forward(self, x):
        return self.how(self.head, x)


@pytest.mark.parametrize(
    ("how", "loss_fn", "error", "message"),
    [
        (lambda head, x: (head(x), x), lambda made, t: F.cross_entropy(made[0], t), TypeError, "must return a tensor"),
        (
            lambda head, x: head(x).square().mean(),
            lambda made, t: made,
            LedgerError,
            "the model returns its loss without",
        ),
    ],
    ids=["pair", "loss"],
)
@pytest.mark.parametrize("estimator", ["gauss_newton", "metagradient"])
def test_an_output_that_cannot_be_told_from_the_loss_is_refused(how, loss_fn, error, message, estimator, tmp_path):
    model, ledger, replay = returned_run(how, lambda model: loss_fn, tmp_path)
    with pytest.raises(error, match=message):
        ledger.scores(model, fetch(torch.tensor([100])), loss_fn=loss_fn, estimator=estimator, replay=replay)


@pytest.mark.parametrize("estimator", ["gauss_newton", "metagradient"])
def test_terms_of_the_loss_besides_the_output_are_refused(estimator, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    kept = []
    model[0].register_forward_hook(lambda module, args, made: kept.append(made))

    def loss_fn(output, labels):
        return F.cross_entropy(output, labels) + kept.pop().square().mean()

    optimizer = adam(model)
    with gk.rollback.record(model, optimizer, tmp_path / "run", replayable=True) as recorder:
        inputs, labels = fetch(torch.arange(100, 108))
        with recorder.batch(range(100, 108)):
            loss_fn(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    ledger = gk.rollback.open(tmp_path / "run")
    replay = Replay(fetch, adam, loss_fn)
    with pytest.raises(LedgerError, match="does not come from the model's output alone"):
        ledger.scores(model, (inputs, labels), loss_fn=loss_fn, estimator=estimator, replay=replay)


def adam(model):
    return gk.Adam(model.parameters(), lr=1e-2)


def returned_run(how, make_loss_fn, path):
    torch.manual_seed(0)
    model = Returns(how)
    loss_fn, optimizer = make_loss_fn(model), adam(model)
    with gk.rollback.record(model, optimizer, path / "run", replayable=True) as recorder:
        inputs, labels = blobs()
        with recorder.batch(range(100, 108)):
            loss_fn(model(inputs[:8]), labels[:8]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, gk.rollback.open(path / "run"), Replay(fetch, adam, loss_fn)
