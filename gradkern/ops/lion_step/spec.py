"""Specification of ``lion_step_``."""

from __future__ import annotations

from gradkern.ops._step.rule import State, StepRule
from gradkern.ops._step.spec import register_step
from gradkern.ops.lion_step.reference import lion_scalars, lion_update

__all__ = ["STEP"]

STEP = register_step(
    StepRule(
        name="lion_step_",
        states=(State("exp_avg", signed=True),),
        hyper=("lr", "beta1", "beta2", "weight_decay", "sign"),
        state_counts=(1,),
        scalars=lion_scalars,
        update=lion_update,
        sample_hyper=(1e-3, 0.9, 0.99, 0.1, 1.0),
        triton="gradkern.ops.lion_step.triton:lion_rule",
    )
)
