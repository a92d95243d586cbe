"""Optimizer steps of many copies of a model at once, on tensors that have a first dimension for the copies.

The rules are the references of :mod:`gradkern.ops`, the very arithmetic of the steps: given the same gradients a copy
gets the bits that its own optimizer would give, apart from the last bit of the clip coefficient. Copies need not have
made equally many steps: one whose batch is empty makes none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradkern.clip import GlobalNorm
from gradkern.ops.adamw_step.reference import AMSGRAD, adamw_scalars, adamw_update
from gradkern.ops.sgd_step.reference import MOMENTUM, sgd_scalars, sgd_update
from gradkern.rollback._sweep import norms

__all__ = ["StackedOptimizer", "UnstackableError"]


class UnstackableError(Exception):
    """Copies of a training cannot be made together, for the reason that the text gives."""


class StackedOptimizer:
    """The optimizers of many copies of a model.

    Args:
        optimizer: That of one; left as it is.
        model: Whose parameters it trains.
        copies: Their number.

    Raises:
        UnstackableError: It is not gradkern's Adam, AdamW or SGD in fp32 in host memory, or clips otherwise than by the
            norm of all of its gradients.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, copies: int) -> None:
        self._max_norm = _threshold(optimizer)
        self._is_adam = isinstance(optimizer, torch.optim.Adam)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._groups = [[names[id(each)] for each in group["params"]] for group in optimizer.param_groups]
        trained = [each for group in optimizer.param_groups for each in group["params"]]
        if any(each.dtype != torch.float32 or each.device.type != "cpu" for each in trained):
            raise UnstackableError("the optimizer trains other parameters than of fp32 in host memory")
        self.names = [name for group in self._groups for name in group]
        self._states: dict[str, list[Tensor]] = {}
        self._made = {name: torch.zeros(copies, dtype=torch.int64) for name in self.names}

    def step(
        self,
        groups: Sequence[Mapping[str, Any]],
        parameters: dict[str, Tensor],
        gradients: Mapping[str, Tensor],
        has_gradient: Mapping[str, Tensor],
    ) -> None:
        """Make a step.

        Args:
            groups: Options of every parameter group.
            parameters: By name, shape ``(copies, *parameter)``; replaced or changed in place.
            gradients: Likewise, zero where there is none.
            has_gradient: Of each, which copies have one, bool, shape ``(copies,)``. The others are left as they are.
        """
        if not gradients:
            return
        coefficients = self._clip_coefficients(gradients)
        for names, options in zip(self._groups, groups, strict=True):
            for name in names:
                if name in gradients:
                    rows = has_gradient[name].nonzero().flatten()
                    self._step_parameter(name, options, parameters, gradients[name], rows, coefficients)

    def _step_parameter(
        self,
        name: str,
        options: Mapping[str, Any],
        parameters: dict[str, Tensor],
        gradient: Tensor,
        rows: Tensor,
        coefficients: Tensor,
    ) -> None:
        made, parameter = self._made[name], parameters[name]
        made[rows] += 1
        sign = -1.0 if options["maximize"] else 1.0
        if self._is_adam:
            variant = AMSGRAD if options["amsgrad"] else 0
            numbers = (options["lr"], *options["betas"], options["eps"], options["weight_decay"], sign)
            kept, rule, scalars_of = (3 if variant else 2), adamw_update, adamw_scalars
        else:
            variant = MOMENTUM if options["momentum"] != 0 else 0
            numbers = (options["lr"], options["momentum"], options["dampening"], options["weight_decay"], sign)
            kept, rule, scalars_of = (1 if variant else 0), sgd_update, sgd_scalars
        states = self._states.setdefault(name, [torch.zeros_like(parameter) for _ in range(kept)])
        counts, which = torch.unique(made[rows], return_inverse=True)
        table = torch.tensor([scalars_of(numbers, 1.0, count, variant) for count in counts.tolist()])[which]
        table[:, 0] = coefficients[rows] * sign
        ones = [1] * (parameter.dim() - 1)
        scalars: Any = tuple(column.reshape(-1, *ones) for column in table.t())
        if len(rows) == len(parameter):
            parameters[name], found = rule(parameter, gradient, states, scalars, variant)
            self._states[name] = list(found)
            return
        parameter[rows], found = rule(
            parameter[rows], gradient[rows], [state[rows] for state in states], scalars, variant
        )
        for state, value in zip(states, found, strict=True):
            state[rows] = value

    def _clip_coefficients(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """``min(1, max_norm / (norm + 1e-6))`` of every copy, fp32."""
        found = norms(gradients.values())
        if self._max_norm is None:
            return torch.ones(len(found))
        return (self._max_norm / (found + 1e-6)).clamp_max(1.0).float()


def _threshold(optimizer: torch.optim.Optimizer) -> float | None:
    """What the norm is clipped to, if it is."""
    is_ours = hasattr(optimizer, "register_step_event_hook")
    if not is_ours or not isinstance(optimizer, (torch.optim.Adam, torch.optim.SGD)):
        raise UnstackableError(f"the optimizer is {type(optimizer).__name__}, not gradkern's Adam, AdamW or SGD")
    clip = getattr(optimizer, "clip", None)
    if clip is None:
        return None
    if type(clip) is not GlobalNorm or clip.norm_type != 2.0 or clip.together(optimizer) != [optimizer]:
        raise UnstackableError(f"the optimizer clips by {clip!r}, not by the norm of all of its gradients")
    return clip.max_norm
