"""The direct estimator against brute force: per-sample recursions in fp64, sample by sample."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from recorded_models import gpt2, token_data, token_loss

import gradkern as gk
from gradkern.rollback._reading import read_segments
from gradkern.rollback._smoothing import smooth, unsmooth


def smoothed(exact: torch.Tensor) -> torch.Tensor:
    return unsmooth(smooth(exact), exact.shape)


class BruteForce:
    """Follows every sample's own momentum and delta through training, from its true gradients in fp64."""

    def __init__(self, model, data, ids, accumulate, micro_batch, precondition):
        self.model, self.data, self.ids = model, data, ids
        self.accumulate, self.micro_batch, self.precondition = accumulate, micro_batch, precondition
        self.momenta = defaultdict(lambda: defaultdict(float))
        self.deltas = defaultdict(lambda: defaultdict(float))
        self.pending = defaultdict(lambda: defaultdict(float))

    def visit(self, rows):
        """Each row's share of the micro-batch's mean loss, by a backward of its own on a copy in fp64."""
        named = dict(self.model.named_parameters())
        for row in rows.tolist():
            twin = copy.deepcopy(self.model).double()
            loss = token_loss(twin(self.data[row : row + 1]), self.data[row : row + 1])
            share = loss / (self.micro_batch * self.accumulate)
            gradients = torch.autograd.grad(share, [dict(twin.named_parameters())[name] for name in named])
            for name, gradient in zip(named, gradients, strict=True):
                self.pending[int(self.ids[row])][name] += gradient

    def on_step(self, event):
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for update in event.params:
            name = names[id(update.param)]
            step_size = self.precondition(update.preconditioner()).double()
            share = update.grad_weight * float(update.grad_multiplier)
            for sample in set(self.ids.tolist()):
                gradient = self.pending[sample][name]
                self.momenta[sample][name] = update.momentum * self.momenta[sample][name] + share * gradient
                self.deltas[sample][name] = (
                    update.decay * self.deltas[sample][name] - step_size * self.momenta[sample][name]
                )
        self.pending.clear()

    def scores(self, query):
        loss = token_loss(self.model(query), query)
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        named = {name: g for (name, _), g in zip(self.model.named_parameters(), gradients, strict=True)}
        samples = sorted(set(self.ids.tolist()))
        return torch.stack(
            [-sum((named[name].double() * self.deltas[sample][name]).sum() for name in named) for sample in samples]
        )


def recorded_and_brute_force(model, data, ids, path, precondition, rank, steps=6, accumulate=2, micro_batch=3):
    model.eval()  # dropout would differ between the batch and the lone sample
    optimizer = gk.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, max_norm=0.5)
    truth = BruteForce(model, data, ids, accumulate, micro_batch, precondition)
    optimizer.register_step_event_hook(truth.on_step)
    cursor = 0
    with gk.rollback.record(model, optimizer, path, rank=rank, steps_per_segment=4) as recorder:
        for _ in range(steps):
            for _ in range(accumulate):
                rows = torch.arange(cursor, cursor + micro_batch) % len(data)
                cursor += micro_batch
                truth.visit(rows)
                with recorder.batch(ids[rows]):
                    (token_loss(model(data[rows]), data[rows]) / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
    query = data[:2].flip(1)
    found = gk.rollback.open(path).scores(model, query, loss_fn=token_loss, estimator="direct")
    assert found.ids.tolist() == sorted(set(ids.tolist()))
    return found.scores, truth.scores(query)


@pytest.mark.parametrize("build", ["token model", "gpt2"])
def test_scores_equal_brute_force_up_to_int8(build, token_model, tmp_path):
    torch.manual_seed(0)
    model = token_model if build == "token model" else gpt2(layers=1, width=8, length=6, vocabulary=11)
    data = token_data(14, 6)
    # Ids are shared by several samples, and most samples are visited several times.
    ids = torch.arange(14) % 9 + 40
    found, expected = recorded_and_brute_force(model, data, ids, tmp_path / "run", smoothed, rank=64)
    error = (found - expected).norm() / expected.norm()
    # int8 leaves about half a percent a row; nothing else may be missing.
    assert error < 0.01
    assert expected.abs().min() > 0


def test_scores_follow_brute_force_with_the_exact_preconditioner(token_model, tmp_path):
    # Both approximations at once: rank 2 of about 6, and the smoothed for the exact preconditioner.
    found, expected = recorded_and_brute_force(
        token_model,
        token_data(24, 6),
        torch.arange(24),
        tmp_path / "run",
        lambda exact: exact,
        rank=2,
        steps=30,
    )
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.95


def test_the_sweep_equals_the_recursion_over_the_records(token_model, train):
    """The same stored records and preconditioners, but forwards in time and in fp64: no tolerance for int8."""
    run = train(token_model, token_data(), steps=7, steps_per_segment=3)
    ledger = run.ledger()
    query = token_data()[3:5]
    gradients = torch.autograd.grad(token_loss(token_model(query), query), list(token_model.parameters()))
    expected = defaultdict(float)
    for index, gradient in enumerate(gradients):
        for sample, delta in recorded_deltas(ledger, index).items():
            expected[sample] -= float((gradient.double() * delta).sum())
    found = ledger.scores(token_model, query, loss_fn=token_loss, estimator="direct")
    assert found.ids.tolist() == sorted(expected)
    truth = torch.tensor([expected[sample] for sample in sorted(expected)], dtype=torch.float64)
    torch.testing.assert_close(found.scores, truth, rtol=1e-4, atol=1e-9)


def recorded_deltas(ledger, index):
    """What every sample's stored gradients did to one parameter, step by step."""
    momentum, delta = defaultdict(float), defaultdict(float)
    for segment in list(read_segments(ledger._store, backwards=True))[::-1]:
        for step in range(segment.steps):
            scalars = segment.step_scalars(step, index)
            for sample in momentum:
                momentum[sample] = momentum[sample] * scalars.momentum
                delta[sample] = delta[sample] * scalars.decay
            for sample, gradient in stored_gradients(ledger, segment, step, index):
                momentum[sample] += scalars.grad_weight * scalars.multiplier * gradient
            shape = ledger._layout.parameters[index].shape
            step_size = unsmooth([tensor[step] for tensor in segment.preconditioners[index]], shape).double()
            for sample, value in momentum.items():
                delta[sample] = delta[sample] - step_size * value
    return delta


def stored_gradients(ledger, segment, step, index):
    """Sample and gradient of every entry recorded for one parameter at one step."""
    first, end = segment.visit_bounds[step : step + 2].tolist()
    for stream, record in segment.records.items():
        if ledger._layout.streams[stream].parameter == index:
            for entry, visit in enumerate(record.visit.tolist()):
                if first <= visit < end:
                    shape = ledger._layout.parameters[index].shape
                    yield int(segment.visit_ids[visit]), dense(record, entry, shape)


def dense(record, entry, shape):
    """One entry's gradient in fp64, written out."""
    if record.kind == "vector":
        return (record.value[entry].double() * record.scale[entry].double()).reshape(shape)
    left = record.left[entry].double() * record.left_scale[entry].double()[:, None]
    right = record.right[entry].double() * record.right_scale[entry].double()[:, None]
    rows = left.t() @ right
    if record.kind == "matrix":
        return rows
    return torch.zeros(shape, dtype=torch.float64).index_add_(0, record.index[entry].long(), rows)


def test_smoothing_is_exact_for_a_rank_one_preconditioner():
    rows, columns = torch.rand(5) + 0.1, torch.rand(7) + 0.1
    exact = 1e-3 * rows[:, None] * columns
    torch.testing.assert_close(smoothed(exact), exact, rtol=0.02, atol=0.0)  # bf16 holds 8 bits
    vector = torch.rand(9)
    torch.testing.assert_close(smoothed(vector), vector, rtol=2**-8, atol=0.0)


def test_smoothing_survives_the_range_of_preconditioners():
    for magnitude in (1e-12, 1.0, 1e5):
        found = smoothed(torch.full((3, 4), magnitude))
        torch.testing.assert_close(found, torch.full((3, 4), magnitude), rtol=0.02, atol=0.0)
    assert torch.equal(smoothed(torch.zeros(3, 4)), torch.zeros(3, 4))
