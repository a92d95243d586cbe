"""A run on partly wrong labels, and ways to say how suspect the label of each of its training samples is.

Every way is a number a sample, high where the label is suspect. None of them sees the true labels of training samples.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern.errors import UnstableInfluenceError

from .digits import CLASSES, SIDE, NoisyDigits

__all__ = ["CHOSEN", "WAYS", "Run", "Way", "suspicions"]

_BATCH_SIZE = 50
_LEARNING_RATE = 1e-2
_MAX_NORM = 1.0
_FOLDS = 5
_NEIGHBOURS = 10
# A pass over the ledger holds three tensors of the model's size for each query: 8 MB for these.
_QUERIES_AT_ONCE = 100


@dataclass(frozen=True)
class Way:
    """A way to rank training samples.

    Attributes:
        name: As the report has it.
        needs: Beside the training samples, their given labels and the trained model.
    """

    name: str
    needs: str


# Of those that need no more than the ledger, the one with the highest mean precision over seeds 0 to 2, each at 10, 20
# and 40 epochs; figures are reported of other seeds.
CHOSEN = "own against others, direct"
WAYS = (
    Way(CHOSEN, "ledger"),
    Way("own against others, ref", "ledger"),
    Way("own share, direct", "ledger"),
    Way("own share, ref", "ledger"),
    Way("self-influence, direct", "ledger"),
    Way("self-influence, ref", "ledger"),
    Way("harm to clean samples, direct", "ledger, clean samples"),
    Way("harm to clean samples, ref", "ledger, clean samples"),
    Way("loss at the end", "nothing more"),
    Way("mean loss while training", "a log of every loss"),
    Way("loss under 5-fold training", "5 more trainings"),
    Way("10 nearest images disagree", "no model at all"),
)


@dataclass(frozen=True)
class Run:
    """A recorded training.

    Attributes:
        digits: Trained on.
        model: As training left it.
        ledger: Of the training.
        mean_losses: Of every training sample when it was visited, mean over epochs.
        epochs: Number of visits to every sample.
        seed: Of the weights and the order.
    """

    digits: NoisyDigits
    model: nn.Module
    ledger: gk.rollback.Ledger
    mean_losses: Tensor
    epochs: int
    seed: int

    @classmethod
    def start(cls, digits: NoisyDigits, path: Path, *, epochs: int, seed: int) -> Run:
        """Train and record; the ledger goes to ``path``."""
        model, mean_losses = _train(digits.images, digits.given, epochs, seed, path)
        return cls(digits, model, gk.rollback.open(path), mean_losses, epochs, seed)


def suspicions(run: Run) -> dict[str, Tensor]:
    """How suspect each training sample is, by the name of the way, fp32 or fp64, shape ``(samples,)``.

    Lacks the ways by ``"ref"`` whose influence grew on its way back through training.
    """
    digits = run.digits
    found = {
        "loss at the end": _losses(run.model, digits.images, digits.given),
        "mean loss while training": run.mean_losses,
        "loss under 5-fold training": _losses_when_left_out(run),
        "10 nearest images disagree": _disagreement(digits),
    }
    for estimator in ("direct", "ref"):
        try:
            own, others, total = _influence_among_training(run, estimator)
            harm = -_influence(run, [(digits.clean_images, digits.clean_labels)], estimator)[0]
        except UnstableInfluenceError:
            continue
        found[f"own against others, {estimator}"] = (own - others) / total
        found[f"own share, {estimator}"] = own / total
        found[f"self-influence, {estimator}"] = own
        found[f"harm to clean samples, {estimator}"] = harm
    return found


def _influence_among_training(run: Run, estimator: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sample on its own loss, of all others on that loss, and the sum of all magnitudes.

    Divided by the last, neither depends on the scale of the sample's gradient. A sample that is learned by heart has
    next to no gradient left, and so little influence on its loss, whoever taught it; but who taught it still shows.
    """
    queries = list(zip(run.digits.images.split(1), run.digits.given.split(1), strict=True))
    own, net, total = [], [], []
    for first in range(0, len(queries), _QUERIES_AT_ONCE):
        influence = _influence(run, queries[first : first + _QUERIES_AT_ONCE], estimator)
        own.append(influence.diagonal(first))
        net.append(influence.sum(1))
        total.append(influence.abs().sum(1))
    by_itself = torch.cat(own)
    return by_itself, torch.cat(net) - by_itself, torch.cat(total).clamp_min(torch.finfo(torch.float64).tiny)


def _influence(run: Run, queries: list[tuple[Tensor, Tensor]], estimator: str) -> Tensor:
    """Of every training sample on every query's loss, positive where it helped; a row for each query."""
    return run.ledger.scores(run.model, queries, loss_fn=nn.functional.cross_entropy, estimator=estimator).scores


@torch.no_grad()
def _losses(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels, reduction="none")


def _losses_when_left_out(run: Run) -> Tensor:
    """Of each sample, under a model that was trained on the other folds."""
    digits = run.digits
    fold = torch.arange(len(digits.images)) % _FOLDS
    losses = torch.empty(len(digits.images))
    for left_out in range(_FOLDS):
        kept = fold != left_out
        model, _ = _train(digits.images[kept], digits.given[kept], run.epochs, run.seed)
        losses[~kept] = _losses(model, digits.images[~kept], digits.given[~kept])
    return losses


def _disagreement(digits: NoisyDigits) -> Tensor:
    """Share of a sample's nearest other images, pixel by pixel, that have another label."""
    distances = torch.cdist(digits.images, digits.images).fill_diagonal_(torch.inf)
    nearest = distances.topk(_NEIGHBOURS, largest=False).indices
    return (digits.given[nearest] != digits.given[:, None]).float().mean(1)


def _train(
    images: Tensor, labels: Tensor, epochs: int, seed: int, ledger: Path | None = None
) -> tuple[nn.Module, Tensor]:
    """Train, recorded if ``ledger`` is given; return the model and every sample's mean loss over its visits."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(SIDE * SIDE, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    optimizer = gk.AdamW(model.parameters(), lr=_LEARNING_RATE, max_norm=_MAX_NORM)
    order = torch.Generator().manual_seed(seed)
    sums = torch.zeros(len(images))
    with nullcontext() if ledger is None else gk.rollback.record(model, optimizer, ledger) as recorder:
        for _ in range(epochs):
            for ids in torch.randperm(len(images), generator=order).split(_BATCH_SIZE):
                with nullcontext() if recorder is None else recorder.batch(ids):
                    losses = nn.functional.cross_entropy(model(images[ids]), labels[ids], reduction="none")
                    losses.mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                sums[ids] += losses.detach()
    return model, sums / epochs
