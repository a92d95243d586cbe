"""The search for a choice of options in C++: a thousand units of sixteen options in a fraction of a second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, chain

import torch
from torch.utils._python_dispatch import _disable_current_modes

from gradkern import _native
from gradkern.checkpoint._solver import Chain, Found, Option, ReferenceChain, check_units

__all__ = ["NativeChain", "fastest_chain"]


class NativeChain:
    """As ``ReferenceChain``, to the same answers."""

    def __init__(self, units: Sequence[Sequence[Option]]) -> None:
        check_units(units)
        options = list(chain.from_iterable(units))
        first = list(accumulate(map(len, units), initial=0))
        # A simulated GPU may be running around this: these tensors have values and are none of its own.
        with _disable_current_modes():
            self._columns = (
                torch.tensor(first, dtype=torch.int64),
                torch.tensor([option.saved_bytes for option in options], dtype=torch.int64),
                torch.tensor([option.peak_bytes for option in options], dtype=torch.int64),
                torch.tensor([option.extra_s for option in options], dtype=torch.float64),
            )
            self._choices = torch.zeros(len(units), dtype=torch.int64)

    def least_capacity(self) -> tuple[int, tuple[int, ...]]:
        """As ``ReferenceChain.least_capacity``."""
        with _disable_current_modes():
            capacity_bytes = torch.ops.gradkern._least_capacity_(*self._columns, self._choices)
            return capacity_bytes, tuple(self._choices.tolist())

    def cheapest(self, capacity_bytes: int, states: int) -> Found | None:
        """As ``ReferenceChain.cheapest``."""
        with _disable_current_modes():
            lower_bound_s, is_best = torch.ops.gradkern._prefix_knapsack_(
                *self._columns, capacity_bytes, states, self._choices
            )
            return None if math.isnan(lower_bound_s) else Found(tuple(self._choices.tolist()), lower_bound_s, is_best)


def fastest_chain() -> type[Chain]:
    """The native one where the library is loaded."""
    return NativeChain if _native.unavailable_reason() is None else ReferenceChain
