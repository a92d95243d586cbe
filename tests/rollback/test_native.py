"""The native loops of recording have the bits of their references in torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_models import TokenModel, token_data, token_loss
from torch import nn

import gradkern as gk
from gradkern import _native
from gradkern.rollback import _intake, _writer
from gradkern.rollback._curvature import measure_bends
from gradkern.rollback._layout import ParameterInfo
from gradkern.rollback._reading import read_segments
from gradkern.rollback._reduce import reduce_matrix, reduce_vector
from gradkern.rollback._shadows import Applied, Shadows
from gradkern.step_event import ParamStep

pytestmark = pytest.mark.skipif(
    _native.unavailable_reason() is not None, reason=f"no native library: {_native.unavailable_reason()}"
)

seeds = st.integers(0, 10_000)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(tensor):
    return tensor.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[tensor.itemsize])


def require_equal_bits(compute):
    """``compute()`` by the native library and by torch; returns the former."""
    native = compute()
    with gk.use_backend("reference"):
        reference = compute()
    for ours, theirs in zip(native, reference, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(bits(ours), bits(theirs))
    return native


@settings(deadline=None, max_examples=60)
@given(
    seeds,
    st.integers(1, 4),
    st.integers(1, 70),
    st.integers(1, 140),
    st.integers(1, 140),
    st.integers(1, 5),
    st.booleans(),
)
def test_reduced_matrices(seed, samples, tokens, height, width, rank, has_left):
    right = normal(seed, samples, tokens, width) * torch.logspace(0, -6, width)
    left = normal(seed + 1, samples, tokens, height) if has_left else None
    require_equal_bits(lambda: reduce_matrix(left, right, normal(seed + 2, min(rank, width), width)))


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 5), st.integers(1, 9), st.integers(1, 200), st.floats(-37, 37))
def test_reduced_vectors(seed, samples, tokens, width, exponent):
    require_equal_bits(lambda: reduce_vector(normal(seed, samples, tokens, width) * 10.0**exponent))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_a_scale_that_is_not(value):
    right = normal(0, 3, 9, 8)
    right[1, 4, 2] = value
    codes, scale = require_equal_bits(lambda: reduce_vector(right))
    assert torch.isfinite(scale).tolist() == [True, False, True]
    assert not codes[1].any()
    *_, right_scale = reduce_matrix(None, right, normal(1, 2, 8))
    assert not torch.isfinite(right_scale[1]).all()


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 6), st.integers(1, 9), st.integers(1, 150), st.floats(-2, 2), st.booleans(), st.booleans())
def test_curvature(seed, samples, tokens, classes, exponent, is_declared, has_weights):
    logits = (normal(seed, samples, tokens, classes) * 10.0**exponent).requires_grad_()
    labels = torch.randint(0, classes, (samples * tokens,), generator=torch.Generator().manual_seed(seed))
    rows = nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
    (rows * torch.arange(1.0, len(rows) + 1) if has_weights else rows).mean().backward()
    grad, detached = logits.grad, logits.detach()
    scales = []
    # Far from fitted it does not matter, of nearly fitted rows some are those of twice the scale.
    known = (None, 0.0, 0.5 / len(rows))[seed % 3]

    def compute():
        bends, scale = measure_bends(detached, grad, scale=known, is_declared=is_declared)
        scales.append(scale)
        return [bends]

    require_equal_bits(compute)
    assert scales[0] == scales[1]


@pytest.mark.parametrize("where", ["logits", "gradient"])
def test_curvature_of_what_is_not_finite_is_unknown(where):
    logits, grad = normal(0, 4, 2, 5), normal(1, 4, 2, 5)
    (logits if where == "logits" else grad)[2, 1, 3] = math.nan
    (bends,) = require_equal_bits(lambda: [measure_bends(logits, grad, scale=0.1, is_declared=False)[0]])
    assert bends[2].isnan().all()


SHAPES = [(64, 64), (10, 33), (7,), (3, 4, 3, 3), (1, 5), (130,), (513, 2)]


def followed(seed, kind):
    """The shadows of some parameters after three steps."""
    parameters = [normal(seed + at, *shape) for at, shape in enumerate(SHAPES)]
    infos = [ParameterInfo(f"p{at}", shape, owned=at != 4) for at, shape in enumerate(SHAPES)]
    shadows = Shadows(parameters, infos)
    found = []
    for step in range(3):
        applied = []
        for at, parameter in enumerate(parameters):
            if step == 1 and at == 1:
                continue  # left alone
            if infos[at].owned and (step, at) != (2, 2):
                shadows.add_gradients([(at, normal(seed + 100 * step + at, *SHAPES[at]))])
            moment = normal(seed + 7 * step + at, *SHAPES[at]).square() if kind == "adam" else None
            update = ParamStep(parameter, torch.tensor(0.5), 0.999, 0.9, 0.1, 1e-3, 1.1e-3, moment, 1.7, 1e-8)
            applied.append(Applied(at, update, 0.5))
        found.append(shadows.step(applied))
    state = shadows.state_dict()
    found += [*state["momenta"].values(), *state["deltas"].values()]
    return [
        *found,
        torch.tensor([state[key] for key in ("roundings", "momentum_roundings", "decays")], dtype=torch.float64),
    ]


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("seed", range(3))
def test_shadows(seed, kind):
    require_equal_bits(lambda: followed(seed, kind))


def test_shadows_refuse_what_is_not_finite_before_anything_changes():
    for backend in ("native", "reference"):
        with gk.use_backend(backend):
            shadows = Shadows(
                [torch.zeros(3, 2), torch.zeros(4)], [ParameterInfo("a", (3, 2), True), ParameterInfo("b", (4,), True)]
            )
            shadows.add_gradients([(0, torch.ones(3, 2))])
            shadows.add_gradients([(1, torch.tensor([1.0, math.inf, 0.0, 0.0]))])
            applied = [
                Applied(at, ParamStep(torch.zeros(1), torch.tensor(1.0), 0.5, 0.9, 0.1, 1e-3, 1e-3), 1.0)
                for at in range(2)
            ]
            assert shadows.step(applied) is None
            assert not any(delta.any() for delta in shadows.deltas.values())
            assert shadows.decays == [1.0, 1.0]


class Twice(nn.Module):
    """A layer that is called twice, and one whose bias is shared out over tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.again(torch.tanh(self.first(x)))))))


def record_to(path, make_model, data, loss, accumulate=1, **options):
    torch.manual_seed(0)
    model = make_model()
    optimizer = gk.AdamW(model.parameters(), lr=1e-2, max_norm=1.0)
    with gk.rollback.record(model, optimizer, path, **options) as recorder:
        for step in range(9):
            for part in data[torch.arange(8) + step % 3 * 2].chunk(accumulate):
                with recorder.batch(range(len(part))):
                    (loss(model(part), part) / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
    ledger = gk.rollback.open(path)
    assert ledger.verify(model).passed
    return model, ledger, {file.name: file.read_bytes() for file in sorted(path.rglob("*.safetensors"))}


def class_loss(logits, inputs):
    return nn.functional.cross_entropy(logits, (inputs.sum(1) > 0).long())


CASES = {"token model": (TokenModel, token_data(), token_loss), "a layer twice": (Twice, normal(0, 16, 6), class_loss)}


@pytest.mark.parametrize("steps_per_segment", [4, None])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_whole_ledgers_are_the_same_to_the_byte(tmp_path, monkeypatch, case, accumulate, steps_per_segment):
    monkeypatch.setattr(_writer, "_FULL_BYTES", 4000)
    monkeypatch.setattr(_writer, "_LEAST_STEPS", 2)
    options = {"accumulate": accumulate, "steps_per_segment": steps_per_segment}
    *_, native = record_to(tmp_path / "native", *CASES[case], **options)
    with gk.use_backend("reference"):
        *_, reference = record_to(tmp_path / "reference", *CASES[case], **options)
    assert native == reference
    assert len(native) > 3


@pytest.mark.parametrize("most_waiting", [0, 300])
def test_what_is_reduced_early_is_the_same(tmp_path, monkeypatch, most_waiting):
    model, ledger, _ = record_to(tmp_path / "late", *CASES["a layer twice"])
    monkeypatch.setattr(_intake, "_MOST_WAITING", most_waiting)
    _, early, _ = record_to(tmp_path / "early", *CASES["a layer twice"])
    query = normal(1, 1, 6)
    for estimator in ("direct", "ref", "paper"):
        expected, found = (
            each.scores(model, query, loss_fn=class_loss, estimator=estimator).scores for each in (ledger, early)
        )
        assert torch.equal(found, expected)


def test_a_layer_called_twice_is_credited_to_the_right_visits(tmp_path):
    """What both calls of the layer left of a visit is its gradient, in every step of a file of many."""
    _, ledger, _ = record_to(tmp_path / "run", *CASES["a layer twice"], steps_per_segment=9)
    (segment,) = read_segments(ledger._store)
    for record in segment.records.values():
        steps = torch.searchsorted(segment.visit_bounds, record.visit.long(), right=True) - 1
        assert bool((steps.diff() >= 0).all())
    again = [index for index, stream in enumerate(ledger._layout.streams) if stream.layer == "again"]
    assert all(len(segment.records[index].visit) == 2 * len(segment.visit_ids) for index in again)
