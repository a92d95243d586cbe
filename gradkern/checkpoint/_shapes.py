"""Plans for batches of any length, from the costs that were measured at a few."""

from __future__ import annotations

import bisect
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, starmap
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from gradkern.checkpoint._plan import Plan, choose, least_peak
from gradkern.checkpoint._solver import Option
from gradkern.checkpoint._unit_plan import KEEP, UnitOption
from gradkern.errors import PlanInfeasibleError
from gradkern.loss import Batch

__all__ = ["ShapePlans", "cut", "length_of"]

_Floats = NDArray[np.float64]

# Fields of a plan that change with the length.
_TOTALS = ("natural_peak_bytes", "fixed_bytes", "floor_bytes")


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
    _costs: tuple[_Costs, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        near = [slice(first, first + 3) for first in range(max(1, len(self.lengths) - 2))]
        object.__setattr__(self, "_costs", tuple(_Costs(self.lengths[three], self.plans[three]) for three in near))

    def at(self, length: int) -> Plan:
        """Choose for a length, in milliseconds.

        Args:
            length: From 1 to the largest that was measured; up to the smallest, that one's plan.

        Returns:
            The plan. Between lengths that were measured it names of each unit's options only the one chosen and
            ``"keep"``, so that another budget is for ``plan(..., shapes=)`` and not for its ``for_budget``.

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
        missing = max(0, *(plan.predicted_peak_bytes - plan.modelled_peak_bytes for plan in self.plans))
        try:
            made = self._costs[first].choose(length, self.budget_bytes - missing)
        except PlanInfeasibleError:
            return self.plans[above]  # which fits what is longer, nested perhaps
        return replace(made, budget_bytes=self.budget_bytes, predicted_peak_bytes=made.modelled_peak_bytes + missing)


class _Costs:
    """The costs of up to three lengths, and from them those of any between."""

    def __init__(self, lengths: Sequence[int], plans: Sequence[Plan]) -> None:
        self._lengths = lengths
        # Of every unit the options that all lengths have, and of all of these one after the other what they cost.
        units = []
        measured: list[list[UnitOption]] = [[] for _ in plans]
        for alike in zip(*(plan.units for plan in plans), strict=True):
            known = [{_key(option): option for option in unit.alone} for unit in alike]
            shared = [key for key in known[-1] if all(key in options for options in known)]
            units.append(replace(alike[-1], option=KEEP, options=tuple(known[-1][key] for key in shared)))
            for found, options in zip(measured, known, strict=True):
                found.extend(options[key] for key in shared)
        self._plan = replace(plans[-1], units=tuple(units), segments=(), offloads=())
        self._bytes = np.array([[(each.saved_bytes, each.peak_bytes) for each in found] for found in measured], float)
        self._extra_s = np.array([[each.extra_s for each in found] for found in measured])
        self._unit_s = np.array([[(unit.forward_s, unit.backward_s) for unit in plan.units] for plan in plans])
        self._totals = np.array([[getattr(plan, name) for name in _TOTALS] for plan in plans], float)

    def choose(self, length: int, budget_bytes: int) -> Plan:
        """A plan for a length.

        Raises:
            PlanInfeasibleError: No choice fits, as modelled.
        """
        above = bisect.bisect_left(self._lengths, length)
        below = above - 1
        share = (length - self._lengths[below]) / (self._lengths[above] - self._lengths[below])
        parabola = np.array(_parabola(self._lengths, length))

        def seconds(values: _Floats) -> _Floats:
            found: _Floats = values[below] + (values[above] - values[below]) * share
            return found

        def nbytes(values: _Floats) -> Any:
            larger = np.maximum(seconds(values), np.tensordot(parabola, values, 1))
            return np.ceil(larger).astype(np.int64).tolist()

        each = starmap(_cost, zip(nbytes(self._bytes), seconds(self._extra_s).tolist(), strict=True))
        costs = [list(islice(each, len(unit.options))) for unit in self._plan.units]
        timed = [
            replace(unit, forward_s=forward_s, backward_s=backward_s)
            for unit, (forward_s, backward_s) in zip(self._plan.units, seconds(self._unit_s).tolist(), strict=True)
        ]
        totals = dict(zip(_TOTALS, nbytes(self._totals), strict=True))
        plan = replace(self._plan, **totals, units=tuple(timed))
        chosen = choose(plan, costs, least_peak(plan, costs), budget_bytes)
        # Of hundreds of options a plan for one batch need not tell more than what was chosen and what it spares.
        units = []
        for unit, options in zip(chosen.units, costs, strict=True):
            both = dict.fromkeys((unit.options[0], unit.chosen))
            told = [replace(each, **options[unit.options.index(each)]._asdict()) for each in both]
            units.append(replace(unit, options=tuple(told)))
        return replace(chosen, units=tuple(units))


def _cost(nbytes: tuple[int, int], extra_s: float) -> Option:
    return Option(*nbytes, extra_s)


def _key(option: UnitOption) -> Hashable:
    """What makes options of two lengths the same."""
    return option.saved_ops or option.name


def _parabola(lengths: Sequence[int], length: int) -> list[float]:
    """What the polynomial through all takes of the value at each (Lagrange)."""
    shares = []
    for at in lengths:
        others = [other for other in lengths if other != at]
        shares.append(math.prod(length - other for other in others) / math.prod(at - other for other in others))
    return shares
