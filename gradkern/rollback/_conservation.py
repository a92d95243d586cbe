"""The conservation law: what all samples did to a parameter adds up to what training did to it.

Unrolling ``theta_t = decay_t * theta_{t-1} - P_t * M_t`` with the momentum ``M_t`` split over samples gives
``theta_T = (prod decay_t) * theta_0 + sum_i D_i``. :mod:`gradkern.rollback._shadows` carries ``D = sum_i D_i`` through
the same recursion, fed only with the gradients that were captured per sample. If any was missed, counted twice or
came from elsewhere, or the reported preconditioner is not the one used, ``D`` parts from the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gradkern.rollback._layout import ParameterInfo

__all__ = ["Balance", "balance"]

# A step rounds the parameter twice, by at most half a unit in the last place of fp32: after decay and after update.
_ROUNDING_PER_STEP = 2 * 2.0**-24
# Over one small parameter errors do not average out.
_PARAMETER_SLACK = 10.0


@dataclass(frozen=True, slots=True)
class Balance:
    """How well the law holds.

    Attributes:
        error: ``‖D + decayed theta_0 - theta_T‖ / ‖theta_T - decayed theta_0‖`` over all owned parameters; 0
            when nothing moved and nothing was recorded, infinite when only one of the two.
        bound: The largest error that fp32 arithmetic explains after so many steps: ``max(1e-5, 2e-8 * steps)``.
        worst_parameter: Name of the parameter that uses up most of its allowance.
        worst_ratio: Its error divided by its allowance: ten times the bound times its movement, plus what rounding the
            parameter itself to fp32 at every step can add, plus, of a vector, what rounding the sums that its
            gradients are can. Above 1, this parameter breaks the law.
        unowned_share: ``‖movement of the unowned parameters‖ / ‖movement of all‖``.
    """

    error: float
    bound: float
    worst_parameter: str
    worst_ratio: float
    unowned_share: float


def balance(
    infos: Sequence[ParameterInfo],
    initial: Mapping[str, torch.Tensor],
    deltas: Mapping[str, torch.Tensor],
    decays: Sequence[float],
    roundings: Sequence[float],
    final: Sequence[torch.Tensor],
    steps: int,
) -> Balance:
    """Compare the recorded change with the real one, in fp64.

    Args:
        infos: The trained parameters.
        initial: ``theta_0`` by name.
        deltas: ``D`` by name, for the owned ones.
        decays: Product of all decays of each parameter.
        roundings: See :class:`~gradkern.rollback._shadows.Shadows`.
        final: ``theta_T`` in the order of ``infos``.
        steps: Number of steps, for the bound.
    """
    bound = max(1e-5, 2e-8 * steps)
    error_sq = owned_sq = unowned_sq = 0.0
    worst, worst_ratio = "", 0.0
    for info, decay, summed, parameter in zip(infos, decays, roundings, final, strict=True):
        now = parameter.detach().cpu().double()
        movement = now - initial[info.name].double() * decay
        moved = _norm(movement)
        if not info.owned:
            unowned_sq += moved**2
            continue
        error = _norm(deltas[info.name].double() - movement)
        rounding = _ROUNDING_PER_STEP * steps * max(_norm(now), _norm(initial[info.name].double()))
        allowance = _PARAMETER_SLACK * bound * moved + rounding + summed
        ratio = _ratio(error, allowance)
        if ratio > worst_ratio:
            worst, worst_ratio = info.name, ratio
        error_sq += error**2
        owned_sq += moved**2
    total = owned_sq + unowned_sq
    return Balance(
        error=_ratio(math.sqrt(error_sq), math.sqrt(owned_sq)),
        bound=bound,
        worst_parameter=worst,
        worst_ratio=worst_ratio,
        unowned_share=math.sqrt(unowned_sq / total) if total else 0.0,
    )


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _ratio(error: float, scale: float) -> float:
    """``error / scale``; infinite instead of undefined, so that a NaN never passes a comparison."""
    if math.isnan(error) or math.isnan(scale) or (error and not scale):
        return math.inf
    return error / scale if scale else 0.0
