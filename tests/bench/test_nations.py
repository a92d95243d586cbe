"""The experiment's parts on a small graph: retraining at once is training one by one, explanations beat neighbours."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from bench import nations
from bench.harness import Report
from bench.nations import (
    Experiment,
    Graph,
    choices,
    complex_product,
    distmult,
    explained,
    is_near,
    load_graph,
    measure,
    predicted,
    record_run,
    retrained,
)


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Compiling takes half a minute."""
    monkeypatch.setattr(nations, "_compiled", lambda function: function)


def graph():
    """Ten entities in two camps; relations hold within a camp, across, or between neighbours, each with exceptions."""
    generator = torch.Generator().manual_seed(0)
    every = torch.cartesian_prod(torch.arange(10), torch.arange(3), torch.arange(10))
    head, relation, tail = every.unbind(1)
    holds = torch.stack([(head - tail) % 2 == 0, (head - tail) % 2 == 1, (head - tail).abs() <= 1])
    holds = holds.gather(0, relation.unsqueeze(0))[0] ^ (torch.rand(len(every), generator=generator) < 0.05)
    true = every[holds]
    true = true[torch.randperm(len(true), generator=generator)]
    return Graph(true[20:], true[10:20], true[:10], entities=10, relations=3)


FORMS = {"DistMult": distmult, "ComplEx": complex_product}


def experiment(form="DistMult", epochs=1):
    return Experiment(graph(), FORMS[form], width=4, epochs=epochs, negatives=5)


def trained_one_by_one(setting, seed, is_dropped):
    """With torch's own Adam, which makes no step where a triple is left out but goes on counting."""
    model, inputs = setting.model(seed), setting.inputs()
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.999), eps=1e-7)
    for triple, lr in setting.steps():
        if is_dropped[triple]:
            for state in optimizer.state.values():
                state["step"] += 1
            continue
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[triple : triple + 1]), torch.zeros(1, dtype=torch.long)).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("form", FORMS)
def test_retraining_at_once_is_training_one_by_one(form):
    setting = experiment(form)
    is_dropped = torch.zeros(3, len(setting.graph.train), dtype=torch.bool)
    is_dropped[1, 7], is_dropped[2, 20:60] = True, True
    entities, relations = retrained(setting, 1, is_dropped)
    for number, each in enumerate(is_dropped):
        model = trained_one_by_one(setting, 1, each)
        torch.testing.assert_close(entities[number], model.entities.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(relations[number], model.relations.weight, rtol=1e-3, atol=1e-4)
    assert float((entities[0] - entities[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_retraining_on_everything_is_the_recorded_run(form, tmp_path):
    setting = experiment(form)
    model, ledger = record_run(setting, 2, tmp_path / "run")
    assert ledger.steps == len(setting.graph.train)
    assert ledger.conservation(model).error <= ledger.conservation(model).bound
    entities, relations = retrained(setting, 2, torch.zeros(1, len(setting.graph.train), dtype=torch.bool))
    torch.testing.assert_close(entities[0], model.entities.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(relations[0], model.relations.weight, rtol=1e-3, atol=1e-4)


def test_complex_product_is_that_of_complex_numbers():
    head, relation, tail = torch.randn(3, 5, 4, 2).unbind(0)
    expected = (torch.view_as_complex(head) * torch.view_as_complex(relation) * torch.view_as_complex(tail).conj()).real
    parts = [torch.cat(each.unbind(-1), dim=1) for each in (head, relation, tail)]
    found = (complex_product(parts[0], parts[1], 1) * parts[2]).sum(1)
    torch.testing.assert_close(found, expected.sum(1))


def test_wrong_tails_are_wrong_and_always_the_same():
    setting = experiment()
    inputs = setting.inputs()
    assert torch.equal(inputs[:, :3], setting.graph.train)
    assert not (inputs[:, 3:] == inputs[:, 2:3]).any()
    assert (int(inputs[:, 3:].min()), int(inputs[:, 3:].max())) == (0, 9)
    assert torch.equal(setting.inputs(), inputs)


def test_predictions_are_the_best_unknown_tails():
    setting = experiment()
    model = setting.model(0)
    triples = predicted(setting, model)
    known = {tuple(triple) for triple in torch.cat([setting.graph.train, setting.graph.valid]).tolist()}
    assert {tuple(each[:2]) for each in triples.tolist()} == {tuple(each[:2]) for each in setting.graph.test.tolist()}
    with torch.no_grad():
        for head, relation, tail in triples.tolist():
            scores = model(torch.tensor([[head, relation, *range(10)]]))[0]
            unknown = [other for other in range(10) if (head, relation, other) not in known]
            assert max(unknown, key=lambda other: float(scores[other])) == tail
    assert len(predicted(setting, model, most=4)) == 4


def test_explanations_are_how_far_probabilities_fall(tmp_path):
    setting = experiment()
    model, ledger = record_run(setting, 0, tmp_path / "run")
    triples = predicted(setting, model, most=3)
    found = explained(setting, model, ledger, triples)
    assert found.shape == (3, len(setting.graph.train))
    finished = ledger.scores(
        model,
        (setting.tails(triples[:1, :2]), triples[:1, 2]),
        loss_fn=lambda scores, tail: 1 - scores.softmax(1)[0, tail].sum(),
        estimator="paper",
    )
    torch.testing.assert_close(found[0], finished.scores, rtol=1e-3, atol=1e-6)


def test_what_is_left_out_is_near_and_as_much_by_chance_as_by_explanation():
    train = graph().train
    triples = torch.tensor([[0, 1, 3], [4, 2, 5]])
    near = is_near(train, triples)
    for (head, relation, tail), each in zip(triples.tolist(), near, strict=True):
        expected = [other[1] == relation or bool({head, tail} & {other[0], other[2]}) for other in train.tolist()]
        assert each.tolist() == expected
    influence = torch.randn(2, len(train), dtype=torch.float64)
    left_out = choices(train, triples, influence, seed=0)
    assert list(left_out) == ["GR-1", "GR-10", "GR-all", "NH-1", "NH-10", "NH-all"]
    helped = near & (influence >= 0)
    assert torch.equal(left_out["GR-all"], helped)
    for name, each in left_out.items():
        assert not (each & ~near).any()
        count = {"1": torch.ones(2), "10": torch.full((2,), 10), "all": helped.sum(1)}[name.partition("-")[2]]
        assert each.sum(1).tolist() == count.tolist()
    best = influence.masked_fill(~near, -torch.inf)
    assert torch.equal(left_out["GR-1"].float().argmax(1), best.argmax(1))
    tenth = best.sort(dim=1, descending=True).values[:, 9:10]
    assert torch.equal(left_out["GR-10"], best >= tenth)
    assert not torch.equal(left_out["NH-10"], choices(train, triples, influence, seed=1)["NH-10"])


def test_leaving_out_explanations_harms_predictions_more_than_leaving_out_neighbours():
    found = {key[:2]: value for key, value in measure(experiment(epochs=4), seed=0).items()}
    for metric in ("pd", "tc"):
        assert found["GR-10", metric] > found["NH-10", metric] + 10
    assert found["GR-10", "pd"] >= 80
    assert found["NH-all", "deleted"] == found["GR-all", "deleted"] > 10
    assert found["gradkern", "predictions"] <= 10


def test_graphs_are_read_without_importing_their_package(tmp_path, monkeypatch):
    folder = tmp_path / "pykeen" / "datasets" / "toy"
    folder.mkdir(parents=True)
    (tmp_path / "pykeen" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    for part, lines in {
        "train": "b\tlikes\ta\nc\thates\tb\n",
        "valid": "a\tlikes\tc\n",
        "test": "c\tlikes\ta\n",
    }.items():
        (folder / f"{part}.txt").write_text(lines)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = load_graph("toy")
    assert found.train.tolist() == [[1, 1, 0], [2, 0, 1]]
    assert (found.valid.tolist(), found.test.tolist()) == ([[0, 1, 2]], [[2, 1, 0]])
    assert (found.entities, found.relations) == (3, 2)


def test_without_the_data_the_suite_goes_on_and_says_so(monkeypatch, capsys):
    def missing(package):
        raise ImportError(f"the data comes with {package}, which is not installed; try `make bench-peers`")

    monkeypatch.setattr(nations, "data_folder", missing)
    report = Report("rollback", torch.device("cpu"))
    nations.run_nations(report)
    assert report.records == []
    assert "try `make bench-peers`" in capsys.readouterr().err
