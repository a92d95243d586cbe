"""TracIn of captum: products of gradients at checkpoints, weighted by the learning rate, summed."""

from __future__ import annotations

import warnings

import torch
from captum.influence import TracInCP, TracInCPFast
from torch import Tensor, nn

from .job import Job, State, run


def tracin(job: Job, *, checkpoints: list[int]) -> Tensor:
    """All parameters, as products of per-sample gradients."""
    # Per-sample gradients by captum's own hooks: mean losses would have to be scaled back by it.
    found = TracInCP(
        job.model,
        job.train_set(),
        [job.checkpoints[i] for i in checkpoints],
        _loader(job),
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=len(job.inputs),
        sample_wise_grads_per_batch=True,
    )
    return found.influence((job.test_inputs, job.test_labels))


def tracin_fast(job: Job, *, checkpoints: list[int]) -> Tensor:
    """The last layer only."""
    found = TracInCPFast(
        job.model,
        list(job.model.children())[-1],
        job.train_set(),
        [job.checkpoints[i] for i in checkpoints],
        _loader(job),
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=len(job.inputs),
    )
    return found.influence((job.test_inputs, job.test_labels))


def _loader(job: Job):  # noqa: ANN202  (what captum calls with a model and a checkpoint)
    def load_state(model: nn.Module, state: State) -> float:
        model.load_state_dict(state)
        return job.lr

    return load_state


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    run({"TracInCP": tracin, "TracInCPFast": tracin_fast})
