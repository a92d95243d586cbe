"""Name the facts behind what a model of a knowledge graph predicts, and check them by training again without.

The experiment of "Explaining neural matrix factorization with gradient rollback" (Lawrence, Sztyler and Niepert, AAAI
2021) in small. GRAPH is a folder with ``train.txt``, ``valid.txt`` and ``test.txt``, of lines ``head relation tail``
separated by tabs; that of Nations is ``pykeen/datasets/nations`` in the wheel of pykeen. DistMult is trained on it
recorded, one fact a step. Then of some predictions the facts that helped most are named, and the model is trained again
without them and, for comparison, without random facts about the same things. ``python -m bench rollback`` has the whole
table of the paper.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

import gradkern as gk


class DistMult(nn.Module):
    """Scores ``Σ head * relation * tail``; ids are head, relation and candidate tails, shape ``(batch, 2 + tails)``."""

    def __init__(self, entities: int, relations: int, width: int = 10) -> None:
        super().__init__()
        self.entities, self.relations = nn.Embedding(entities, width), nn.Embedding(relations, width)
        for embedding in (self.entities, self.relations):
            nn.init.uniform_(embedding.weight, -0.05, 0.05)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores, shape ``(batch, tails)``."""
        ends = self.entities(torch.cat([ids[:, :1], ids[:, 2:]], dim=1))
        return (ends[:, :1] * self.relations(ids[:, 1:2]) * ends[:, 1:]).sum(-1)


class Graph:
    """Facts as numbers, shape ``(facts, 3)``, and the names of what they are about."""

    def __init__(self, folder: Path) -> None:
        parts = ("train", "valid", "test")
        lines = {part: (folder / f"{part}.txt").read_text(encoding="utf-8").splitlines() for part in parts}
        facts = {part: [tuple(line.split("\t")) for line in each] for part, each in lines.items()}
        every = [fact for each in facts.values() for fact in each]
        self.entities = sorted({end for head, _, tail in every for end in (head, tail)})
        self.relations = sorted({relation for _, relation, _ in every})
        entity, relation = ({name: i for i, name in enumerate(names)} for names in (self.entities, self.relations))
        numbers = {part: [(entity[h], relation[r], entity[t]) for h, r, t in each] for part, each in facts.items()}
        self.train, self.valid, self.test = (torch.tensor(numbers[part]) for part in parts)

    def with_all_tails(self, facts: Tensor) -> Tensor:
        """What the model is asked to rank all entities as tails."""
        return torch.cat([facts[:, :2], torch.arange(len(self.entities)).expand(len(facts), -1)], dim=1)

    def name(self, fact: Tensor) -> str:
        """A fact in words."""
        head, relation, tail = fact.tolist()
        return f"{self.entities[head]} {self.relations[relation]} {self.entities[tail]}"


def train(graph: Graph, epochs: int, without: Sequence[int] = (), ledger: Path | None = None) -> DistMult:
    """Train with a fixed start and order, some facts left out, recorded if there is a folder for it."""
    torch.manual_seed(0)
    model = DistMult(len(graph.entities), len(graph.relations))
    optimizer = gk.Adam(model.parameters(), lr=3e-3, eps=1e-7)
    inputs, skipped = graph.with_all_tails(graph.train), set(without)
    with nullcontext() if ledger is None else gk.rollback.record(model, optimizer, ledger) as recorder:
        for number in [*range(len(inputs))] * epochs:
            if number in skipped:
                continue
            with nullcontext() if recorder is None else recorder.batch([number]):
                scores = model(inputs[number : number + 1])
                nn.functional.cross_entropy(scores, graph.train[number, 2:]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def predict(graph: Graph, model: DistMult, facts: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tail of each that is no known fact, and the probabilities of all."""
    known = torch.cat([graph.train, graph.valid])
    with torch.no_grad():
        probabilities = model(graph.with_all_tails(facts)).softmax(1)
    is_known = torch.zeros_like(probabilities, dtype=torch.bool)
    for row, (head, relation) in enumerate(facts[:, :2].tolist()):
        is_known[row, known[(known[:, 0] == head) & (known[:, 1] == relation), 2]] = True
    return probabilities.masked_fill(is_known, -1.0).argmax(1), probabilities


def negative_probability(scores: Tensor, tail: Tensor) -> Tensor:
    """What rises by as much as a prediction becomes less probable."""
    return -scores.softmax(1)[0, tail].sum()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("graph", type=Path, help="folder with train.txt, valid.txt and test.txt")
    parser.add_argument("--predictions", type=int, default=4, help="how many to explain (default: %(default)s)")
    parser.add_argument("--facts", type=int, default=10, help="to name and leave out for each (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="visits to every fact (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        graph = Graph(args.graph)
    except OSError as error:
        print(f"no graph: {error}; expected a folder with train.txt, valid.txt and test.txt", file=sys.stderr)
        return 1
    asked = torch.unique(graph.test[:, :2], dim=0)
    asked = asked[torch.randperm(len(asked), generator=torch.Generator().manual_seed(0))[: args.predictions]]
    with tempfile.TemporaryDirectory() as folder:
        model = train(graph, args.epochs, ledger=Path(folder) / "ledger")
        tails, before = predict(graph, model, asked)
        queries = list(zip(graph.with_all_tails(asked).split(1), tails.split(1), strict=True))
        ledger = gk.rollback.open(Path(folder) / "ledger")
        scores = ledger.scores(model, queries, loss_fn=negative_probability, estimator="paper").scores
    for row, tail in enumerate(tails):
        fact = torch.cat([asked[row], tail[None]])
        ends = graph.train[:, ::2]
        near = (ends == fact[0]).any(1) | (ends == fact[2]).any(1) | (graph.train[:, 1] == fact[1])
        best = scores[row].masked_fill(~near, -torch.inf).argsort(descending=True)[: args.facts]
        chance = torch.rand(len(near), generator=torch.Generator().manual_seed(row)).masked_fill(~near, -1.0)
        print(f"\n{graph.name(fact)}: {before[row, tail]:.2f}")
        for number in best[:3].tolist():
            print(f"    because {graph.name(graph.train[number])} ({scores[row, number]:+.3f})")
        for what, left_out in (("these", best), ("neighbours", chance.argsort(descending=True)[: args.facts])):
            again = train(graph, args.epochs, without=left_out.tolist())
            first, after = predict(graph, again, asked[row : row + 1])
            verdict = "still first" if first[0] == tail else f"now {graph.entities[int(first[0])]}"
            print(f"  without {len(left_out)} {what}: {after[0, tail]:.2f}, {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
