"""gradkern: everything between ``loss.backward()`` and the next forward pass.

Accumulate, clip, step and remember in as few passes over memory as physics allows, plus the plan that makes
backward fit the memory there is.
"""

from __future__ import annotations

from gradkern import checkpoint, clip, functional, optim, rollback
from gradkern.accumulate import GradAccumulator
from gradkern.clip import clip_grad_norm_, get_total_norm
from gradkern.errors import (
    BackendUnavailableError,
    BudgetExceededError,
    GradkernError,
    LedgerError,
    PlanInfeasibleError,
)
from gradkern.grad_scaler import GradScaler
from gradkern.gradient_release import GradientRelease
from gradkern.ops._registry import use_backend
from gradkern.optim import SGD, Adam, AdamW, Lion
from gradkern.step_event import ParamStep, StepEvent
from gradkern.token_normalizer import TokenNormalizer

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "BackendUnavailableError",
    "BudgetExceededError",
    "GradAccumulator",
    "GradScaler",
    "GradientRelease",
    "GradkernError",
    "LedgerError",
    "Lion",
    "ParamStep",
    "PlanInfeasibleError",
    "StepEvent",
    "TokenNormalizer",
    "checkpoint",
    "clip",
    "clip_grad_norm_",
    "functional",
    "get_total_norm",
    "optim",
    "rollback",
    "use_backend",
]
