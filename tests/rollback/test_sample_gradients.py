"""Gauss-Newton products by gradients of samples: what they are, where they may be taken, and when they are."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from test_gauss_newton import assert_near, dense_product, products
from torch import nn

import gradkern as gk
from gradkern.rollback import Replay, _gauss_newton
from gradkern.rollback._gauss_newton import GaussNewton
from gradkern.rollback._replay import Replayer
from gradkern.rollback._trajectory import Trajectory

F = nn.functional

PICTURES = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def picture_run(path, model, loss_fn=F.cross_entropy, classes=3, starts=None):
    """Two steps of two micro-batches of three pictures each; ``starts`` takes the models before them."""
    labels = torch.arange(6) % classes

    def make(model):
        return gk.AdamW(model.parameters(), lr=1e-2)

    optimizer = make(model)
    unowned = ["1.*"] if any(isinstance(each, nn.BatchNorm2d) for each in model.modules()) else []
    with gk.rollback.record(model, optimizer, path, replayable=True, unowned=unowned) as recorder:
        for _ in range(2):
            if starts is not None:
                starts.append(copy.deepcopy(model))
            for ids in torch.arange(6).split(3):
                with recorder.batch(ids):
                    (loss_fn(model(PICTURES[ids]), labels[ids]) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    replay = Replay(lambda ids: (PICTURES[ids], labels[ids]), make, loss_fn, accumulate=2)
    return gk.rollback.open(path), replay, labels


def convolutions(classes, groups=1):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=groups),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


class Tokens(nn.Module):
    """A Linear and a norm over the rows of a picture."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.embed(x.squeeze(1)))).mean(dim=1))


def multi_label(output, labels):
    return F.binary_cross_entropy_with_logits(output, F.one_hot(labels, output.shape[1]).to(output.dtype))


def squares(output, labels):
    return F.mse_loss(output, F.one_hot(labels, output.shape[1]).to(output.dtype))


BY_GRADIENTS = {
    "three classes": (lambda: convolutions(3), F.cross_entropy, 3),
    "seven classes": (lambda: convolutions(7), F.cross_entropy, 7),
    "squares": (lambda: convolutions(5), squares, 5),
    "labels apart": (lambda: convolutions(5), multi_label, 5),
    "in groups": (lambda: convolutions(3, groups=2), F.cross_entropy, 3),
    "tokens": (Tokens, F.cross_entropy, 3),
    "rows": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.GELU(), nn.Linear(5, 2)), F.cross_entropy, 2),
}


@pytest.fixture
def always_by_gradients(monkeypatch):
    """Whatever it costs, and with all eigenvalues."""
    monkeypatch.setattr(_gauss_newton, "_is_cheaper", lambda *_: True)
    monkeypatch.setattr(_gauss_newton, "_ENOUGH", 1.0 - 1e-12)


def picture_products(model, start_of, ledger, replay, labels, loss_fn):
    """The product of every step, and that of the dense matrix at the parameters that ``start_of`` gives."""
    curvature = GaussNewton(ledger._layout, Trajectory(Replayer(ledger._store, model, replay, otherwise="nothing")))
    for step, directions, sums in products(model, ledger, replay, curvature=curvature):
        start = start_of[step]
        owned = [dict(start.named_parameters())[info.name] for info in ledger._layout.parameters if info.owned]
        expected = [torch.zeros_like(each) for each in directions.values()]
        for ids in torch.arange(6).split(3):
            output = start(PICTURES[ids])
            loss = loss_fn(output, labels[ids]) / 2
            for each, part in zip(expected, dense_product(loss, output, owned, list(directions.values())), strict=True):
                each += part
        assert_near(list(sums.values()), expected)
    return curvature


@pytest.mark.usefixtures("always_by_gradients")
@pytest.mark.parametrize("name", BY_GRADIENTS)
def test_products_by_gradients_of_samples_are_those_of_the_dense_matrix(name, tmp_path):
    torch.manual_seed(0)
    build, loss_fn, classes = BY_GRADIENTS[name]
    model, starts = build(), []
    ledger, replay, labels = picture_run(tmp_path / "run", model, loss_fn, classes, starts)
    curvature = picture_products(model, starts, ledger, replay, labels, loss_fn)
    assert curvature.by_gradients == 2


def normed_over_the_batch():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


class SeesTheOneBefore(nn.Module):
    """Every output has something of the sample before it."""

    def __init__(self):
        super().__init__()
        self.body = convolutions(3)

    def forward(self, x):
        found = self.body(x)
        return torch.cat([found[:1], found[1:] + 0.5 * found[:-1]])


def compared_in_pairs(output, labels):
    return F.cross_entropy(output, labels) + 0.1 * (output[:-1] * output[1:]).sum(dim=1).square().mean()


@pytest.mark.usefixtures("always_by_gradients")
@pytest.mark.parametrize(
    ("build", "loss_fn"),
    [
        (normed_over_the_batch, F.cross_entropy),
        (SeesTheOneBefore, F.cross_entropy),
        (lambda: convolutions(3), compared_in_pairs),
    ],
    ids=["batch norm", "the one before", "loss"],
)
def test_samples_that_mix_are_multiplied_through_the_model(build, loss_fn, tmp_path):
    torch.manual_seed(0)
    model, starts = build(), []
    ledger, replay, labels = picture_run(tmp_path / "run", model, loss_fn, 3, starts)
    assert picture_products(model, starts, ledger, replay, labels, loss_fn).by_gradients == 0


@pytest.mark.usefixtures("always_by_gradients")
def test_samples_may_mix_at_some_steps_only(tmp_path):
    """The last step has one sample, and the one before running statistics; both tell nothing of the first."""
    torch.manual_seed(0)
    model, labels = normed_over_the_batch(), torch.arange(6) % 3

    def make(model):
        return gk.AdamW(model.parameters(), lr=1e-2)

    optimizer = make(model)
    with gk.rollback.record(model, optimizer, tmp_path / "run", replayable=True, unowned=["1.*"]) as recorder:
        for ids, is_training in ((torch.arange(6), True), (torch.arange(6), False), (torch.arange(1), True)):
            model.train(is_training)
            with recorder.batch(ids):
                F.cross_entropy(model(PICTURES[ids]), labels[ids]).backward()
            optimizer.step()
            optimizer.zero_grad()
    replay = Replay(lambda ids: (PICTURES[ids], labels[ids]), make, F.cross_entropy)
    ledger = gk.rollback.open(tmp_path / "run")
    curvature = GaussNewton(ledger._layout, Trajectory(Replayer(ledger._store, model, replay, otherwise="nothing")))
    made = products(model, ledger, replay, curvature=curvature)
    assert [curvature.by_gradients for _ in made] == [1, 2, 2]


def test_a_step_goes_the_way_that_costs_less(tmp_path):
    torch.manual_seed(0)
    model = convolutions(2)
    ledger, replay, _ = picture_run(tmp_path / "run", model, classes=2)
    for functions, expected in ((1, 0), (60, 2)):
        curvature = GaussNewton(ledger._layout, Trajectory(Replayer(ledger._store, model, replay, otherwise="nothing")))
        for _ in products(model, ledger, replay, functions, curvature):
            pass
        assert curvature.by_gradients == expected


def test_a_layer_that_has_a_forward_of_its_own_by_now_is_left_to_it(tmp_path):
    torch.manual_seed(0)
    model = convolutions(2)
    ledger, replay, labels = picture_run(tmp_path / "run", model, classes=2)
    query = [(PICTURES[:1], labels[:1])] * 60
    asked = {"loss_fn": F.cross_entropy, "estimator": "gauss_newton", "replay": replay}
    expected = ledger.scores(model, query, **asked).scores
    model[0].forward = functools.partial(nn.Conv2d.forward, model[0])
    found = ledger.scores(model, query, **asked).scores
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


def test_gradients_that_would_take_too_many_bytes_are_not_taken(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = convolutions(2)
    ledger, replay, _ = picture_run(tmp_path / "run", model, classes=2)
    monkeypatch.setattr(_gauss_newton, "_MOST_BYTES", 1000)
    curvature = GaussNewton(ledger._layout, Trajectory(Replayer(ledger._store, model, replay, otherwise="nothing")))
    for _ in products(model, ledger, replay, 60, curvature):
        pass
    assert curvature.by_gradients == 0


def test_as_few_eigenvalues_are_kept_as_have_nine_tenths_of_all():
    torch.manual_seed(0)
    bases = torch.linalg.qr(torch.randn(2, 4, 4, dtype=torch.float64)).Q
    for sizes, kept in (
        ([[8.0, 1.5, 0.5, 0.0], [8.0, 1.5, 0.5, 0.0]], 2),
        ([[9.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], 1),
        ([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], 4),
        ([[-9.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], 1),
        ([[0.0] * 4, [0.0] * 4], 0),
    ):
        hessians = bases @ torch.diag_embed(torch.tensor(sizes, dtype=torch.float64)) @ bases.transpose(1, 2)
        values, vectors = _gauss_newton._leading(hessians, 0.9)
        assert values.shape == (kept, 2)
        found = torch.einsum("ns,nsa,nsb->sab", values, vectors, vectors).double()
        assert float((found - hessians).norm()) <= 0.1 * float(hessians.norm()) + 1e-6
