"""The experiment of the gradient rollback paper on Nations, from a ledger of ours.

Lawrence, Sztyler and Niepert, "Explaining neural matrix factorization with gradient rollback", AAAI 2021. A matrix
factorisation learns a knowledge graph one triple ``(head, relation, tail)`` at a time; each of its predictions for the
test triples is explained by the training triples that an estimator says it rests on (GR), or by random ones that share
head, relation or tail with it (NH), and the model is trained anew without those: 1, 10 or all that helped.

``pd``: share of predictions whose probability falls by that; ``tc``: share where another tail comes first. Both say how
an explanation does what it claims, and little about how exact its scores are.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad

import gradkern as gk
from gradkern.rollback import Ledger

from .harness import Report
from .peers import data_folder

__all__ = [
    "Experiment",
    "Graph",
    "choices",
    "complex_product",
    "distmult",
    "explained",
    "is_near",
    "load_graph",
    "measure",
    "predicted",
    "record_run",
    "retrained",
    "run_nations",
]

# Of the paper's table, in %: probability drop and top-1 change.
PUBLISHED = {
    "NH-1": (54, 18),
    "NH-10": (66, 36),
    "NH-all": (82, 70),
    "GR-1": (93, 38),
    "GR-10": (97, 83),
    "GR-all": (100, 97),
}

SEEDS = (0, 1, 2, 3, 4)

# Predictions that are explained of the larger graphs.
MOST = 50

_BETAS, _EPS = (0.9, 0.999), 1e-7

Compose = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Graph:
    """A knowledge graph.

    Attributes:
        train: Head, relation and tail of every triple, int64, shape ``(triples, 3)``.
        valid: Likewise.
        test: Likewise.
        entities: How many there are.
        relations: How many there are.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    entities: int
    relations: int


def load_graph(name: str) -> Graph:
    """One of the graphs in pykeen's wheel, read without its imports."""
    folder = data_folder("pykeen") / "datasets" / name
    parts = {
        part: [line.split("\t") for line in (folder / f"{part}.txt").read_text().splitlines()]
        for part in ("train", "valid", "test")
    }
    triples = [triple for part in parts.values() for triple in part]
    entities = {each: number for number, each in enumerate(sorted({end for h, _, t in triples for end in (h, t)}))}
    relations = {each: number for number, each in enumerate(sorted({r for _, r, _ in triples}))}
    numbers = {
        part: torch.tensor([(entities[h], relations[r], entities[t]) for h, r, t in each])
        for part, each in parts.items()
    }
    return Graph(**numbers, entities=len(entities), relations=len(relations))


def distmult(head: Tensor, relation: Tensor, dim: int) -> Tensor:
    """What a tail is multiplied with: the score is the inner product."""
    return head * relation


def complex_product(head: Tensor, relation: Tensor, dim: int) -> Tensor:
    """The same for ComplEx, ``Re⟨head, relation, conj(tail)⟩``; real parts come first, imaginary ones second."""
    (a, b), (c, d) = head.chunk(2, dim), relation.chunk(2, dim)
    return torch.cat([a * c - b * d, a * d + b * c], dim)


class Factorisation(nn.Module):
    """Scores candidate tails: ``ids`` are head, relation and candidates, shape ``(batch, 2 + candidates)``."""

    def __init__(self, entities: int, relations: int, width: int, compose: Compose) -> None:
        super().__init__()
        self.entities, self.relations = nn.Embedding(entities, width), nn.Embedding(relations, width)
        for embedding in (self.entities, self.relations):
            nn.init.uniform_(embedding.weight, -0.05, 0.05)
        self.compose = compose

    def forward(self, ids: Tensor) -> Tensor:
        """Scores, shape ``(batch, candidates)``."""
        heads_and_tails = self.entities(torch.cat([ids[:, :1], ids[:, 2:]], dim=1))
        product = self.compose(heads_and_tails[:, :1], self.relations(ids[:, 1:2]), -1)
        return (product * heads_and_tails[:, 1:]).sum(-1)


@dataclass(frozen=True)
class Experiment:
    """A training as in the paper: one triple a step, in the order of the file, Adam with a falling learning rate.

    Attributes:
        graph: What is learned.
        compose: The model's form.
        width: Numbers of an entity and of a relation.
        epochs: Visits of every triple.
        negatives: Wrong tails beside the right one; the same in all epochs and for all seeds.
    """

    graph: Graph
    compose: Compose = distmult
    width: int = 10
    epochs: int = 10
    negatives: int = 13

    def model(self, seed: int) -> Factorisation:
        """As it starts."""
        torch.manual_seed(seed)
        return Factorisation(self.graph.entities, self.graph.relations, self.width, self.compose)

    def inputs(self) -> Tensor:
        """Head, relation, right tail and wrong ones of every training triple."""
        draws = []
        for number, block in enumerate(self.graph.train.split(4096)):
            drawn = np.random.RandomState(number).randint(self.graph.entities, size=(len(block), self.negatives))
            head, tail = block[:, :1], block[:, 2:]
            middle = (head + tail) // 2
            other = torch.where(middle == tail, (middle + 1) % self.graph.entities, middle)
            draws.append(torch.where(torch.from_numpy(drawn) == tail, other, torch.from_numpy(drawn)))
        return torch.cat([self.graph.train, torch.cat(draws)], dim=1)

    def steps(self) -> Iterator[tuple[int, float]]:
        """Triple and learning rate of every step."""
        for step in range(self.epochs * len(self.graph.train)):
            yield step % len(self.graph.train), 3e-3 * 0.96 ** (step / 1000)

    def tails(self, heads_and_relations: Tensor) -> Tensor:
        """Inputs with every entity as a candidate."""
        every = torch.arange(self.graph.entities).expand(len(heads_and_relations), -1)
        return torch.cat([heads_and_relations, every], dim=1)

    def known(self, heads_and_relations: Tensor) -> Tensor:
        """Tails that training or validation triples have there, bool, shape ``(pairs, entities)``."""
        given = torch.cat([self.graph.train, self.graph.valid])
        table = torch.zeros(self.graph.entities, self.graph.relations, self.graph.entities, dtype=torch.bool)
        table[given[:, 0], given[:, 1], given[:, 2]] = True
        return table[heads_and_relations[:, 0], heads_and_relations[:, 1]]


def record_run(experiment: Experiment, seed: int, path: Path) -> tuple[Factorisation, Ledger]:
    """Train once, recorded."""
    model, inputs = experiment.model(seed), experiment.inputs()
    optimizer = gk.Adam(model.parameters(), betas=_BETAS, eps=_EPS)
    right = torch.zeros(1, dtype=torch.int64)
    with gk.rollback.record(model, optimizer, path, steps_per_segment=1000) as recorder:
        for triple, lr in experiment.steps():
            optimizer.param_groups[0]["lr"] = lr
            with recorder.batch([triple]):
                nn.functional.cross_entropy(model(inputs[triple : triple + 1]), right).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, gk.rollback.open(path)


def retrained(experiment: Experiment, seed: int, is_dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Train models without some triples, all at once.

    A model that skips a triple makes no step there, but the learning rate goes on as it does for the others, and with
    it the count of steps that Adam corrects its bias by: Keras keeps one count for both.

    Args:
        experiment: The training.
        seed: Of its start.
        is_dropped: Which triples each model leaves out, bool, shape ``(models, triples)``.

    Returns:
        Entities and relations of every model, of shapes ``(models, rows, width)``.
    """
    model, height = experiment.model(seed), experiment.graph.entities
    start = torch.cat([model.entities.weight, model.relations.weight]).detach()
    # Models along the last dimension, so that every operation runs along it.
    weights = start.unsqueeze(-1).repeat(1, 1, len(is_dropped))
    momenta, squares = torch.zeros_like(weights), torch.zeros_like(weights)
    kept = (~is_dropped).t().float().contiguous()
    gradient_of, update = _compiled(_gradient), _compiled(_update)
    (beta1, beta2), rows = _BETAS, [_rows(ids, height) for ids in experiment.inputs()]
    for step, (triple, lr) in enumerate(experiment.steps(), start=1):
        used, places = rows[triple]
        looked_up = weights.index_select(0, used).index_select(0, places)
        each = gradient_of(looked_up, kept[triple], experiment.compose)
        gradient = torch.zeros(len(used), *each.shape[1:]).index_add_(0, places, each)
        correction = (1 - beta2**step) ** 0.5
        sizes = torch.tensor([lr * correction / (1 - beta1**step), _EPS * correction])
        # Before the decay, which then takes no pass of its own.
        momenta.index_add_(0, used, gradient, alpha=(1 - beta1) / beta1)
        squares.index_add_(0, used, gradient.square_(), alpha=(1 - beta2) / beta2)
        update(weights, momenta, squares, kept[triple], sizes)
    entities, relations = weights.permute(2, 0, 1).split([height, experiment.graph.relations], dim=1)
    return entities, relations


def _rows(ids: Tensor, entities: int) -> tuple[Tensor, Tensor]:
    """The different rows a step uses, of entities and relations one below the other, and the place of each id there."""
    ids = ids.clone()
    ids[1] += entities
    used, places = torch.unique(ids, return_inverse=True)
    return used, places


def _gradient(looked_up: Tensor, kept: Tensor, compose: Compose) -> Tensor:
    """Of every model's cross-entropy by what was looked up for head, relation and candidates; 0 where it skips."""

    def loss(looked_up: Tensor) -> Tensor:
        scores = (compose(looked_up[:1], looked_up[1:2], 1) * looked_up[2:]).sum(1)
        return ((scores.logsumexp(0) - scores[0]) * kept).sum()

    return grad(loss)(looked_up)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where it is first used: torch's compiler takes seconds to import."""
    return torch.compile(function, dynamic=False)


def _update(weights: Tensor, momenta: Tensor, squares: Tensor, kept: Tensor, sizes: Tensor) -> None:
    """Adam's, of the models that take the step."""
    beta1, beta2 = _BETAS
    momenta.mul_(1 - (1 - beta1) * kept)
    squares.mul_(1 - (1 - beta2) * kept)
    weights.sub_(momenta / (squares.sqrt() + sizes[1]) * (sizes[0] * kept))


def predicted(experiment: Experiment, model: nn.Module, most: int | None = None) -> Tensor:
    """Different triples that the model predicts for the test's heads and relations, at most so many; none is known."""
    pairs = torch.unique(experiment.graph.test[:, :2], dim=0)
    if most is not None:
        pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:most]]
    with torch.no_grad():
        scores = model(experiment.tails(pairs)).masked_fill(experiment.known(pairs), -torch.inf)
    return torch.cat([pairs, scores.argmax(1, keepdim=True)], dim=1)


def explained(experiment: Experiment, model: nn.Module, ledger: Ledger, triples: Tensor) -> Tensor:
    """How much less probable predictions are without training triples: fp64, shape ``(predictions, triples)``."""
    queries = list(zip(experiment.tails(triples[:, :2]).split(1), triples[:, 2].split(1), strict=True))
    found = ledger.scores(
        model, queries, loss_fn=lambda scores, tail: -scores.softmax(1)[0, tail].sum(), estimator="paper"
    )
    assert torch.equal(found.ids, torch.arange(len(experiment.graph.train)))
    return found.scores


def is_near(train: Tensor, triples: Tensor) -> Tensor:
    """Which training triples share an entity, on whichever side, or the relation: ``(predictions, triples)``."""
    ends, wanted = train[:, ::2], triples[:, ::2]
    shares_entity = (ends[None, :, :, None] == wanted[:, None, None, :]).flatten(2).any(dim=2)
    return shares_entity | (train[:, 1] == triples[:, 1:2])


def choices(train: Tensor, triples: Tensor, influence: Tensor, seed: int) -> dict[str, Tensor]:
    """By name, which training triples to leave out for each prediction, bool, shape ``(predictions, triples)``."""
    near = is_near(train, triples)
    helped = near & (influence >= 0)
    count = helped.sum(1, keepdim=True)
    order = torch.where(helped, influence, -torch.inf).argsort(dim=1, descending=True)
    noise = torch.rand(near.shape, generator=torch.Generator().manual_seed(seed))
    at_random = torch.where(near, noise, -torch.inf).argsort(dim=1, descending=True)
    found = {}
    for name, ranked, most in (("GR", order, count), ("NH", at_random, near.sum(1, keepdim=True))):
        for what, chosen in (("1", most.clamp(max=1)), ("10", most.clamp(max=10)), ("all", count)):
            is_first = torch.arange(len(train)) < chosen
            found[f"{name}-{what}"] = torch.zeros_like(near).scatter_(1, ranked, is_first)
    return found


def _outcomes(
    experiment: Experiment, seed: int, triples: Tensor, left_out: dict[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """By name, in %: predictions that became less probable, and those that another tail overtook."""
    is_whole = torch.zeros(1, len(experiment.graph.train), dtype=torch.bool)
    entities, relations = retrained(experiment, seed, torch.cat([is_whole, *left_out.values()]))
    heads, tails = triples[:, 0], triples[:, 2:]
    known = experiment.known(triples[:, :2])

    def evaluate(entities: Tensor, relations: Tensor) -> tuple[Tensor, Tensor]:
        """Probability of every predicted tail, and the tail that comes first."""
        number = torch.arange(len(triples)) % len(entities)
        product = experiment.compose(entities[number, heads], relations[number, triples[:, 1]], 1)
        scores = torch.einsum("pw,pew->pe", product, entities[number])
        return scores.softmax(1).gather(1, tails), scores.masked_fill(known, -torch.inf).argmax(1, keepdim=True)

    before, first = evaluate(entities[:1], relations[:1])
    outcomes = {}
    for number, name in enumerate(left_out):
        part = slice(1 + number * len(triples), 1 + (number + 1) * len(triples))
        after, first_after = evaluate(entities[part], relations[part])
        outcomes[name] = tuple(100 * float(each.float().mean()) for each in (after < before, first_after != first))
    return outcomes


def measure(experiment: Experiment, seed: int, most: int | None = None) -> dict[tuple[str, str, str], float]:
    """Record, explain, train again: by system, metric and unit."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        model, ledger = record_run(experiment, seed, Path(folder) / "ledger")
        recorded = time.perf_counter()
        triples = predicted(experiment, model, most)
        left_out = choices(experiment.graph.train, triples, explained(experiment, model, ledger, triples), seed)
        scored = time.perf_counter()
    outcomes = _outcomes(experiment, seed, triples, left_out)
    done = time.perf_counter()
    found = {("gradkern", "predictions", ""): float(len(triples))}
    for name, seconds in (("record", recorded - start), ("explain", scored - recorded), ("retrain", done - scored)):
        found[f"gradkern, {name}", "seconds_per_seed", "s"] = seconds
    for name, (drop, change) in outcomes.items():
        found[name, "pd", "%"], found[name, "tc", "%"] = drop, change
        found[name, "deleted", ""] = float(left_out[name].sum(1).float().mean())
    return found


def run_nations(report: Report) -> None:
    """The paper's table, and the same with another model and on other graphs; one process a core."""
    try:
        graphs = {name: load_graph(name) for name in ("nations", "umls", "kinships")}
    except ImportError as missing:
        print(f"without the knowledge graphs: {missing}", file=sys.stderr, flush=True)
        return
    nations = graphs["nations"]
    cases = {
        "Nations, DistMult": (Experiment(nations), SEEDS, None),
        "Nations, ComplEx": (Experiment(nations, complex_product, width=20), SEEDS[:1], None),
        # A fifth of the epochs: these have three and five times the triples.
        "UMLS, DistMult": (Experiment(graphs["umls"], epochs=2), SEEDS[:1], MOST),
        "Kinships, DistMult": (Experiment(graphs["kinships"], epochs=2), SEEDS[:1], MOST),
    }
    found: dict[tuple[str, str, str, str], list[float]] = {}
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = [
            (case, pool.submit(measure, experiment, seed, most))
            for case, (experiment, seeds, most) in cases.items()
            for seed in seeds
        ]
        for case, each in running:
            for key, value in each.result().items():
                found.setdefault((case, *key), []).append(value)
    for (case, system, metric, unit), values in found.items():
        report.add(case, system, metric, statistics.fmean(values), unit)
    for name, (drop, change) in PUBLISHED.items():
        report.add("Nations, DistMult", f"{name}, published", "pd", drop, "%")
        report.add("Nations, DistMult", f"{name}, published", "tc", change, "%")
