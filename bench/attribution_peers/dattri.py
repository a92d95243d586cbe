"""TracIn, TRAK and influence functions of dattri."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import torch
from dattri.algorithm import IFAttributorCG, TracInAttributor, TRAKAttributor
from dattri.task import AttributionTask
from torch import Tensor, nn
from torch.func import functional_call

from .job import Job, State, run

# Half as many numbers as digits, and dattri's default.
PROJECTED = 512

# All of them, every time: dattri keeps what one attributor was given as the default of the next.
PROJECTOR: dict[str, Any] = {"proj_max_batch_size": 32, "proj_seed": 0, "device": "cpu"}


def tracin(job: Job, *, checkpoints: list[int], normalized: bool) -> Tensor:
    """Products of gradients at checkpoints, or their cosines; without dattri's default projection to 512 numbers."""
    attributor = TracInAttributor(
        _task(job, [job.checkpoints[i] for i in checkpoints]),
        weight_list=torch.full((len(checkpoints),), job.lr),
        normalized_grad=normalized,
        projector_kwargs={**PROJECTOR, "proj_type": "identity", "proj_dim": PROJECTED},
    )
    with _quiet():
        return attributor.attribute(job.train_loader(), job.test_loader()).t()


def trak(job: Job, *, states: str, count: int, regularization: float) -> Tensor:
    """``states`` is "checkpoints" of the run, the last ``count`` of them, or the "ensemble" from other seeds."""
    model = job.model

    def margin(params: State, sample: tuple[Tensor, Tensor]) -> Tensor:
        logp = -_loss(model, params, sample)
        return logp - torch.log(-torch.expm1(logp))

    def probability(params: State, sample: tuple[Tensor, Tensor]) -> Tensor:
        return torch.exp(-_loss(model, params, sample))

    chosen = (job.checkpoints if states == "checkpoints" else job.ensemble)[-count:]
    attributor = TRAKAttributor(
        # Of margins on both sides, as its paper and dattri's own benchmark have it.
        AttributionTask(loss_func=margin, model=copy.deepcopy(model), checkpoints=chosen),
        correct_probability_func=probability,
        projector_kwargs={**PROJECTOR, "proj_type": "normal", "proj_dim": PROJECTED},
        regularization=regularization,
    )
    with _quiet():
        attributor.cache(job.train_loader())
        return attributor.attribute(job.test_loader()).t()


def conjugate_gradients(job: Job, *, regularization: float, iterations: int) -> Tensor:
    """Influence functions with the true Hessian matrix of all samples."""
    attributor = IFAttributorCG(_task(job, [job.checkpoints[-1]]), max_iter=iterations, regularization=regularization)
    with _quiet():
        attributor.cache(job.train_loader())
        return attributor.attribute(job.train_loader(), job.test_loader()).t()


def _task(job: Job, checkpoints: list[State]) -> AttributionTask:
    model = copy.deepcopy(job.model)

    def loss(params: State, samples: tuple[Tensor, Tensor]) -> Tensor:
        return _loss(model, params, samples)

    return AttributionTask(loss_func=loss, model=model, checkpoints=checkpoints)


def _loss(model: nn.Module, params: State, samples: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = samples
    if labels.dim() == 0:  # under dattri's vmap
        inputs, labels = inputs.unsqueeze(0), labels.unsqueeze(0)
    return nn.functional.cross_entropy(functional_call(model, params, inputs), labels)


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """Without progress bars."""
    return contextlib.redirect_stderr(io.StringIO())


if __name__ == "__main__":
    torch.manual_seed(0)
    run({"TracIn": tracin, "TRAK": trak, "IF-CG": conjugate_gradients})
