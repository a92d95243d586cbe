"""Plans for batches of any length, from the costs that were measured at a few."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from gradkern.checkpoint._plan import Plan
from gradkern.checkpoint._unit_plan import UnitOption, UnitPlan
from gradkern.errors import PlanInfeasibleError
from gradkern.loss import Batch

__all__ = ["ShapePlans", "cut", "length_of"]


def length_of(batch: Batch) -> int:
    """Return the size that a batch's tensors share in their dimension 1.

    Raises:
        ValueError: They have none or differ in it.
    """
    sizes = {leaf.shape[1] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() >= 2}
    if len(sizes) != 1:
        raise ValueError(
            f"plan: shapes needs a batch whose tensors agree in dimension 1, the length, got {sorted(sizes) or 'none'}"
        )
    return int(sizes.pop())


def cut(batch: Batch, length: int) -> Batch:
    """Return a batch with the first ``length`` positions of dimension 1, in memory of its own."""
    copies: dict[Tensor, Tensor] = {}  # one tensor may stand for inputs and labels

    def narrowed(tensor: Tensor) -> Tensor:
        if tensor not in copies:
            copies[tensor] = tensor.narrow(1, 0, length).clone() if tensor.dim() >= 2 else tensor
        return copies[tensor]

    shorter: Any = tree_map_only(Tensor, narrowed, batch)
    return shorter  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ShapePlans:
    """Plans by length of the batch. Made by ``plan(..., shapes=)``.

    Bytes at a length between two that were measured are taken to be the larger of two: what lies on the straight line
    between them, which is above every curve that bends upwards, and what lies on the parabola through three of them,
    which is the truth for what grows with the length and its square. What the model of a chain said too little of where
    plans were run comes off the budget.

    Attributes:
        budget_bytes: Of the whole step.
        lengths: Those measured, in ascending order.
        plans: One for each; each was run.
    """

    budget_bytes: int
    lengths: tuple[int, ...]
    plans: tuple[Plan, ...]
    _chosen: dict[int, Plan] = field(default_factory=dict, repr=False, compare=False)

    def at(self, length: int) -> Plan:
        """Choose for a length, in milliseconds.

        Args:
            length: From 1 to the largest that was measured; up to the smallest, that one's plan.

        Raises:
            TypeError: The length is no ``int``.
            ValueError: The length is below 1 or above the largest.
        """
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"length must be an int, got {type(length).__name__}")
        if not 1 <= length <= self.lengths[-1]:
            raise ValueError(
                f"length must be from 1 to {self.lengths[-1]}, the largest that was measured, got {length}; plan with "
                "a longer batch"
            )
        if length not in self._chosen:
            self._chosen[length] = self._choose(length)
        return self._chosen[length]

    def apply(self, model: nn.Module, length: int) -> Plan:
        """Have a model run the plan for a length, in place of one of these that is applied to it already.

        Returns:
            The plan.

        Raises:
            TypeError, ValueError: As ``at``; or the model is not the one planned for.
            RuntimeError: Another plan is applied. Nothing is changed in any of these cases.
        """
        made = self.at(length)
        before = next((plan for plan in self._known() if plan.is_applied(model)), None)
        if before is None:
            made.apply(model)
        elif not before.does_as(made):
            before.remove(model)
            made.apply(model)
        return made

    def remove(self, model: nn.Module) -> None:
        """Undo ``apply``.

        Raises:
            RuntimeError: None of these is applied.
        """
        before = next((plan for plan in self._known() if plan.is_applied(model)), None)
        if before is None:
            raise RuntimeError("none of these plans is applied to this model; nothing to remove")
        before.remove(model)

    def _known(self) -> list[Plan]:
        return [*self._chosen.values(), *self.plans]

    def _choose(self, length: int) -> Plan:
        above = bisect.bisect_left(self.lengths, length)
        if above == 0 or self.lengths[above] == length:
            return self.plans[above]
        first = max(0, min(above - 1, len(self.lengths) - 3))
        near = slice(first, first + 3)
        costs = _between(self.lengths[near], self.plans[near], length)
        missing = max(0, *(plan.predicted_peak_bytes - plan.modelled_peak_bytes for plan in self.plans))
        try:
            made = costs.for_budget(self.budget_bytes - missing)
        except PlanInfeasibleError:
            return self.plans[above]  # which fits what is longer, nested perhaps
        return replace(made, budget_bytes=self.budget_bytes, predicted_peak_bytes=made.modelled_peak_bytes + missing)


def _between(lengths: Sequence[int], plans: Sequence[Plan], length: int) -> Plan:
    """The costs at a length, from those at two or three around it."""
    above = bisect.bisect_left(lengths, length)
    below = above - 1
    share = (length - lengths[below]) / (lengths[above] - lengths[below])

    def seconds(values: Sequence[float]) -> float:
        return values[below] + (values[above] - values[below]) * share

    def nbytes(values: Sequence[int]) -> int:
        return math.ceil(max(seconds(values), _parabola(lengths, values, length)))

    def option(measured: Sequence[UnitOption]) -> UnitOption:
        return replace(
            measured[-1],
            saved_bytes=nbytes([each.saved_bytes for each in measured]),
            peak_bytes=nbytes([each.peak_bytes for each in measured]),
            extra_s=seconds([each.extra_s for each in measured]),
        )

    def unit(measured: Sequence[UnitPlan]) -> UnitPlan:
        known = [{_key(each): each for each in plan.options} for plan in measured]
        shared = [key for key in known[-1] if all(key in options for options in known)]
        return replace(
            measured[-1],
            options=tuple(option([options[key] for options in known]) for key in shared),
            forward_s=seconds([each.forward_s for each in measured]),
            backward_s=seconds([each.backward_s for each in measured]),
        )

    def of(read: Callable[[Plan], int]) -> int:
        return nbytes([read(plan) for plan in plans])

    return replace(
        plans[-1],
        natural_peak_bytes=of(lambda plan: plan.natural_peak_bytes),
        fixed_bytes=of(lambda plan: plan.fixed_bytes),
        floor_bytes=of(lambda plan: plan.floor_bytes),
        units=tuple(unit(measured) for measured in zip(*(plan.units for plan in plans), strict=True)),
    )


def _key(option: UnitOption) -> Hashable:
    """What makes options of two lengths the same."""
    return option.saved_ops or option.name


def _parabola(lengths: Sequence[int], values: Sequence[int], length: int) -> float:
    """The value at a length of the polynomial through all (Lagrange)."""
    total = 0.0
    for at, value in zip(lengths, values, strict=True):
        others = [other for other in lengths if other != at]
        total += value * math.prod(length - other for other in others) / math.prod(at - other for other in others)
    return total
