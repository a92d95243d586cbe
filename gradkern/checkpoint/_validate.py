"""Whether an applied plan holds on a batch, and a new one where it does not."""

from __future__ import annotations

import glob
from dataclasses import dataclass, replace

import torch
from torch import nn

from gradkern.checkpoint._here import measure_here
from gradkern.checkpoint._job import HoldsBytes, Job
from gradkern.checkpoint._plan import Plan
from gradkern.checkpoint._planner import plan
from gradkern.checkpoint._unit_plan import KEEP
from gradkern.checkpoint._units import WHOLE_MODEL
from gradkern.loss import Batch, LossFn

__all__ = ["Validation", "validate"]


@dataclass(frozen=True)
class Validation:
    """What a step under a plan needed and gave.

    Attributes:
        predicted_peak_bytes: What the plan said.
        measured_peak_bytes: What was measured.
        same_gradients: Whether it gave the gradients of the model without a plan, bit for bit; where those differ from
            run to run nothing can be told, and this is True.
        plan: The plan that is applied now: the one that was validated where all was well, else a new one.
    """

    predicted_peak_bytes: int
    measured_peak_bytes: int
    same_gradients: bool
    plan: Plan

    @property
    def held(self) -> bool:
        """Whether the budget was held."""
        return self.measured_peak_bytes <= self.plan.budget_bytes


def validate(
    made: Plan,
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn | None,
    *,
    optimizer: torch.optim.Optimizer | None,
    accumulate: int,
    recorder: HoldsBytes | None,
) -> Validation:
    """See ``Plan.validate``."""
    if not made.is_applied(model):
        raise RuntimeError("validate needs the plan applied to the model; call plan.apply(model) first")
    names = [unit.name for unit in made.units[1:-1]]
    job = Job(model, batch, loss_fn, made.budget_bytes, optimizer, accumulate, recorder, names, _untold)
    measured, bits = measure_here(job)
    made.remove(model)
    try:
        # A plan turns key/value caches off; so does one that recomputes nothing.
        nothing = replace(
            made, segments=(), offloads=(), units=tuple(replace(unit, option=KEEP) for unit in made.units)
        )
        nothing.apply(model)
        try:
            plain = [measure_here(job)[1] for _ in range(2)]
        finally:
            nothing.remove(model)
        same_gradients = bits == plain[0] or plain[0] != plain[1]
        if measured <= made.budget_bytes and same_gradients:
            made.apply(model)
            return Validation(made.predicted_peak_bytes, measured, same_gradients, made)
        better = plan(
            model,
            batch,
            loss_fn,
            budget=made.budget_bytes,
            optimizer=optimizer,
            accumulate=accumulate,
            recorder=recorder,
            units=() if names == [WHOLE_MODEL] else [glob.escape(name) for name in names],
        )
    except BaseException:
        if not made.is_applied(model):
            made.apply(model)
        raise
    better.apply(model)
    return Validation(made.predicted_peak_bytes, measured, same_gradients, better)


def _untold(text: str) -> None:
    """Nobody asked for progress."""
