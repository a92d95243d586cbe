"""What influence is to predict: the losses of models that were trained again without some samples, hundreds at once.

The linear datamodeling score (Park and others, "TRAK", 2023) of an estimator is the rank correlation, over subsets of
the training samples, of the loss that a model trained on the subset has at a test point with the sum of the scores of
the samples that were left out; the mean over test points. Retraining here is the recorded run itself, same start and
same order, with rows missing from its batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import gradkern as gk
from gradkern.rollback import Ledger, Replay

from .peers import data_folder

__all__ = [
    "SETTINGS",
    "Setting",
    "datamodeling_score",
    "kept_samples",
    "rank_correlation",
    "record_run",
    "retrained_losses",
]

SUBSETS = 200


@dataclass(frozen=True)
class Setting:
    """A run that is recorded and retrained.

    Attributes:
        make_model: Builds the model with torch's generator.
        inputs: Of the training samples.
        labels: Their classes.
        test_inputs: Of the test points.
        test_labels: Their classes.
        epochs: How often every sample is visited.
    """

    make_model: Callable[[], nn.Module]
    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    epochs: int = 10
    lr: float = 3e-3
    weight_decay: float = 0.01
    max_norm: float = 1.0
    batch_size: int = 50

    def model(self, seed: int) -> nn.Module:
        """As it starts."""
        torch.manual_seed(seed)
        return self.make_model()

    def batches(self, seed: int) -> list[Tensor]:
        """Rows of every step's batch."""
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(self.inputs), generator=generator) for _ in range(self.epochs)]
        return list(torch.cat(orders).split(self.batch_size))

    def fetch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A batch."""
        return self.inputs[rows], self.labels[rows]

    def make_optimizer(self, model: nn.Module) -> gk.AdamW:
        """As a run begins with it."""
        return gk.AdamW(model.parameters(), lr=self.lr, weight_decay=self.weight_decay, max_norm=self.max_norm)

    def replay(self) -> Replay:
        """What running it again takes."""
        return Replay(self.fetch, self.make_optimizer, nn.functional.cross_entropy)

    def queries(self) -> list[tuple[Tensor, Tensor]]:
        """Every test point as a batch of its own."""
        return list(zip(self.test_inputs.split(1), self.test_labels.split(1), strict=True))


def _table(name: str, skipped_rows: int = 0) -> tuple[Tensor, Tensor]:
    """A file in scikit-learn's wheel, read without its imports: all columns but the last, and the last, shuffled."""
    file = data_folder("sklearn") / "datasets" / "data" / name
    table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32, skiprows=skipped_rows))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    return table[:, :-1], table[:, -1].long()


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def digits_mlp() -> Setting:
    """1,000 of scikit-learn's digits, an MLP of 6,570 parameters."""
    inputs, labels = _table("digits.csv.gz")
    inputs = inputs / 16
    return Setting(_mlp, inputs[:1000], labels[:1000], inputs[1000:1100], labels[1000:1100])


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def digits_cnn() -> Setting:
    """The same digits, a convolution net of 3,818 parameters."""
    return replace(digits_mlp(), make_model=_cnn)


def _small_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 2))


def breast_cancer_mlp() -> Setting:
    """The Wisconsin breast cancer data: 30 measures of 569 tumours, an MLP of 1,554 parameters."""
    inputs, labels = _table("breast_cancer.csv", skipped_rows=1)
    inputs = (inputs - inputs[:469].mean(0)) / inputs[:469].std(0)
    return Setting(_small_mlp, inputs[:469], labels[:469], inputs[469:], labels[469:])


SETTINGS = {"digits, MLP": digits_mlp, "digits, CNN": digits_cnn, "breast cancer, MLP": breast_cancer_mlp}


def record_run(setting: Setting, seed: int, path: Path, **options: Any) -> tuple[nn.Module, Ledger]:
    """Train once, recorded with these options."""
    model = setting.model(seed)
    optimizer = setting.make_optimizer(model)
    with gk.rollback.record(model, optimizer, path, **options) as recorder:
        for rows in setting.batches(seed):
            inputs, labels = setting.fetch(rows)
            with recorder.batch(rows):
                nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, gk.rollback.open(path)


def retrained_losses(setting: Setting, seed: int, kept: Tensor) -> Tensor:
    """Losses at the test points of models trained on subsets.

    Args:
        setting: The run.
        seed: Of its start and its order.
        kept: Which samples each model is trained on, bool, shape ``(models, samples)``.

    Returns:
        Shape ``(models, tests)``.
    """
    model = setting.model(seed)
    params = {
        name: nn.Parameter(param.detach().expand(len(kept), *param.shape).clone())
        for name, param in model.named_parameters()
    }
    # Element by element, so that one optimizer steps them all.
    optimizer = torch.optim.AdamW(params.values(), lr=setting.lr, weight_decay=setting.weight_decay)

    def loss(params: dict[str, Tensor], inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        rows = nn.functional.cross_entropy(functional_call(model, params, inputs), labels, reduction="none")
        return (rows * weights).sum() / weights.sum().clamp_min(1)

    gradients_of = vmap(grad(loss), in_dims=(0, None, None, 0))
    for rows in setting.batches(seed):
        gradients = gradients_of(params, setting.inputs[rows], setting.labels[rows], kept[:, rows].float())
        norms = torch.stack([each.flatten(1).square().sum(1) for each in gradients.values()]).sum(0).sqrt()
        clip = (setting.max_norm / (norms + 1e-6)).clamp_max(1.0)
        for name, gradient in gradients.items():
            params[name].grad = gradient.detach() * clip.detach().reshape(-1, *[1] * (gradient.dim() - 1))
        optimizer.step()

    def test_losses(params: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(
            functional_call(model, params, setting.test_inputs), setting.test_labels, reduction="none"
        )

    with torch.no_grad():
        return vmap(test_losses)(params)


def kept_samples(samples: int, share: float, seed: int) -> Tensor:
    """Random subsets, all samples but a share: bool, shape ``(subsets, samples)``."""
    generator = torch.Generator().manual_seed(1000 * seed + round(1000 * share))
    order = torch.rand(SUBSETS, samples, generator=generator).argsort(dim=1)
    return order >= round(share * samples)


def datamodeling_score(scores: Tensor, kept: Tensor, losses: Tensor) -> float:
    """Mean over test points of the rank correlation of predicted and true losses.

    Args:
        scores: Of every sample for every test point, shape ``(tests, samples)``.
        kept: As in :func:`retrained_losses`.
        losses: What that returned.
    """
    predicted = (~kept).double() @ scores.t()
    return rank_correlation(predicted, losses)


def rank_correlation(left: Tensor, right: Tensor) -> float:
    """Spearman's, mean over columns."""
    return float(_correlation(_ranks(left), _ranks(right)).mean())


def _ranks(values: Tensor) -> Tensor:
    """Of every column."""
    return values.argsort(dim=0).argsort(dim=0).double()


def _correlation(left: Tensor, right: Tensor) -> Tensor:
    """Of every column."""
    left, right = left - left.mean(0), right - right.mean(0)
    return (left * right).sum(0) / (left.square().sum(0) * right.square().sum(0)).sqrt()
