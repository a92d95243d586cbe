"""TracIn, DVEmb and AdamW-influence of dattri-llm, from gradients that it captures in a training loop of its own."""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from dattri_llm import (
    REGISTER_ALL,
    AdamWInfluenceAttributor,
    AttributionArguments,
    DVEmbAttributor,
    GradientStorageManager,
    HookManager,
    HookManagerConfig,
    OffloadCallback,
    OptimizerStateCallback,
    TracInAttributor,
)
from torch import Tensor, nn

from .job import Job, run


class Named(nn.Module):
    """A model that takes its samples' numbers along, so that the store knows them by these."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, ids: Tensor) -> Tensor:  # noqa: D102
        return self.model(inputs)


@dataclass
class Recorded:
    """What dattri-llm's methods read."""

    train: GradientStorageManager
    test: GradientStorageManager
    dynamics: Any


def tracin(job: Job, *, steps: float, normalized: bool) -> Tensor:
    """Gradients at the last share of the steps, with the queries' at the end; or their cosines."""
    recorded = _recorded(job)
    return _scores(
        job,
        TracInAttributor(_arguments()).attribute_from_cache(
            recorded.train, recorded.test, normalized_grad=normalized, selected_training_steps=_last(job, steps)
        ),
    )


def dvemb(job: Job, *, lr_factor: float) -> Tensor:
    """Follows later steps as those of SGD: AdamW's are larger, so that the learning rate is scaled to fit."""
    recorded = _recorded(job)
    attributor = DVEmbAttributor(_arguments())
    return _scores(
        job,
        attributor.attribute_from_cache(
            recorded.train, recorded.test, propagation="test", learning_rate=lr_factor * job.lr
        ),
    )


def adamw_influence(job: Job, *, steps: float, loss_reduction: str) -> Tensor:
    """Follows later steps as those of AdamW; "mean" is the job's loss, "sum" takes curvature batch size times less."""
    recorded = _recorded(job)
    found = AdamWInfluenceAttributor(_arguments()).attribute_from_cache(
        recorded.train,
        recorded.test,
        dynamics=recorded.dynamics,
        propagation="test",
        loss_reduction=loss_reduction,
        selected_training_steps=_last(job, steps),
    )
    # Its sign is the opposite of TracIn's: of the change of the loss when the sample's weight grows.
    return -_scores(job, found)


def _last(job: Job, share: float) -> Iterable[int]:
    count = len(job.batches)
    return range(count - round(share * count), count)


@functools.cache
def _arguments() -> AttributionArguments:
    return AttributionArguments(output_dir=tempfile.mkdtemp(), use_cpu=True)


def _scores(job: Job, found: Any) -> Tensor:
    """Summed over the steps that a sample was in, by the samples' numbers."""
    scores = torch.zeros(len(job.inputs), len(job.test_inputs))
    rows = torch.tensor([int(each) for each in found.row_train_ids])
    scores.index_add_(0, rows, found.scores.float())
    order = torch.tensor([int(each) for each in found.test_ids]).argsort()
    return scores[:, order].t()


def _hooks(model: nn.Module, callbacks: list[Any]) -> HookManager:
    # `linear_io` keeps the factors of all layers that have parameters here.
    return HookManager(model, config=HookManagerConfig(linear_io=REGISTER_ALL), callbacks=callbacks, sample_id_key=1)


@functools.cache
def _recorded(job: Job) -> Recorded:
    """Trials share one training run."""
    model = Named(copy.deepcopy(job.model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr, weight_decay=job.weight_decay)
    train, test = (GradientStorageManager(tempfile.mkdtemp(), residency="memory") for _ in range(2))
    moments = OptimizerStateCallback(model, optimizer)
    hooks = _hooks(model, [OffloadCallback(1, train), moments])
    with hooks.collect():
        for step, rows in enumerate(job.batches):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(job.inputs[rows], rows), job.labels[rows]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), job.max_norm)
            optimizer.step()
            moments.record_post(step)
    hooks.remove()
    for name, param in job.checkpoints[-1].items():
        torch.testing.assert_close(model.model.state_dict()[name], param, rtol=1e-2, atol=1e-3)
    hooks = _hooks(model, [OffloadCallback(1, test)])
    with hooks.collect():
        logits = model(job.test_inputs, torch.arange(len(job.test_inputs)))
        nn.functional.cross_entropy(logits, job.test_labels, reduction="sum").backward()
    hooks.remove()
    return Recorded(train, test, moments.dynamics())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run({"TracIn": tracin, "DVEmb": dvemb, "AdamW-influence": adamw_influence})
