"""What a peer is given and what it gives back: a file with a training run, and an array of scores for every trial.

The file is written by ``bench.attribution`` and read by the peers' modules, which other interpreters run: torch and
NumPy are all that both sides have in common, so that this module imports nothing else.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["Job", "Trial", "load", "reason_file", "run", "save", "scores_file"]

State = dict[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """A method of a peer and the hyper-parameters to try it with."""

    method: str
    options: Mapping[str, Any]


@dataclass(eq=False)
class Job:
    """A run: training by ``torch.optim.AdamW`` on mean cross-entropy, gradients clipped by their joint norm.

    Attributes:
        model: As it starts.
        checkpoints: State dicts, the last one of the trained model, at equal distances before that.
        ensemble: State dicts of models that were trained in the same way from other seeds.
        inputs: Of the training samples.
        labels: Their classes.
        test_inputs: Of the queries.
        test_labels: Their classes.
        batches: Rows of every step's batch.
        lr: Constant.
        weight_decay: Decoupled.
        max_norm: Of the gradients.
        trials: What to score.
    """

    model: nn.Module
    checkpoints: list[State]
    ensemble: list[State]
    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    batches: list[Tensor]
    lr: float
    weight_decay: float
    max_norm: float
    trials: Sequence[Trial]

    def train_set(self) -> TensorDataset:
        """Pairs of input and class."""
        return TensorDataset(self.inputs, self.labels)

    def test_set(self) -> TensorDataset:
        """Pairs of input and class."""
        return TensorDataset(self.test_inputs, self.test_labels)

    def train_loader(self) -> DataLoader[tuple[Tensor, ...]]:
        """All samples as one batch, in order."""
        return DataLoader(self.train_set(), batch_size=len(self.inputs))

    def test_loader(self) -> DataLoader[tuple[Tensor, ...]]:
        """All queries as one batch, in order."""
        return DataLoader(self.test_set(), batch_size=len(self.test_inputs))


# Of the influence of every sample on every query's loss, shape (queries, samples).
Method = Callable[..., Tensor]


def scores_file(folder: Path, trial: int) -> Path:
    """Where a trial's scores go, shape ``(queries, samples)``; positive: leaving the sample out raises the loss."""
    return folder / f"{trial}.npy"


def reason_file(folder: Path, trial: int) -> Path:
    """Where it says why a trial has no scores."""
    return folder / f"{trial}.txt"


def save(job: Job, path: Path) -> None:
    """Write a job."""
    fields = {name: getattr(job, name) for name in Job.__dataclass_fields__ if name != "trials"}
    torch.save({**fields, "trials": [asdict(trial) for trial in job.trials]}, path)


def load(path: Path) -> Job:
    """Read a job; it holds a pickled model, so it must come from ``save`` on this machine."""
    fields = torch.load(path, weights_only=False)
    return Job(**{**fields, "trials": [Trial(**each) for each in fields["trials"]]})


def run(methods: Mapping[str, Method]) -> None:
    """The main program of a peer: ``python -m bench.attribution_peers.PEER JOB FOLDER``.

    Every trial is written as soon as it is scored; one that raises leaves its reason and does not end the others.

    Args:
        methods: By name, functions of the job and a trial's options.
    """
    path, folder = map(Path, sys.argv[1:])
    job = load(path)
    for i, trial in enumerate(job.trials):
        _score(job, trial, methods, scores_file(folder, i), reason_file(folder, i))


def _score(job: Job, trial: Trial, methods: Mapping[str, Method], scores: Path, reason: Path) -> None:
    try:
        np.save(scores, methods[trial.method](job, **trial.options).detach().numpy())
    except Exception as error:  # a foreign package may fail in any way
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        reason.write_text(f"{type(error).__name__}: {lines[0]}")
