"""The prefix knapsack: which units to recompute so that the peak of a step fits. Knows numpy, not torch.

A step runs units ``1..n`` forward and ``n..1`` backward. With option ``o`` unit ``i`` adds ``saved`` bytes
that live from its forward to its backward, needs ``peak`` bytes on top of what earlier units hold while it
runs (the larger of its forward and its backward, gradients made so far included) and costs ``extra_s``
seconds. Only the *prefix sum* of saved bytes matters:

    ``F_i(m) = min over o of F_{i-1}(m - saved_o) + extra_o``

allowed iff ``(m - saved_o) + peak_o <= capacity``.

There is no grid in ``m``: a pass over the units keeps every pair of prefix and seconds that no other pair beats
in both. What keeps them few is a bound on the seconds still to come, linear in the prefix, from Lagrange
multipliers of the units' capacity constraints: a pair that cannot stay below a target is dropped. The target
starts a little above the bound for the whole chain and is raised until a choice is found below it, which is then
the best of all, to the byte. Where too many pairs are left they are thinned out, and the bound certifies how far
from the best the choice can be.

This is the reference; ``_native_solver`` does the same additions in the same order in C++ and finds the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MOST_BYTES",
    "Chain",
    "Found",
    "Option",
    "ReferenceChain",
    "Solution",
    "check_units",
    "extra_seconds",
    "peak_of",
    "solve",
]

DEFAULT_STATES = 4096

# As a capacity, more than any memory and far from where 64 bits end.
MOST_BYTES = 2**60

# States of the passes that find a first choice, and how often the multipliers follow what they found.
_FEW_STATES, _ROUNDS = 64, 2

# Targets, as shares of what lies between the bound and the best choice known.
_TARGETS = (1 / 64, 1 / 16, 1 / 4, 1.0)

# Relative to the seconds of a choice: far above what sums of doubles lose, far below what anyone could measure.
_MARGIN = 1e-9

# Of the subgradient method for the multipliers.
_ITERATIONS, _PATIENCE, _SMALLEST_STEP = 200, 12, 1e-5

Floats = NDArray[np.float64]


class Option(NamedTuple):
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


class Found(NamedTuple):
    """A feasible choice, a bound on the seconds of every other, and whether none is faster."""

    choices: tuple[int, ...]
    lower_bound_s: float
    is_best: bool


class Chain(Protocol):
    """Units in forward order, each with the options that it may run in, ready to be searched."""

    def __init__(self, units: Sequence[Sequence[Option]]) -> None: ...

    def least_capacity(self) -> tuple[int, tuple[int, ...]]:
        """The smallest capacity in bytes that any choice fits into, and such a choice."""

    def cheapest(self, capacity_bytes: int, states: int) -> Found | None:
        """The cheapest choice that fits, with at most so many states a unit; None where none fits."""


def check_units(units: Sequence[Sequence[Option]]) -> None:
    """Refuse a unit without options.

    Raises:
        ValueError: There is one.
    """
    if not all(units):
        raise ValueError("every unit needs at least one option, got a unit without")


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


def solve(
    units: Sequence[Sequence[Option]],
    capacity_bytes: int,
    *,
    states: int = DEFAULT_STATES,
    chain: type[Chain] | None = None,
) -> Solution | None:
    """Choose one option a unit so that the peak fits and the added time is least.

    Args:
        units: Options of each unit, in forward order; sizes in bytes.
        capacity_bytes: Bound on ``peak_of`` the choice.
        states: Pairs of prefix and seconds that are kept after each unit, at least 2.
        chain: What searches; the reference when None.

    Returns:
        The solution, or None where no choice fits. ``peak_of(units, solution.choices) <= capacity_bytes``
        always holds; ``extra_s == lower_bound_s`` certifies the choice optimal, which it is unless states had to
        be thinned out. Where it is, more capacity never costs more time.

    Raises:
        ValueError: A unit has no option.

    Source:
        The recurrence above; O(units * states * options). Lists instead of a table after Nemhauser & Ullmann
        (Management Science 15, 1969); the bound is the Lagrangian of Everett (Operations Research 11, 1963).
    """
    found = (chain or ReferenceChain)(units).cheapest(capacity_bytes, states)
    if found is None:
        return None
    extra_s = extra_seconds(units, found.choices)
    return Solution(found.choices, extra_s, extra_s if found.is_best else min(extra_s, found.lower_bound_s))


class ReferenceChain:
    """The search in numpy.

    Args:
        units: Options of each unit, in forward order.

    Raises:
        ValueError: A unit has no option.
    """

    def __init__(self, units: Sequence[Sequence[Option]]) -> None:
        check_units(units)
        self._units = units
        # One row a unit; where it has fewer options than others, more that take forever.
        shape = len(units), max(map(len, units), default=0)
        self._saved, self._peak = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        self._extra: Floats = np.full(shape, np.inf)
        for i, options in enumerate(units):
            self._saved[i, : len(options)] = [option.saved_bytes for option in options]
            self._peak[i, : len(options)] = [option.peak_bytes for option in options]
            self._extra[i, : len(options)] = [option.extra_s for option in options]

    def least_capacity(self) -> tuple[int, tuple[int, ...]]:
        """The smallest capacity in bytes that any choice fits into, and such a choice.

        Exact to the byte: for a given capacity it is best to keep the prefix as small as possible at every
        unit, so a greedy pass decides feasibility and bisection finds the capacity.
        """
        best: tuple[int, ...] = (0,) * len(self._units)
        low, high = 0, peak_of(self._units, best)
        while low < high:
            middle = (low + high) // 2
            choices = self._smallest_prefixes(middle)
            if choices is None:
                low = middle + 1
            else:
                high, best = middle, choices
        return high, best

    def cheapest(self, capacity_bytes: int, states: int) -> Found | None:
        """The cheapest choice that fits, with at most so many states a unit; None where none fits."""
        if self._smallest_prefixes(capacity_bytes) is None:
            return None
        few = min(states, _FEW_STATES)
        multipliers = np.zeros(len(self._units))
        bound = _Bound(self, capacity_bytes, multipliers)
        # The smallest prefix survives every thinning, so that this pass always finds something.
        best = self._pass(bound, np.inf, few)
        bound_s = 0.0
        for _ in range(_ROUNDS):
            if best.is_thinned:
                multipliers, bound_s = self._multipliers(capacity_bytes, multipliers, best.extra_s)
                bound = _Bound(self, capacity_bytes, multipliers)
                best = best.better(self._pass(bound, best.extra_s, few))
        margin = _MARGIN * best.extra_s
        start_s = lower_s = bound_s - margin
        range_s = best.extra_s - start_s
        for share in _TARGETS if best.is_thinned else ():
            target_s = start_s + range_s * share
            found = self._pass(bound, target_s + margin, states)
            if found.choices:
                best = best.better(found)
                break
            if not found.is_thinned:
                lower_s = target_s
        return Found(best.choices, lower_s, not best.is_thinned)

    def _smallest_prefixes(self, capacity_bytes: int) -> tuple[int, ...] | None:
        """The feasible choice with the smallest prefix at every unit, or None."""
        prefix = 0
        choices = []
        for options in self._units:
            allowed = [choice for choice, option in enumerate(options) if prefix + option.peak_bytes <= capacity_bytes]
            if not allowed:
                return None
            best = min(allowed, key=lambda choice: (options[choice].saved_bytes, options[choice].extra_s))
            choices.append(best)
            prefix += options[best].saved_bytes
        return tuple(choices)

    def _multipliers(self, capacity_bytes: int, start: Floats, upper_s: float) -> tuple[Floats, float]:
        """Multipliers of ``prefix + peak <= capacity``, one a unit, and the bound on the seconds that they prove.

        Subgradient steps of Polyak's length towards the seconds of a known choice, halved where they lead nowhere.
        """
        scale = _scale(capacity_bytes)
        saved, peak, capacity = self._saved / scale, self._peak / scale, capacity_bytes / scale
        rows = np.arange(len(self._units))
        multipliers = best = start
        best_s, step, stalled = -np.inf, 1.0, 0
        for _ in range(_ITERATIONS):
            later = _sums_after(multipliers)
            seconds = self._extra + multipliers[:, None] * peak + saved * later[:, None]
            choice = seconds.argmin(axis=1)
            bound_s = _sum(seconds[rows, choice]) - capacity * _sum(multipliers)
            if best_s == -np.inf or bound_s > best_s + _MARGIN * abs(bound_s):
                best, best_s, stalled = multipliers, bound_s, 0
            else:
                stalled += 1
                if stalled == _PATIENCE:
                    step, stalled, multipliers = step / 2, 0, best
                    if step < _SMALLEST_STEP:
                        break
                    continue
            chosen = saved[rows, choice]
            excess = (np.cumsum(chosen) - chosen + peak[rows, choice]) - capacity
            excess[(multipliers <= 0) & (excess < 0)] = 0.0
            square = _sum(excess * excess)
            if square < 1e-18:
                break
            multipliers = np.maximum(0.0, multipliers + (step * (upper_s - bound_s) / square) * excess)
        return best, best_s

    def _pass(self, bound: _Bound, target_s: float, states: int) -> _Passed:
        """Go through the units with the states that can end at ``target_s`` or below."""
        prefix, seconds = np.zeros(1, dtype=np.int64), np.zeros(1)
        came_from: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
        is_thinned = False
        for i in range(len(self._units)):
            after = prefix[:, None] + self._saved[i]
            spent = seconds[:, None] + self._extra[i]
            fits = (prefix[:, None] + self._peak[i] <= bound.capacity_bytes) & np.isfinite(self._extra[i])
            state, option = np.nonzero(fits & (bound.of(i + 1, after, spent) <= target_s))
            after, spent = after[state, option], spent[state, option]
            order = np.lexsort((option, spent, after))
            spent = spent[order]
            # Those that cost less than everything with a smaller prefix.
            order = order[np.concatenate([[True], spent[1:] < np.minimum.accumulate(spent)[:-1]])[: len(spent)]]
            if len(order) > states:
                spent = seconds[state[order]] + self._extra[i][option[order]]
                ends = None if target_s == np.inf else bound.of(i + 1, after[order], spent)
                order = order[_thinned(len(order), states, ends)]
                is_thinned = True
            if not len(order):
                return _Passed((), np.inf, is_thinned)
            came_from.append((state[order], option[order]))
            prefix, seconds = after[order], seconds[state[order]] + self._extra[i][option[order]]
        at = len(seconds) - 1  # the largest prefix, hence the fewest seconds
        choices = []
        for states_before, options in reversed(came_from):
            choices.append(int(options[at]))
            at = int(states_before[at])
        return _Passed(tuple(reversed(choices)), float(seconds[-1]), is_thinned)


class _Passed(NamedTuple):
    """What a pass found: nothing where ``choices`` is empty."""

    choices: tuple[int, ...]
    extra_s: float
    is_thinned: bool

    def better(self, found: _Passed) -> _Passed:
        """``found`` where it is faster, or as fast and surely the best."""
        if found.choices and found.extra_s <= self.extra_s and (found.extra_s < self.extra_s or not found.is_thinned):
            return found
        return self


class _Bound:
    """The least seconds that a state can end with, linear in its prefix."""

    def __init__(self, chain: ReferenceChain, capacity_bytes: int, multipliers: Floats) -> None:
        self.capacity_bytes = capacity_bytes
        self._scale = scale = _scale(capacity_bytes)
        self._capacity = capacity_bytes / scale
        later = _sums_after(multipliers)
        peak, saved = chain._peak / scale, chain._saved / scale
        least = (chain._extra + multipliers[:, None] * peak + saved * later[:, None]).min(axis=1, initial=np.inf)
        self._rest = np.append(_sums_after(least) + least, 0.0)
        self._slope = np.append(later + multipliers, 0.0)

    def of(self, unit: int, prefix: NDArray[np.int64], seconds: Floats) -> Floats:
        """For states before ``unit``."""
        later: Floats = self._rest[unit] + (prefix / self._scale - self._capacity) * self._slope[unit]
        return seconds + later


def _scale(capacity_bytes: int) -> float:
    """Bytes in the unit that multipliers reckon in."""
    return float(max(1, capacity_bytes))


def _thinned(count: int, states: int, ends: Floats | None) -> NDArray[np.intp]:
    """Positions of the states that are left of ``count``, which are in order of their prefix.

    Those that can end with the fewest seconds, smaller prefixes first, and the smallest prefix, by which everything
    stays feasible. Without multipliers the bound says too little (``ends`` is None): then evenly.
    """
    if ends is None:
        return np.arange(states) * (count - 1) // (states - 1)
    ends[0] = -np.inf
    last = np.partition(ends, states - 1)[states - 1]
    stays = ends < last
    stays[np.flatnonzero(ends == last)[: states - np.count_nonzero(stays)]] = True
    return np.flatnonzero(stays)


def _sum(values: Floats) -> float:
    """From the first to the last: ``np.sum`` adds in another order."""
    return float(np.cumsum(values)[-1]) if len(values) else 0.0


def _sums_after(values: Floats) -> Floats:
    """For every position the sum of what follows it, from the last backwards."""
    sums = np.zeros(len(values))
    sums[:-1] = np.cumsum(values[:0:-1])[::-1]
    return sums
