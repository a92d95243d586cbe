"""The step event: what one optimizer step did, told to whoever wants to know.

This is the one protocol between optimizers and observers such as ``gradkern.rollback``; neither imports the
other. Every optimizer of gradkern whose update is linear in the gradient (given its preconditioner) fits it:

    M_t     = momentum * M_{t-1} + grad_weight * grad_multiplier * g_t
    theta_t = decay * theta_{t-1} - P_t * M_t

where ``g_t`` is the gradient accumulated since the last step and ``P_t = step_size / (root_scale * sqrt(v_t) + eps)``
is elementwise, or ``step_size`` alone where there is no second moment ``v_t``. For AdamW, ``momentum = beta1``,
``grad_weight = 1 - beta1``, ``decay = 1 - lr * weight_decay``, ``step_size = lr / (1 - beta1^t)`` and
``root_scale = 1 / sqrt(1 - beta2^t)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch.utils.hooks import RemovableHandle

__all__ = ["ParamStep", "StepEvent", "StepEventSource"]


class ParamStep(NamedTuple):
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
        step_size: Numerator of ``P_t``.
        second_moment: ``v_t``, of the shape of ``param``; None where ``P_t`` is ``step_size``. Valid only while the
            event is being handled: it is optimizer state that the next step changes.
        root_scale: Factor of its root.
        eps: Added to that.
    """

    param: torch.Tensor
    grad_multiplier: torch.Tensor
    decay: float
    momentum: float
    grad_weight: float
    lr: float
    step_size: float
    second_moment: torch.Tensor | None = None
    root_scale: float = 1.0
    eps: float = 0.0

    @torch.no_grad()
    def preconditioner(self) -> torch.Tensor:
        """``P_t``, computed afresh: fp32, shape and device of ``param``. Valid as :attr:`second_moment` is."""
        if self.second_moment is None:
            return torch.full_like(self.param, self.step_size, dtype=torch.float32)
        # Not torch.sqrt of fp32, which may run in MKL's vector library and be off by a unit in the last place.
        root = self.second_moment.double().sqrt().float()
        return (root * self.root_scale + self.eps).reciprocal() * self.step_size


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
