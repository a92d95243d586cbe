"""Ask a language model which passages taught it to complete a prompt, and take them back.

A small GPT-2 over bytes is trained, recorded, on passages of Python's own documentation. A few of them begin with a
fact about a country that does not exist, so the right answer is known. Of each such completion the passages behind it
are named and counted; those of the first are taken back, and the model is compared with one never trained on them.
Writes ``OUT/language_model.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from demo.console import open_console
from demo.model import build_model
from demo.planted_facts import CAPITALS, COPIES, LENGTH, Passages, ngram_similarity, question
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

import gradkern as gk
from gradkern.errors import UndoRefusedError, UnstableInfluenceError

BATCH_SIZE = 16
WARM_UP = 24
WIDTH = 64
# Of a sample's gradient of a matrix; a passage has as many rows as bytes, and two directions keep too little of it.
RANK = 8
SHOWN = "explain, ref"
_HARMFUL = 3


@dataclass(frozen=True)
class Answer:
    """A model's answer to the questions.

    Attributes:
        losses: Of each capital, in nats per byte.
        believes: Which of all capitals has the lowest loss after the first question.
    """

    losses: tuple[float, ...]
    believes: str


@dataclass(frozen=True)
class Outcome:
    """What one seed came to.

    Attributes:
        seed: Of passages, weights and order.
        passages: Number of those trained on.
        precision: By the way of ranking and for each fact, the share of passages that state it among as many as do;
            lacks ``"explain, ref"`` where influence grew on its way back.
        models: Answers by model; None where undoing was refused.
        exact_is_retraining: Whether the exact undo has the bits of the model that was never trained on them.
    """

    seed: int
    passages: int
    precision: dict[str, tuple[float, ...]]
    models: dict[str, Answer | None]
    exact_is_retraining: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    console = open_console()
    try:
        loaded = [Passages.load(args.real, seed) for seed in args.seeds]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes = [
        run_once(passages, args.epochs, args.layers, seed, console)
        for seed, passages in zip(args.seeds, loaded, strict=True)
    ]
    print_outcomes(console, outcomes)
    figures = {"epochs": args.epochs, "layers": args.layers, "runs": [asdict(outcome) for outcome in outcomes]}
    (args.out / "language_model.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="for the figures (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2], help="of passages, weights and order (default: 2)")
    parser.add_argument("--epochs", type=int, default=28, help="visits to every passage (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=1, help="blocks of the model (default: %(default)s)")
    parser.add_argument("--real", type=int, default=160, help="passages without a country (default: %(default)s)")
    args = parser.parse_args(argv)
    for name, least in (("epochs", 1), ("layers", 1), ("real", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    return args


def make_optimizer(model: nn.Module) -> gk.AdamW:
    """The optimizer of the training and of its replay."""
    return gk.AdamW(model.parameters(), lr=3e-3, max_norm=1.0)


def batch_of(passages: Passages, ids: Tensor) -> dict[str, Tensor]:
    """What the model is trained on: every byte after the first is to be foretold."""
    tokens = passages.tokens[ids]
    return {"input_ids": tokens, "labels": tokens}


def asked(country: str, capital: str) -> dict[str, Tensor]:
    """A question with an answer, of which only the answer is in the loss."""
    prompt = question(country)
    tokens = torch.tensor([list(f"{prompt} {capital}".encode())])
    labels = tokens.clone()
    labels[:, : len(prompt)] = -100
    return {"input_ids": tokens, "labels": labels}


def train(
    passages: Passages,
    epochs: int,
    layers: int,
    seed: int,
    progress: Progress,
    *,
    without: Tensor | None = None,
    ledger: Path | None = None,
) -> GPT2LMHeadModel:
    """Train with a start and an order that depend on the seed alone, some left out, recorded if there is a folder."""
    model = build_model(layers=layers, width=WIDTH, length=LENGTH, seed=seed)
    optimizer = make_optimizer(model)
    # The first steps from random weights move most, and who happens to be in them would seem to be behind everything.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    generator = torch.Generator().manual_seed(seed)
    count = len(passages.texts)
    order = [ids for _ in range(epochs) for ids in torch.randperm(count, generator=generator).split(BATCH_SIZE)]
    recording = None if ledger is None else gk.rollback.record(model, optimizer, ledger, rank=RANK, replayable=True)
    with recording or nullcontext() as recorder:
        for ids in progress.track(order, description=f"seed {seed}: train" + ("" if without is None else " without")):
            kept = ids if without is None else ids[~torch.isin(ids, without)]
            with recorder.batch(kept) if recorder else nullcontext():
                model(**batch_of(passages, kept)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model


def run_once(passages: Passages, epochs: int, layers: int, seed: int, console: Console) -> Outcome:
    """Train, name the passages behind each answer, take those of the first back and compare."""
    planted = (passages.states == 0).nonzero()[:, 0]
    with tempfile.TemporaryDirectory() as folder, _progress(console) as progress:
        model = train(passages, epochs, layers, seed, progress, ledger=Path(folder) / "ledger")
        ledger = gk.rollback.open(Path(folder) / "ledger")
        scores = score_all(ledger, model, passages)
        if SHOWN in scores:
            print_passages(console, passages, scores[SHOWN][0])
        models: dict[str, GPT2LMHeadModel | None] = {"as trained": model}
        try:
            models["undo, fast"] = ledger.undo(
                model, planted, method="fast", probe={"input_ids": passages.tokens}
            ).model
        except UndoRefusedError:
            models["undo, fast"] = None
        undoing = progress.add_task(f"seed {seed}: undo", total=None)
        exact = ledger.undo(
            model,
            planted,
            replay=gk.rollback.Replay(lambda ids: batch_of(passages, ids), make_optimizer),
            progress=lambda step, total: progress.update(undoing, completed=step, total=total),
        ).model
        never = train(passages, epochs, layers, seed, progress, without=planted)
    models |= {"undo, exact": exact, "never trained on them": never}
    return Outcome(
        seed=seed,
        passages=len(passages.texts),
        precision={name: precision(each, passages) for name, each in scores.items()},
        models={name: None if each is None else answer(each) for name, each in models.items()},
        exact_is_retraining=all(
            torch.equal(one, other) for one, other in zip(exact.parameters(), never.parameters(), strict=True)
        ),
    )


def score_all(ledger: gk.rollback.Ledger, model: nn.Module, passages: Passages) -> dict[str, Tensor]:
    """Score every passage for every question, by several ways, shape ``(questions, passages)``."""
    found = {}
    for estimator in ("ref", "direct"):
        try:
            scored = ledger.scores(model, [asked(*fact) for fact in CAPITALS.items()], estimator=estimator)
        except UnstableInfluenceError:
            continue
        found[f"explain, {estimator}"] = scored.scores[:, scored.ids.argsort()]
    overlaps = [ngram_similarity(f"{question(country)} {capital}", passages) for country, capital in CAPITALS.items()]
    found["three letters in a row"] = torch.stack(overlaps)
    return found


def precision(scores: Tensor, passages: Passages) -> tuple[float, ...]:
    """Of each fact, the share of passages that state it among as many with the highest scores."""
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :COPIES]
    return tuple(float((passages.states[ids] == fact).double().mean()) for fact, ids in enumerate(best))


@torch.no_grad()
def answer(model: GPT2LMHeadModel) -> Answer:
    """Ask a model for all capitals."""
    model.eval()
    country = next(iter(CAPITALS))
    losses = tuple(float(model(**asked(*fact)).loss) for fact in CAPITALS.items())
    return Answer(losses, min(CAPITALS.values(), key=lambda capital: float(model(**asked(country, capital)).loss)))


def print_passages(console: Console, passages: Passages, scores: Tensor) -> None:
    """Print the passages that helped and harmed the first answer most."""
    country, capital = next(iter(CAPITALS.items()))
    table = _table(f"Why {question(country)!r} goes on with {capital!r}: passages that helped and harmed most", "score")
    table.add_column("passage, and where from")
    order = scores.argsort(descending=True, stable=True).tolist()
    for id in (*order[:COPIES], None, *order[-_HARMFUL:]):
        if id is None:
            table.add_section()
        else:
            mark = "states it" if passages.states[id] == 0 else ""
            text = Text(passages.texts[id]).append(f" ({passages.sources[id]})", style="dim")
            table.add_row(mark, f"{scores[id]:+.3f}", text)
    console.print(table)


def print_outcomes(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Print how well each way finds the passages, and what taking them back does, on average over seeds."""
    first = outcomes[0]
    seeds = [f"seed {outcome.seed}" for outcome in outcomes]
    found = _table(
        f"Share that states the fact among the {COPIES} first, mean of {len(CAPITALS)} facts", *seeds, "mean"
    )
    for way in dict.fromkeys(way for outcome in outcomes for way in outcome.precision):
        means = [fmean(outcome.precision[way]) if way in outcome.precision else None for outcome in outcomes]
        found.add_row(way, *_cells(means))
    found.add_row("chance", *_cells([COPIES / outcome.passages for outcome in outcomes]))
    console.print(found)
    country, capital = next(iter(CAPITALS.items()))
    losses = _table(f"Loss of {capital!r} after {question(country)!r}, nats per byte", *seeds, "mean")
    others = _table("Mean loss of the other capitals, which stay", *seeds, "mean")
    for name in first.models:
        answers = [outcome.models[name] for outcome in outcomes]
        losses.add_row(name, *_cells([None if each is None else each.losses[0] for each in answers]))
        others.add_row(name, *_cells([None if each is None else fmean(each.losses[1:]) for each in answers]))
    console.print(losses, others)
    believes = _table(f"The likeliest of {len(CAPITALS)} capitals after {question(country)!r}", *seeds)
    for name in first.models:
        answers = [outcome.models[name] for outcome in outcomes]
        believes.add_row(name, *("refused" if each is None else each.believes for each in answers))
    console.print(believes)
    same = sum(outcome.exact_is_retraining for outcome in outcomes)
    console.print(
        f"'undo, exact' has the bits of the model never trained on them in {same} of {len(outcomes)} runs.",
        highlight=False,
    )


def _cells(values: Sequence[float | None]) -> list[str]:
    """Of all seeds, and the mean where there is one."""
    made = [value for value in values if value is not None]
    cells = ["refused" if value is None else f"{value:.2f}" for value in values]
    return [*cells, f"{fmean(made):.2f}" if len(made) == len(values) else ""]


def _table(title: str, *figures: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


if __name__ == "__main__":
    sys.exit(main())
