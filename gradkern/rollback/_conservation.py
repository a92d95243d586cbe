"""The conservation law: what all samples did to a parameter adds up to what training did to it.

Unrolling ``theta_t = decay_t * theta_{t-1} - P_t * M_t`` with the momentum ``M_t`` split over samples gives
``theta_T = (prod decay_t) * theta_0 + sum_i D_i``. :class:`Shadows` carries ``D = sum_i D_i`` through the
same recursion, fed only with the gradients that were captured per sample. If any was missed, counted twice or
came from elsewhere, or the reported preconditioner is not the one used, ``D`` parts from the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradkern.rollback._layout import ParameterInfo
from gradkern.step_event import ParamStep

__all__ = ["Balance", "Shadows", "balance"]

# A step rounds the parameter twice, by at most half a unit in the last place of fp32: after decay and after update.
_ROUNDING_PER_STEP = 2 * 2.0**-24
# Over one small parameter errors do not average out.
_PARAMETER_SLACK = 10.0
# The gradient of a bias is a sum over all tokens. Where that nearly cancels, what two orders of summing differ by goes
# by what the other elements' sums are like, and Adam enlarges it along with what is left. Partial sums of n terms are
# like the sum, and their n roundings add up at random to some sqrt(n / 3): of thousands of tokens one by one, so many.
_SUM_ROUNDING = 32 * 2.0**-24


class Shadows:
    """Exact sums over samples for every owned parameter: three fp32 tensors of its shape.

    Args:
        parameters: The trained parameters.
        infos: Their descriptions; those not owned get only a decay product.

    Attributes:
        decays: Product of all decays of each parameter.
        roundings: Of each parameter that is a vector, the norm of what rounding its gradients can have added to ``D``.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], infos: Sequence[ParameterInfo]) -> None:
        self._names = [info.name for info in infos]
        self._gradients: dict[int, torch.Tensor] = {}
        self._momenta: dict[int, torch.Tensor] = {}
        self._deltas: dict[int, torch.Tensor] = {}
        self._fresh: set[int] = set()
        self.decays = [1.0] * len(infos)
        self.roundings = [0.0] * len(infos)
        self._momentum_roundings = [0.0] * len(infos)
        for index, (parameter, info) in enumerate(zip(parameters, infos, strict=True)):
            if info.owned:
                for buffers in (self._gradients, self._momenta, self._deltas):
                    buffers[index] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        self.drop_gradients()

    @property
    def deltas(self) -> Mapping[int, torch.Tensor]:
        """``D`` of every owned parameter, by index."""
        return self._deltas

    def waiting(self, index: int) -> torch.Tensor | None:
        """The captured gradient that waits for the next step; None when nothing was captured."""
        return None if index in self._fresh else self._gradients[index]

    def add_gradient(self, index: int, gradient: torch.Tensor) -> None:
        """Add captured gradient, of the parameter's shape, to what waits for the next step."""
        waiting = self._gradients[index]
        if index in self._fresh:
            self._fresh.remove(index)
            waiting.copy_(gradient.view_as(waiting))
        else:
            waiting.add_(gradient.view_as(waiting))

    def add_gradient_rows(self, index: int, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Add captured gradient of some rows: ``rows`` of shape ``(n,)``, ``values`` ``(n, columns)``."""
        waiting = self._gradients[index]
        if index in self._fresh:
            self._fresh.remove(index)
            waiting.zero_()
        waiting.index_add_(0, rows, values)

    def drop_gradients(self) -> None:
        """Forget what waits for the next step."""
        self._fresh = set(self._gradients)

    def step(self, index: int, update: ParamStep, multiplier: float, preconditioner: torch.Tensor | None) -> None:
        """Follow one step of one parameter; ``preconditioner`` is needed for owned ones."""
        self.decays[index] *= update.decay
        if preconditioner is None:
            return
        momentum = self._momenta[index].mul_(update.momentum)
        if index not in self._fresh:
            momentum.add_(self._gradients[index], alpha=update.grad_weight * multiplier)
        if momentum.dim() == 1:
            # Sums of nothing but zeros have no rounding, and Adam divides them by eps.
            moving = preconditioner[momentum != 0]
            self._step_rounding(index, update, multiplier, moving)
        self._deltas[index].mul_(update.decay).addcmul_(preconditioner, momentum, value=-1)

    def _step_rounding(self, index: int, update: ParamStep, multiplier: float, preconditioner: torch.Tensor) -> None:
        """Follow through one step what rounding adds, as if every element had the typical gradient."""
        rounding = update.momentum * self._momentum_roundings[index]
        if index not in self._fresh:
            gradient = self._gradients[index]
            typical = float(torch.linalg.vector_norm(gradient)) / math.sqrt(max(1, gradient.numel()))
            rounding += abs(update.grad_weight * multiplier) * _SUM_ROUNDING * typical
        self._momentum_roundings[index] = rounding
        amplified = rounding * float(torch.linalg.vector_norm(preconditioner))
        self.roundings[index] = abs(update.decay) * self.roundings[index] + amplified

    def state_dict(self) -> dict[str, Any]:
        """All that later steps build on; the tensors are those in use."""
        return {
            "momenta": {self._names[index]: momentum for index, momentum in self._momenta.items()},
            "deltas": {self._names[index]: delta for index, delta in self._deltas.items()},
            "decays": list(self.decays),
            "roundings": list(self.roundings),
            "momentum_roundings": list(self._momentum_roundings),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave; tensors are copied."""
        for own, given in ((self._momenta, state["momenta"]), (self._deltas, state["deltas"])):
            for index, tensor in own.items():
                tensor.copy_(given[self._names[index]])
        self.decays, self.roundings = list(state["decays"]), list(state["roundings"])
        self._momentum_roundings = list(state["momentum_roundings"])

    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(
            tensor.nbytes for buffers in (self._gradients, self._momenta, self._deltas) for tensor in buffers.values()
        )


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
        roundings: See :class:`Shadows`.
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
