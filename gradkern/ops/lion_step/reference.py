"""The rule of Lion in eager tensor operations, one IEEE rounding each; Chen et al., arXiv 2302.06675, algorithm 2."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradkern.ops._step.rule import round_fp32

__all__ = ["lion_scalars", "lion_update"]


def lion_scalars(hyper: Sequence[float], grad_multiplier: float, step: int, variant: int) -> tuple[float, ...]:
    """Scalars of any step, in the order of ``csrc/rules/lion.h``."""
    lr, beta1, beta2, weight_decay, sign = hyper
    return tuple(map(round_fp32, (grad_multiplier * sign, 1.0 - lr * weight_decay, 1.0 - beta1, 1.0 - beta2, lr)))


def lion_update(
    param: torch.Tensor,
    grad: torch.Tensor,
    states: Sequence[torch.Tensor],
    scalars: tuple[float, ...],
    variant: int,
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The new parameter and exp_avg; a NaN in the average becomes one in the parameter."""
    grad_multiplier, decay, update_weight, state_weight, lr = scalars
    exp_avg = states[0]
    change = grad * grad_multiplier - exp_avg
    update = exp_avg + change * update_weight
    update = torch.where(update > 0, 1.0, torch.where(update < 0, -1.0, update))
    return param * decay - update * lr, (exp_avg + change * state_weight,)
