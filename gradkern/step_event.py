"""The step event: what one optimizer step did, told to whoever wants to know.

This is the one protocol between optimizers and observers such as ``gradkern.rollback``; neither imports the
other. Every optimizer of gradkern whose update is linear in the gradient (given its preconditioner) fits it:

    M_t     = momentum * M_{t-1} + grad_weight * grad_multiplier * g_t
    theta_t = decay * theta_{t-1} - P_t * M_t

where ``g_t`` is the gradient accumulated since the last step and ``P_t`` is elementwise. For AdamW,
``momentum = beta1``, ``grad_weight = 1 - beta1``, ``decay = 1 - lr * weight_decay`` and
``P_t = lr / ((1 - beta1^t) * (sqrt(v_t / (1 - beta2^t)) + eps))``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils.hooks import RemovableHandle

__all__ = ["ParamStep", "StepEvent", "StepEventSource"]


@dataclass(frozen=True, slots=True)
class ParamStep:
    """What a step did to one parameter.

    All factors are the values really applied: those that the update computes with in fp32 are fp32 values (held
    exactly by the floats here), not the fp64 hyper-parameters they came from. Observers add up thousands of steps.

    Attributes:
        param: The parameter, already updated.
        grad_multiplier: 0-dim fp32 tensor ``c_t``; clip coefficient times inverse loss scale, applied to the
            accumulated gradient. Reading it on a GPU synchronises.
        decay: Factor that multiplied the parameter, ``1 - lr * weight_decay``.
        momentum: Factor that multiplied the old momentum (``beta1``).
        grad_weight: Factor of the new gradient in the momentum (``1 - beta1``).
        lr: Learning rate used.
        preconditioner: Computes ``P_t`` afresh, shape and device of ``param``, fp32. Valid only while the event
            is being handled: it reads optimizer state that the next step changes.
    """

    param: torch.Tensor
    grad_multiplier: torch.Tensor
    decay: float
    momentum: float
    grad_weight: float
    lr: float
    preconditioner: Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One finished optimizer step.

    Attributes:
        params: One entry per parameter that had a gradient, in group order.
        skipped: 0-dim bool tensor, True when the step was skipped on the device (``found_inf``); ``None`` when the
            optimizer cannot skip. A skipped step left parameters and state as they were.
    """

    params: tuple[ParamStep, ...]
    skipped: torch.Tensor | None = None


class StepEventSource(Protocol):
    """An optimizer that reports its steps."""

    def register_step_event_hook(self, hook: Callable[[StepEvent], None]) -> RemovableHandle:
        """Call ``hook(event)`` after every step; the handle's ``remove()`` ends it."""
        ...
