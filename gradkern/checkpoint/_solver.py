"""The prefix knapsack: which units to recompute so that the peak of a step fits. Knows numpy, not torch.

A step runs units ``1..n`` forward and ``n..1`` backward. With option ``o`` unit ``i`` adds ``saved`` bytes
that live from its forward to its backward, needs ``peak`` bytes on top of what earlier units hold while it
runs (the larger of its forward and its backward, gradients made so far included) and costs ``extra_s``
seconds. Only the *prefix sum* of saved bytes matters:

    ``F_i(m) = min over o of F_{i-1}(m - saved_o) + extra_o``

allowed iff ``(m - saved_o) + peak_o <= capacity``.

The table is a grid in ``m``. Sizes rounded up give a plan that holds in bytes, sizes rounded down a lower
bound on the seconds of every plan that holds; where all sizes are multiples of the grid's step both are
exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Option", "Solution", "extra_seconds", "least_capacity", "peak_of", "solve"]

DEFAULT_SLOTS = 16384


@dataclass(frozen=True)
class Option:
    """One way to run a unit.

    Attributes:
        saved_bytes: Added to the prefix; negative where the unit frees what an earlier one made.
        peak_bytes: Most bytes alive above the prefix while the unit runs forward or backward.
        extra_s: Seconds this option adds to the step, at least 0.
    """

    saved_bytes: int
    peak_bytes: int
    extra_s: float


@dataclass(frozen=True)
class Solution:
    """A feasible choice and a bound on every other.

    Attributes:
        choices: Index of the chosen option, one for each unit.
        extra_s: Seconds the choice adds.
        lower_bound_s: No feasible choice adds less.
    """

    choices: tuple[int, ...]
    extra_s: float
    lower_bound_s: float


def peak_of(units: Sequence[Sequence[Option]], choices: Sequence[int]) -> int:
    """Return the exact peak in bytes of one choice."""
    prefix = peak = 0
    for options, choice in zip(units, choices, strict=True):
        peak = max(peak, prefix + options[choice].peak_bytes)
        prefix += options[choice].saved_bytes
    return peak


def extra_seconds(units: Sequence[Sequence[Option]], choices: Sequence[int]) -> float:
    """Return the seconds that a choice adds."""
    return math.fsum(options[choice].extra_s for options, choice in zip(units, choices, strict=True))


def least_capacity(units: Sequence[Sequence[Option]]) -> tuple[int, tuple[int, ...]]:
    """Return the smallest capacity in bytes that any choice fits into, and such a choice.

    Exact to the byte: for a given capacity it is best to keep the prefix as small as possible at every
    unit, so a greedy pass decides feasibility and bisection finds the capacity.

    Raises:
        ValueError: A unit has no option.
    """
    if not all(units):
        raise ValueError("every unit needs at least one option, got a unit without")
    low, high = 0, peak_of(units, [0] * len(units))
    best: tuple[int, ...] = (0,) * len(units)
    while low < high:
        middle = (low + high) // 2
        choices = _smallest_prefixes(units, middle)
        if choices is None:
            low = middle + 1
        else:
            high, best = middle, choices
    return high, best


def solve(units: Sequence[Sequence[Option]], capacity_bytes: int, *, slots: int = DEFAULT_SLOTS) -> Solution | None:
    """Choose one option a unit so that the peak fits and the added time is least.

    Args:
        units: Options of each unit, in forward order; sizes in bytes.
        capacity_bytes: Bound on ``peak_of`` the choice.
        slots: Size of the grid. Its step depends on the sizes alone, never on the capacity, so that more
            capacity never costs more time.

    Returns:
        The solution, or None where no choice fits. ``peak_of(units, solution.choices) <= capacity_bytes``
        always holds; ``extra_s == lower_bound_s`` certifies the choice optimal.

    Source:
        The recurrence above; O(units * slots * options).
    """
    least_bytes, least_choices = least_capacity(units)
    if capacity_bytes < least_bytes:
        return None
    step = _grid_step(units, slots)
    # The choice for the least capacity fits every larger one, so it may always compete: the grid can miss it.
    rounded_up = _run_table(units, capacity_bytes, step, least_choices, round_up=True)
    choices = min((least_choices, rounded_up), key=lambda candidate: extra_seconds(units, candidate))
    # Rounding down lets every choice pass that fits, so here the grid never comes out empty.
    rounded_down = _run_table(units, capacity_bytes, step, least_choices, round_up=False)
    extra_s = extra_seconds(units, choices)
    return Solution(choices, extra_s, min(extra_s, extra_seconds(units, rounded_down)))


def _smallest_prefixes(units: Sequence[Sequence[Option]], capacity_bytes: int) -> tuple[int, ...] | None:
    """The feasible choice with the smallest prefix at every unit, or None."""
    prefix = 0
    choices = []
    for options in units:
        allowed = [choice for choice, option in enumerate(options) if prefix + option.peak_bytes <= capacity_bytes]
        if not allowed:
            return None
        best = min(allowed, key=lambda choice: (options[choice].saved_bytes, options[choice].extra_s))
        choices.append(best)
        prefix += options[best].saved_bytes
    return tuple(choices)


def _grid_step(units: Sequence[Sequence[Option]], slots: int) -> int:
    """Bytes a slot: the common divisor of all sizes if that fits into the grid, else total over slots."""
    sizes = [option.saved_bytes for options in units for option in options]
    columns = [[0, *(option.saved_bytes for option in options)] for options in units]
    total = sum(max(column) - min(column) for column in columns)
    divisor = math.gcd(*sizes) or 1
    return divisor if total <= divisor * slots else -(-total // slots)


def _run_table(
    units: Sequence[Sequence[Option]], capacity_bytes: int, step: int, otherwise: tuple[int, ...], *, round_up: bool
) -> tuple[int, ...]:
    """Fill the table over all prefixes and read the cheapest choice back; ``otherwise`` where nothing fits."""
    saved = [
        [-(-option.saved_bytes // step) if round_up else option.saved_bytes // step for option in options]
        for options in units
    ]
    origin = -sum(min(0, *column) for column in saved)
    width = 1 + origin + sum(max(0, *column) for column in saved)
    cost: NDArray[np.float64] = np.full(width, np.inf)
    cost[origin] = 0.0
    chosen = np.full((len(units), width), -1, dtype=np.int16)
    for index, options in enumerate(units):
        reached: NDArray[np.float64] = np.full(width, np.inf)
        for choice, option in enumerate(options):
            highest = min(width - 1, origin + (capacity_bytes - option.peak_bytes) // step)
            if highest >= 0:
                source = cost[: highest + 1]
                _relax(source, option.extra_s, saved[index][choice], choice, reached, chosen[index])
        cost = reached
    if not np.isfinite(cost).any():
        return otherwise
    slot = int(np.argmin(cost))
    choices = []
    for index in reversed(range(len(units))):
        choice = int(chosen[index, slot])
        choices.append(choice)
        slot -= saved[index][choice]
    return tuple(reversed(choices))


def _relax(
    source: NDArray[np.float64],
    extra_s: float,
    shift: int,
    choice: int,
    reached: NDArray[np.float64],
    chosen: NDArray[np.int16],
) -> None:
    """Offer ``source[m] + extra_s`` to slot ``m + shift`` for every m; slots outside are unreachable."""
    first = max(0, -shift)
    offered = source[first : reached.size - max(0, shift)] + extra_s
    span = slice(first + shift, first + shift + offered.size)
    better = offered < reached[span]
    np.copyto(reached[span], offered, where=better)
    np.copyto(chosen[span], choice, where=better)
