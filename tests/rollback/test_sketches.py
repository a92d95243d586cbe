"""Sketches: their estimates against direct scores, their search against brute force, their file against damage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_models import TokenModel, token_data, token_loss
from torch import nn

import gradkern as gk
from gradkern import _native
from gradkern.errors import LedgerError
from gradkern.rollback import _sketches
from gradkern.rollback._estimators import query_gradients
from gradkern.rollback._projection import directions, project
from gradkern.rollback._reading import read_segments
from gradkern.rollback._reduce import quantize_rows
from gradkern.rollback._scan import Rows, native_scan, reference_scan
from gradkern.rollback._sketch_index import SketchIndex
from gradkern.rollback._sweep import sweep
from gradkern.testing import same_bits

needs_native = pytest.mark.skipif(
    _native.unavailable_reason() is not None, reason=f"no native library: {_native.unavailable_reason()}"
)


def random_rows(count: int, width: int, seed: int, *, values: int = 128) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-values, values, (count, width), dtype=torch.int8, generator=generator)
    # Few different scales, so that scores are often equal.
    scales = torch.randint(0, 4, (count,), generator=generator) * 0.37
    ids = torch.randperm(3 * count, generator=generator)[:count]
    return Rows(codes, scales, ids)


def random_queries(count: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (count, width), dtype=torch.int8, generator=generator)
    return codes, torch.rand(count, generator=generator)


def everything(rows: Rows) -> torch.Tensor:
    return torch.tensor([[0, len(rows.ids)]])


def test_the_reference_is_integer_arithmetic_and_an_order():
    rows, (queries, query_scales) = random_rows(60, 3, 0, values=1), random_queries(2, 3, 1)
    scores, ids = reference_scan(rows, torch.tensor([[40, 60], [3, 20]]), queries, query_scales, 37)
    for m in range(2):
        truth = []
        for i in [*range(40, 60), *range(3, 20)]:
            product = sum(a * b for a, b in zip(rows.codes[i].tolist(), queries[m].tolist(), strict=True))
            score = torch.tensor(float(product)) * rows.scales[i] * query_scales[m]
            truth.append((-float(score), int(rows.ids[i])))
        assert [(-a, b) for a, b in zip(scores[m].tolist(), ids[m].tolist(), strict=True)] == sorted(truth)
    assert len(set(scores[0].tolist())) < 25  # ties were there


@needs_native
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_native_has_the_bits_of_the_reference(data):
    count, width = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    seed = data.draw(st.integers(0, 2**31))
    rows = random_rows(count, width, seed, values=data.draw(st.sampled_from([1, 2, 128])))
    cuts = sorted(data.draw(st.sets(st.integers(0, count), min_size=2, max_size=7)))
    ranges = torch.tensor(list(zip(cuts[::2], cuts[1::2], strict=False)))
    k = data.draw(st.integers(1, int((ranges[:, 1] - ranges[:, 0]).sum())))
    queries = random_queries(data.draw(st.integers(1, 3)), width, seed + 1)
    assert all(map(same_bits, native_scan(rows, ranges, *queries, k), reference_scan(rows, ranges, *queries, k)))


@needs_native
def test_nothing_times_a_negative_code_is_zero_in_both():
    rows = Rows(torch.zeros(2, 1, dtype=torch.int8), torch.ones(2), torch.arange(2))
    queries = torch.tensor([[40], [-113]], dtype=torch.int8), torch.ones(2)
    ranges = torch.tensor([[0, 2]])
    assert all(map(same_bits, native_scan(rows, ranges, *queries, 1), reference_scan(rows, ranges, *queries, 1)))


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_bits(threads):
    rows, queries = random_rows(20_000, 67, 2, values=3), random_queries(2, 67, 3)
    torch.set_num_threads(threads)  # put back by the fixture of all these tests
    found = native_scan(rows, everything(rows), *queries, 500)
    assert all(map(same_bits, found, reference_scan(rows, everything(rows), *queries, 500)))


@needs_native
@pytest.mark.parametrize("code", [-128, 127])
def test_the_widest_rows_do_not_overflow(code):
    codes = torch.full((2, 131_071), code, dtype=torch.int8)
    rows = Rows(codes, torch.ones(2), torch.tensor([5, 3]))
    for found in (native_scan, reference_scan):
        scores, ids = found(rows, everything(rows), codes[:1], torch.ones(1), 2)
        assert scores.tolist() == [[float(torch.tensor(131_071.0 * code * code))] * 2]
        assert ids.tolist() == [[3, 5]]


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_has_the_bits_of_the_reference(isa):
    program = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_sketches import *\n"
        "for width in (1, 7, 31, 64, 100, 256):\n"
        "    rows, queries = random_rows(500, width, width), random_queries(3, width, 1)\n"
        "    expected = reference_scan(rows, everything(rows), *queries, 40)\n"
        "    assert all(map(same_bits, native_scan(rows, everything(rows), *queries, 40), expected)), width\n"
        "from gradkern import _native\n"
        "print('compared', _native.isa())\n"
    )
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if isa != "baseline" and {"avx2": "avx2 ", "avx512": "avx512vl "}[isa] not in flags:
        pytest.skip(f"this CPU has no {isa}")
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "GRADKERN_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == f"compared {isa}\n", run.stderr


@needs_native
def test_native_refuses_what_would_read_or_write_elsewhere():
    rows, queries = random_rows(4, 8, 0), random_queries(1, 8, 1)
    with pytest.raises(RuntimeError, match="k must be 1 to the number of rows in all ranges, 2, got 3"):
        native_scan(rows, torch.tensor([[1, 3]]), *queries, 3)
    for bad in ([[0, 5]], [[-1, 2]], [[3, 2]]):
        with pytest.raises(RuntimeError, match="a range must lie in 0 to 4"):
            native_scan(rows, torch.tensor(bad), *queries, 1)
    with pytest.raises(RuntimeError, match="queries must be a contiguous tensor of shape"):
        native_scan(rows, everything(rows), queries[0][:, :7].contiguous(), queries[1], 1)
    with pytest.raises(RuntimeError, match="codes must be a contiguous tensor"):
        native_scan(Rows(rows.codes.t(), rows.scales, rows.ids), everything(rows), *queries, 1)
    with pytest.raises(RuntimeError, match="scales must be a contiguous tensor of 4 elements"):
        native_scan(Rows(rows.codes, rows.scales.double(), rows.ids), everything(rows), *queries, 1)


SHAPES = {0: (3, 4), 2: (5,), 5: (2, 3, 2)}


def test_projecting_is_multiplying_with_the_directions():
    gradients = {index: torch.randn(shape) for index, shape in SHAPES.items()}
    rows = directions(SHAPES, 33, 9, 0, 33)
    expected = sum((rows[index] * gradients[index]).flatten(1).sum(1) for index in SHAPES)
    torch.testing.assert_close(project(gradients, 33, 9), expected)
    some = directions(SHAPES, 33, 9, 4, 7)
    assert all(torch.equal(some[index], rows[index][4:7]) for index in SHAPES)
    assert all(bool((each.abs() == torch.tensor(33.0).rsqrt()).all()) for each in rows.values())


def test_directions_are_those_of_numpys_philox_whose_bits_are_kept():
    # A file of today is searched with the directions of its seed for good.
    signs = directions({0: (4, 2), 3: (2,)}, 2, 1234, 0, 2)
    flat = torch.cat([signs[0].flatten(), signs[3].flatten()]) > 0
    assert "".join(map(str, flat.int().tolist())) == "00000101110010010101"


def test_estimates_are_unbiased_and_vary_as_said():
    torch.manual_seed(0)
    width, seeds = 8, 1000
    v, q = ({index: torch.randn(shape) for index, shape in SHAPES.items()} for _ in range(2))
    # Products of vectors, as gradients are, with a common part: the worst for structured signs.
    q = {index: 0.7 * v[index] + each for index, each in q.items()}
    found = torch.stack([project(v, width, seed).dot(project(q, width, seed)) for seed in range(seeds)]).double()
    flat_v, flat_q = (torch.cat([each.flatten() for each in one.values()]).double() for one in (v, q))
    truth = flat_v.dot(flat_q)
    squares = flat_v.square().sum() * flat_q.square().sum()
    variance = (squares + truth**2 - 2 * (flat_v * flat_q).square().sum()) / width
    assert abs(found.mean() - truth) < 4 * (variance / seeds).sqrt()
    # Fourth moments are a few times the square of the variance: 1000 of them tell it to some 8 %.
    assert found.var() == pytest.approx(float(variance), rel=0.3)


@pytest.fixture
def recorded(train, token_model):
    run = train(token_model, token_data(), steps=6, rank=8)
    return run.model, gk.rollback.open(run.path)


def queries_of(count: int) -> list[torch.Tensor]:
    return list(token_data()[:count].split(1))


def test_sketches_are_direct_scores_of_the_directions(recorded, tmp_path):
    _, ledger = recorded
    sketches = ledger.sketch(tmp_path / "sketches", width=20, seed=3)
    layout = ledger._store.layout
    shapes = {index: info.shape for index, info in enumerate(layout.parameters)}
    found = sweep(layout, directions(shapes, 20, 3, 0, 20), read_segments(ledger._store, backwards=True), None)
    assert torch.equal(sketches.ids, found.ids)
    made = sketches.codes.double() * sketches.scales.double().unsqueeze(1)
    step = sketches.scales.double().unsqueeze(1)
    assert bool(((made - found.scores.t()).abs() <= 0.5 * step * (1 + 1e-3)).all())
    assert int(sketches.codes.abs().amax()) == 127
    assert int(sketches.codes.min()) >= -127


def test_passes_over_the_ledger_change_nothing(recorded, tmp_path, monkeypatch):
    _, ledger = recorded
    at_once = ledger.sketch(tmp_path / "a", width=20)
    monkeypatch.setattr(_sketches, "_BLOCK_BYTES", 12 * 3 * sum(p.numel() for p in recorded[0].parameters()))
    in_parts = ledger.sketch(tmp_path / "b", width=20)
    torch.testing.assert_close(in_parts.scales, at_once.scales)
    assert int((in_parts.codes.int() - at_once.codes.int()).abs().max()) <= 1


def test_estimates_agree_with_direct_scores(recorded, tmp_path):
    model, ledger = recorded
    queries = queries_of(4)
    truth = ledger.scores(model, queries, loss_fn=token_loss, estimator="direct")
    layout = ledger._store.layout
    owned = layout.owned(layout.trained_parameters(model))
    norms = torch.stack(
        [
            torch.cat([each.flatten() for each in query_gradients(model, owned, query, token_loss).values()]).norm()
            for query in queries
        ]
    ).double()
    width, seeds = 256, 6
    total = torch.zeros_like(truth.scores)
    for seed in range(seeds):
        sketches = ledger.sketch(tmp_path / f"{seed}", width=width, seed=seed)
        found = sketches.top(sketches.project(model, queries, loss_fn=token_loss), len(sketches))
        places = torch.searchsorted(sketches.ids, found.ids)
        total += torch.empty_like(found.scores).scatter_(1, places, found.scores)
    # The norm of a sketch is, to 1 / sqrt(2 width), that of what it is a sketch of.
    sizes = (sketches.codes.double() * sketches.scales.double().unsqueeze(1)).norm(dim=1)
    deviation = ((sizes * norms.unsqueeze(1)) ** 2 + truth.scores**2).sqrt() / width**0.5
    errors = (total / seeds - truth.scores) / (deviation / seeds**0.5)
    assert float(errors.abs().max()) < 4.5
    assert 0.2 < float(errors.square().mean().sqrt()) < 1.6
    for estimated, true in zip(total, truth.scores, strict=True):
        assert float(torch.corrcoef(torch.stack([estimated, true]))[0, 1]) > 0.8


def test_explain_is_the_top_of_the_estimates(recorded, tmp_path):
    model, ledger = recorded
    sketches = ledger.sketch(tmp_path / "sketches")
    (query,) = queries_of(1)
    found = sketches.explain(model, query, 5, loss_fn=token_loss)
    top = sketches.top(sketches.project(model, query, loss_fn=token_loss), 5)
    assert [(each.id, each.score) for each in found] == list(
        zip(top.ids[0].tolist(), top.scores[0].tolist(), strict=True)
    )
    scores = [each.score for each in found]
    assert scores == sorted(scores, reverse=True)
    assert len(sketches.explain(model, query, 10_000, loss_fn=token_loss)) == len(sketches) == len(token_data())


def test_several_queries_are_searched_as_each_alone(recorded, tmp_path):
    model, ledger = recorded
    sketches = ledger.sketch(tmp_path / "sketches", width=100)
    queries = sketches.project(model, queries_of(5), loss_fn=token_loss)
    together = sketches.top(queries, 7)
    for row in range(5):
        alone = sketches.top(queries[row : row + 1], 7)
        assert same_bits(alone.scores[0], together.scores[row])
        assert torch.equal(alone.ids[0], together.ids[row])
    assert sketches.top(sketches.project(model, []), 7).ids.shape == (0, 7)


def test_queries_that_make_no_sense_are_refused(recorded, tmp_path):
    model, ledger = recorded
    sketches = ledger.sketch(tmp_path / "sketches", width=16)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        sketches.top(torch.ones(1, 16), 0)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        sketches.explain(model, queries_of(1)[0], 0, loss_fn=token_loss)
    for bad in (torch.ones(16), torch.ones(1, 15), torch.ones(1, 16).double()):
        with pytest.raises(ValueError, match=r"queries must be of shape \(queries, 16\) and fp32"):
            sketches.top(bad)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="queries must be finite"):
            sketches.top(torch.full((1, 16), bad))
    with pytest.raises(ValueError, match="depends on no recorded parameter"):
        sketches.explain(model, queries_of(1)[0], loss_fn=lambda logits, ids: torch.zeros(()))
    assert sketches.top(torch.zeros(1, 16), 3).scores.tolist() == [[0.0, 0.0, 0.0]]
    assert torch.equal(sketches.top(torch.zeros(1, 16), 3).ids[0], sketches.ids[:3])


def test_another_model_or_other_values_are_refused(recorded, tmp_path):
    model, ledger = recorded
    sketches = ledger.sketch(tmp_path / "sketches", width=16)
    with pytest.raises(LedgerError, match="belongs to another model"):
        sketches.explain(nn.Linear(2, 2), queries_of(1)[0])
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.raises(LedgerError, match="differ from those at the end of the recording that the sketches are of"):
        sketches.explain(model, queries_of(1)[0], loss_fn=token_loss)


def test_sketches_of_another_ledger_are_refused(recorded, train, tmp_path):
    _, ledger = recorded
    ledger.sketch(tmp_path / "sketches", width=16)
    assert len(ledger.open_sketches(tmp_path / "sketches")) == len(token_data())
    torch.manual_seed(0)
    other = gk.rollback.open(train(TokenModel(), token_data(), steps=6, rank=8, name="other").path)
    with pytest.raises(LedgerError, match="holds sketches of another ledger"):
        other.open_sketches(tmp_path / "sketches")


def test_what_cannot_be_sketched_is_refused_before_anything_is_written(recorded, train, token_model, tmp_path):
    _, ledger = recorded
    for bad in (0, 65_537):
        with pytest.raises(ValueError, match="width must be from 1 to 65536"):
            ledger.sketch(tmp_path / "sketches", width=bad)
    with pytest.raises(ValueError, match="seed must be from 0"):
        ledger.sketch(tmp_path / "sketches", seed=-1)
    assert not (tmp_path / "sketches").exists()
    (tmp_path / "there").write_text("mine")
    with pytest.raises(LedgerError, match="exists, and is not overwritten"):
        ledger.sketch(tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"
    optimizer = gk.AdamW(token_model.parameters(), lr=1e-2)
    recorder = gk.rollback.record(token_model, optimizer, tmp_path / "open", steps_per_segment=1)
    with recorder:
        for _ in range(4):
            with recorder.batch(range(len(token_data()))):
                token_loss(token_model(token_data()), token_data()).backward()
            optimizer.step()
            optimizer.zero_grad()
        with pytest.raises(LedgerError, match="recording ended without close"):
            gk.rollback.open(tmp_path / "open").sketch(tmp_path / "sketches")


def test_the_file_is_mapped_and_leaves_nothing_beside_it(recorded, tmp_path):
    _, ledger = recorded
    folder = tmp_path / "alone"
    folder.mkdir()
    made = ledger.sketch(folder / "sketches.safetensors", width=24, seed=7)
    assert [file.name for file in folder.iterdir()] == ["sketches.safetensors"]
    again = gk.rollback.open_sketches(folder / "sketches.safetensors")
    assert (again.width, again.origin, len(again)) == (24, made.origin, len(made))
    assert torch.equal(again.codes, made.codes)
    assert torch.equal(again.scales, made.scales)
    if Path("/proc/self/maps").exists():
        assert str(folder / "sketches.safetensors") in Path("/proc/self/maps").read_text()


def test_every_kind_of_damage_is_noticed(recorded, tmp_path):
    _, ledger = recorded
    file = tmp_path / "sketches"
    ledger.sketch(file, width=16)
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    spread = {*range(0, header, 7), *range(header, len(content), 53), len(content) - 1}
    for place in sorted(spread):
        damaged = bytearray(content)
        damaged[place] ^= 1
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(LedgerError, match="damaged"):
            gk.rollback.open_sketches(tmp_path / "damaged")
    for size in (0, 5, header - 1, header, len(content) - 1):
        (tmp_path / "damaged").write_bytes(content[:size])
        with pytest.raises(LedgerError, match="damaged"):
            gk.rollback.open_sketches(tmp_path / "damaged")
    with pytest.raises(LedgerError, match="is no file"):
        gk.rollback.open_sketches(tmp_path / "missing")
    safetensors.torch.save_file({"x": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(LedgerError, match="holds no sketches"):
        gk.rollback.open_sketches(tmp_path / "other")


def test_another_format_version_is_refused(recorded, tmp_path, monkeypatch):
    _, ledger = recorded
    ledger.sketch(tmp_path / "sketches", width=16)
    monkeypatch.setattr(_sketches, "FORMAT_VERSION", 2)
    with pytest.raises(LedgerError, match="have format version 1, this gradkern reads version 2"):
        gk.rollback.open_sketches(tmp_path / "sketches")


def test_the_file_holds_what_the_format_says(recorded, tmp_path):
    _, ledger = recorded
    ledger.sketch(tmp_path / "sketches", width=16, seed=5)
    with safetensors.safe_open(tmp_path / "sketches", framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        kinds = {name: (file.get_tensor(name).dtype, tuple(file.get_tensor(name).shape)) for name in file.keys()}  # noqa: SIM118  (no mapping)
    n = len(token_data())
    assert kinds == {
        "ids": (torch.int64, (n,)),
        "scales": (torch.float32, (n,)),
        "codes": (torch.int8, (n, 16)),
    }
    assert (facts["width"], facts["seed"], facts["steps"], facts["format_version"]) == (16, 5, 6, 1)


def clustered(count: int, width: int) -> tuple[Rows, torch.Tensor]:
    """Rows around 30 centres, of different norms; and queries like them."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(30, width, generator=generator)
    of = torch.randint(0, 30, (count + 20,), generator=generator)
    made = centres[of] + 0.3 * torch.randn(count + 20, width, generator=generator)
    made *= torch.randn(count + 20, 1, generator=generator).exp() * 1e-4
    codes, scales = quantize_rows(made[:count])
    return Rows(codes, scales, torch.randperm(count, generator=generator)), made[count:]


class TestIndex:
    @pytest.fixture(autouse=True)
    def _faiss(self):
        pytest.importorskip("faiss", reason="the extra [ann] is not installed")

    def test_all_clusters_give_the_exact_search(self):
        rows, queries = clustered(3000, 40)
        index = SketchIndex(rows, 25, 25)
        found = index.top(queries, 12)
        codes, scales = quantize_rows(queries)
        exact = reference_scan(rows, everything(rows), codes, scales, 12)
        assert same_bits(found.scores, exact[0])
        assert torch.equal(found.ids, exact[1])

    def test_few_clusters_find_nearly_all(self):
        rows, queries = clustered(3000, 40)
        index = SketchIndex(rows, None, None)
        assert (index.lists, index.probes) == (54, 5)
        index.probes = 8
        codes, scales = quantize_rows(queries)
        _, exact = reference_scan(rows, everything(rows), codes, scales, 10)
        found = index.top(queries, 10).ids
        hits = sum(len({*a.tolist()} & {*b.tolist()}) for a, b in zip(found, exact, strict=True))
        assert hits >= 190  # of 200

    def test_what_clusters_do_not_hold_is_marked(self):
        rows = Rows(torch.eye(4, dtype=torch.int8).mul(127), torch.ones(4), torch.arange(4))
        index = SketchIndex(rows, 4, 1)
        found = index.top(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), 3)
        assert found.ids.tolist() == [[1, -1, -1]]
        assert found.scores[0, 1:].tolist() == [-torch.inf] * 2

    def test_explain_takes_it_and_drops_what_is_marked(self, recorded, tmp_path):
        model, ledger = recorded
        sketches = ledger.sketch(tmp_path / "sketches", width=32)
        (query,) = queries_of(1)
        whole = sketches.index(lists=3, probes=3)
        exact = sketches.explain(model, query, 5, loss_fn=token_loss)
        assert sketches.explain(model, query, 5, loss_fn=token_loss, index=whole) == exact
        whole.probes = 1
        part = sketches.explain(model, query, 1000, loss_fn=token_loss, index=whole)
        assert 0 < len(part) < len(sketches)
        assert min(each.id for each in part) >= 0

    def test_arguments_are_checked(self):
        rows, queries = clustered(50, 8)
        for bad in (0, 51):
            with pytest.raises(ValueError, match="lists must be from 1 to the number of samples, 50"):
                SketchIndex(rows, bad, None)
        for bad in (0, 8):
            with pytest.raises(ValueError, match="probes must be from 1 to lists, 7"):
                SketchIndex(rows, 7, bad)
        index = SketchIndex(rows, 7, 2)
        with pytest.raises(ValueError, match="k must be at least 1"):
            index.top(queries, 0)
        with pytest.raises(ValueError, match="queries must be finite"):
            index.top(queries * torch.nan, 1)

    def test_nothing_is_found_among_nothing(self):
        rows = Rows(torch.empty(0, 8, dtype=torch.int8), torch.empty(0), torch.empty(0, dtype=torch.int64))
        assert SketchIndex(rows, None, None).top(torch.ones(2, 8), 4).ids.shape == (2, 0)


def test_without_faiss_an_index_says_what_to_install(recorded, tmp_path, monkeypatch):
    _, ledger = recorded
    sketches = ledger.sketch(tmp_path / "sketches", width=16)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'gradkern\[ann\]'"):
        sketches.index()
