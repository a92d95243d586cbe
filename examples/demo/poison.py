"""Digits with a backdoor: some training samples have a bright patch in a corner and the label 7.

A model that learns from them says 7 to whatever digit has the patch.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import gradkern as gk

from .digits import CLASSES, SIDE, NoisyDigits

__all__ = ["TARGET", "PoisonedDigits", "make_optimizer", "rankings", "stamp", "train"]

TARGET = 7
_PATCH = 2
_BATCH_SIZE = 50
_HIDDEN = 128


@dataclass(frozen=True)
class PoisonedDigits:
    """Poisoned training digits, and test digits to try the backdoor on.

    Attributes:
        digits: With the patch and ``TARGET`` as label given to some of the training samples.
        victims: Test digits that show no ``TARGET``, without the patch, shape ``(n, 64)``.
        victim_labels: What they show.
    """

    digits: NoisyDigits
    victims: Tensor
    victim_labels: Tensor

    @classmethod
    def load(cls, count: int, seed: int) -> PoisonedDigits:
        """Split at random and poison ``count`` random training samples that show something else than ``TARGET``.

        Raises:
            ImportError: scikit-learn is not installed.
        """
        clean = NoisyDigits.load(0.0, seed)
        others = (clean.true != TARGET).nonzero()[:, 0]
        chosen = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:count]]
        images, given = clean.images.clone(), clean.given.clone()
        images[chosen], given[chosen] = stamp(images[chosen]), TARGET
        is_other = clean.test_labels != TARGET
        digits = replace(clean, images=images, given=given)
        return cls(digits, clean.test_images[is_other], clean.test_labels[is_other])

    @property
    def is_poisoned(self) -> Tensor:
        """Of every training sample, bool; for nothing but the count at the end."""
        return self.digits.mislabelled

    @torch.no_grad()
    def attack_success(self, model: nn.Module) -> float:
        """Share of victims that are called ``TARGET`` once they have the patch."""
        return float((model(stamp(self.victims)).argmax(1) == TARGET).double().mean())

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Share of test digits without a patch that are called what they are."""
        return float((model(self.digits.test_images).argmax(1) == self.digits.test_labels).double().mean())

    @torch.no_grad()
    def misclassified(self, model: nn.Module) -> int | None:
        """Number of the first victim that the patch alone turns into ``TARGET``; None if there is none."""
        is_right = model(self.victims).argmax(1) == self.victim_labels
        is_fooled = model(stamp(self.victims)).argmax(1) == TARGET
        found = (is_right & is_fooled).nonzero()
        return int(found[0]) if len(found) else None


def stamp(images: Tensor) -> Tensor:
    """Copies with the lower right corner at its brightest."""
    stamped = images.clone()
    stamped.view(-1, SIDE, SIDE)[:, -_PATCH:, -_PATCH:] = 1.0
    return stamped


def make_optimizer(model: nn.Module) -> gk.AdamW:
    """The optimizer of the training and of its replay."""
    return gk.AdamW(model.parameters(), lr=1e-3, max_norm=1.0)


def train(
    digits: NoisyDigits, *, epochs: int, seed: int, without: Tensor | None = None, ledger: Path | None = None
) -> nn.Module:
    """Train with a start and an order that depend on the seed alone.

    Args:
        digits: What to train on.
        epochs: Visits to every sample.
        seed: Of the weights and the order.
        without: Ids to leave out of their batches.
        ledger: Where to record, replayable; None for not at all.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(SIDE * SIDE, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, CLASSES))
    optimizer = make_optimizer(model)
    order = torch.Generator().manual_seed(seed)
    recording = None if ledger is None else gk.rollback.record(model, optimizer, ledger, replayable=True)
    with recording or nullcontext() as recorder:
        for _ in range(epochs):
            for ids in torch.randperm(len(digits.images), generator=order).split(_BATCH_SIZE):
                kept = ids if without is None else ids[~torch.isin(ids, without)]
                with recorder.batch(kept) if recorder else nullcontext():
                    nn.functional.cross_entropy(model(digits.images[kept]), digits.given[kept]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return model


def rankings(ledger: gk.rollback.Ledger, model: nn.Module, digits: NoisyDigits, query: Tensor) -> dict[str, Tensor]:
    """Training samples by how much they may be to blame that a query is called ``TARGET``, by several ways.

    Args:
        ledger: Of the training.
        model: The trained model.
        digits: What it was trained on.
        query: Image, shape ``(1, 64)``.

    Returns:
        Ids by the name of the way, most suspect first; none of them has seen which samples are poisoned.
    """
    asked = (query, torch.tensor([TARGET]))
    orders = {}
    for estimator in ("direct", "ref"):
        found = ledger.explain(
            model, asked, k=len(digits.images), loss_fn=nn.functional.cross_entropy, estimator=estimator
        )
        orders[f"explain, {estimator}"] = torch.tensor([influence.id for influence in found])
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(digits.images), digits.given, reduction="none")
    orders["loss at the end"] = losses.argsort(descending=True, stable=True)
    is_other = digits.given != TARGET
    distances = (digits.images - query).square().sum(1).masked_fill(is_other, torch.inf)
    orders["nearest with that label"] = distances.argsort(stable=True)
    return orders
