"""The rule of SGD in eager tensor operations, one IEEE rounding each; semantics of ``torch/optim/sgd.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradkern.ops._step.rule import round_fp32

__all__ = ["MOMENTUM", "NESTEROV", "sgd_scalars", "sgd_update"]

MOMENTUM, NESTEROV = 1, 2
"""Bits of the variant."""


def sgd_scalars(hyper: Sequence[float], grad_multiplier: float, step: int, variant: int) -> tuple[float, ...]:
    """Scalars of step number ``step``, in the order of ``csrc/rules/sgd.h``; the first step has no dampening."""
    lr, momentum, dampening, weight_decay, sign = hyper
    first = step <= 1
    old_weight, grad_weight = (0.0, 1.0) if first else (momentum, 1.0 - dampening)
    return tuple(map(round_fp32, (grad_multiplier * sign, weight_decay, old_weight, grad_weight, momentum, lr)))


def sgd_update(
    param: torch.Tensor,
    grad: torch.Tensor,
    states: Sequence[torch.Tensor],
    scalars: tuple[float, ...],
    variant: int,
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The new parameter and momentum_buffer."""
    grad_multiplier, weight_decay, old_weight, grad_weight, momentum, lr = scalars
    g = grad * grad_multiplier + param * weight_decay
    if variant & MOMENTUM:
        buffer = states[0] * old_weight + g * grad_weight
        g = g + buffer * momentum if variant & NESTEROV else buffer
        states = (buffer,)
    return param - g * lr, states
