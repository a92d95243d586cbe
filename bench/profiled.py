"""What ways to choose what to recompute get to know of a model, and what they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gradkern.checkpoint._operators import UnitOperators
from gradkern.checkpoint._recompute import Recompute
from gradkern.checkpoint._search import Profile

__all__ = ["Choice", "Profiled"]

Choice = dict[str, Recompute]
"""Units to recompute, and how; the others are kept."""


@dataclass(frozen=True)
class Profiled:
    """What every way to choose gets to know.

    Attributes:
        measured: Bytes and seconds of units, kept and recomputed.
        operators: Of every unit that can be recomputed, its operators with their seconds and bytes.
    """

    measured: Profile
    operators: Mapping[str, UnitOperators]

    @property
    def names(self) -> list[str]:
        """Units that can be recomputed, in order of execution."""
        return [name for name in self.measured.names if name in self.measured.buffers]

    def spared_bytes(self, name: str) -> int:
        """Bytes between forward and backward that recomputing a unit spares."""
        keep, again = self.measured.options[1 + self.measured.names.index(name)][:2]
        return max(0, keep.saved_bytes - again.saved_bytes)

    def again_s(self, name: str) -> float:
        """Seconds that recomputing all of a unit adds."""
        return self.measured.options[1 + self.measured.names.index(name)][1].extra_s

    def recomputed(self, names: list[str]) -> Choice:
        """All of these units recomputed, the others kept."""
        return {name: Recompute(self.measured.buffers[name]) for name in names}
