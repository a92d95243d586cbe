"""Specification of ``adamw_step_``."""

from __future__ import annotations

from gradkern.ops._step.rule import State, StepRule
from gradkern.ops._step.spec import register_step
from gradkern.ops.adamw_step.reference import adamw_scalars, adamw_update

__all__ = ["STEP"]

STEP = register_step(
    StepRule(
        name="adamw_step_",
        states=(
            State("exp_avg", signed=True),
            State("exp_avg_sq", signed=False),
            State("max_exp_avg_sq", signed=False),
        ),
        hyper=("lr", "beta1", "beta2", "eps", "weight_decay", "sign"),
        state_counts=(2, 3, 2, 3),
        scalars=adamw_scalars,
        update=adamw_update,
        sample_hyper=(1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0),
        triton="gradkern.ops.adamw_step.triton:adamw_rule",
    )
)
