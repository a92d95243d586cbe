"""Inputs of ``adamw_step_`` for tests and benchmarks."""

from __future__ import annotations

from functools import partial

from gradkern.ops._step.samples import step_samples
from gradkern.ops.adamw_step.spec import STEP

__all__ = ["samples"]

samples = partial(step_samples, STEP.rule)
