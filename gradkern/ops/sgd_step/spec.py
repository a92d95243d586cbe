"""Specification of ``sgd_step_``."""

from __future__ import annotations

from gradkern.ops._step.rule import State, StepRule
from gradkern.ops._step.spec import register_step
from gradkern.ops.sgd_step.reference import sgd_scalars, sgd_update

__all__ = ["STEP"]

STEP = register_step(
    StepRule(
        name="sgd_step_",
        states=(State("momentum_buffer", signed=True),),
        hyper=("lr", "momentum", "dampening", "weight_decay", "sign"),
        state_counts=(0, 1, 0, 1),
        scalars=sgd_scalars,
        update=sgd_update,
        sample_hyper=(1e-2, 0.9, 0.1, 0.1, 1.0),
        triton="gradkern.ops.sgd_step.triton:sgd_rule",
    )
)
