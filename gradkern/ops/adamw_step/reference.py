"""The rule of AdamW and Adam in eager tensor operations, one IEEE rounding each.

Decoupled weight decay: Loshchilov & Hutter, arXiv 1711.05101, algorithm 2; coupled: Kingma & Ba, arXiv 1412.6980,
algorithm 1, with the decay added to the gradient. ``add(alpha=)``, ``lerp``, ``addcmul`` and division by a Python
scalar round differently between code paths of torch and are not used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gradkern.ops._step.reference import sqrt_fp32
from gradkern.ops._step.rule import round_fp32
from gradkern.ops.step_scalars.reference import power

__all__ = ["AMSGRAD", "COUPLED", "adamw_scalars", "adamw_update"]

AMSGRAD, COUPLED = 1, 2
"""Bits of the variant."""


def adamw_scalars(hyper: Sequence[float], grad_multiplier: float, step: int, variant: int) -> tuple[float, ...]:
    """Scalars of step number ``step`` (1 for the first), in the order of ``csrc/rules/adamw.h``."""
    lr, beta1, beta2, eps, weight_decay, sign = hyper
    return tuple(
        map(
            round_fp32,
            (
                grad_multiplier * sign,
                weight_decay if variant & COUPLED else 1.0 - lr * weight_decay,
                1.0 - beta1,
                beta2,
                1.0 - beta2,
                1.0 / math.sqrt(1.0 - power(beta2, step)),
                eps,
                lr / (1.0 - power(beta1, step)),
            ),
        )
    )


def adamw_update(
    param: torch.Tensor,
    grad: torch.Tensor,
    states: Sequence[torch.Tensor],
    scalars: tuple[float, ...],
    variant: int,
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The new parameter and (exp_avg, exp_avg_sq, max_exp_avg_sq)."""
    grad_multiplier, decay, grad_weight, beta2, sq_weight, inv_bias2_sqrt, eps, step_size = scalars
    g = grad * grad_multiplier
    if variant & COUPLED:
        g = g + param * decay
    else:
        param = param * decay
    exp_avg, exp_avg_sq, *largest = states
    exp_avg = exp_avg + (g - exp_avg) * grad_weight
    exp_avg_sq = exp_avg_sq * beta2 + (g * g) * sq_weight
    second_moment = exp_avg_sq
    if variant & AMSGRAD:
        second_moment = torch.maximum(largest[0], exp_avg_sq)
        largest = [second_moment]
    denom = sqrt_fp32(second_moment) * inv_bias2_sqrt + eps
    return param - (exp_avg / denom) * step_size, (exp_avg, exp_avg_sq, *largest)
