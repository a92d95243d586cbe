"""Nested recomputation of a model's units: a profile as a chain of stages, and a schedule as segments."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradkern.checkpoint._native_rotor import fastest_rotor
from gradkern.checkpoint._profile import CycleCost, Span
from gradkern.checkpoint._rotor import NestedSolution, Now, Schedule, Stage, StageOption, simulate, solve_nested
from gradkern.checkpoint._segments import Nest

__all__ = ["NestedChain", "Nesting"]

# Halvings of the range of capacities when the least is sought.
_BISECTIONS = 12

# Of a table: slots, and about how many cells it may have.
_LEAST_SLOTS, _MOST_SLOTS, _CELLS = 500, 4000, 2_000_000
_ROOM = (1.0, 1.002, 1.01, 1.03)


@dataclass(frozen=True)
class Nesting:
    """A way to nest.

    Attributes:
        segments: Units that are recomputed together; of one unit alone too.
        forwards: How often each unit runs forward.
        extra_s: Seconds it adds.
        peak_bytes: What it needs, as modelled.
    """

    segments: tuple[Nest, ...]
    forwards: tuple[int, ...]
    extra_s: float
    peak_bytes: int


class NestedChain:
    """The units of a model as stages that can be nested. Made by ``of``.

    Args:
        names: The units in order of execution.
        stages: One for each, and the head.
        stem: What runs before.
    """

    def __init__(self, names: tuple[str, ...], stages: list[Stage], stem: Span) -> None:
        self._names = names
        self._stages = stages
        self._stem = stem
        self._once_s = math.fsum(option.forward_s + option.backward_s for stage in stages for option in stage.options)

    @classmethod
    def of(cls, names: tuple[str, ...], kept: CycleCost, recomputed: CycleCost) -> NestedChain | None:
        """The chain of a profile, or None where it is none: where a unit frees more than it makes.

        Args:
            names: The units in order of execution; all can be recomputed.
            kept: A cycle with all of them kept.
            recomputed: A cycle with all of them recomputed.
        """
        spans = kept.spans[1:]
        if any(len(span.visits) < 2 for span in (*spans, *recomputed.spans[1:-1])):
            return None
        # From the second micro-batch on all gradients are there all the time.
        always = max(visit.gradient_bytes for visit in spans[0].visits) if len(spans[0].visits) > 2 else 0
        stages = []
        for at, span in enumerate(spans):
            plain = recomputed.spans[1 + at]
            input_bytes = recomputed.spans[at].saved_bytes if at else 0
            before = kept.spans[at].visits
            later = before[1].gradient_bytes if at and len(before) > 1 else kept.end_bytes
            own = span.visits[1].gradient_bytes
            stages.append(
                Stage(
                    input_bytes=input_bytes,
                    forward_s=span.forward_s,
                    forward_peak_bytes=always + _peak(plain, is_backward=False),
                    grad_bytes=0 if always else max(0, later - own),
                    options=(
                        StageOption(
                            saved_bytes=span.saved_bytes,
                            forward_peak_bytes=always + _peak(span, is_backward=False),
                            backward_peak_bytes=always + _peak(span, is_backward=True),
                            forward_s=span.forward_s,
                            backward_s=span.backward_s,
                        ),
                    ),
                    input_grad_bytes=input_bytes,
                )
            )
        sizes = [size for stage in stages[:-1] for size in (stage.input_bytes, stage.options[0].saved_bytes)]
        if min(sizes, default=0) < 0 or kept.spans[0].saved_bytes < 0 or stages[-1].input_bytes < 0:
            return None
        stages[-1] = _not_below_zero(stages[-1])
        return cls(names, stages, kept.spans[0])

    def fastest(self, capacity_bytes: int) -> Nesting | None:
        """The fastest within a capacity, or None where none fits."""
        room = capacity_bytes - self._stem.saved_bytes
        if room <= 0 or self._stem.peak_bytes > capacity_bytes:
            return None
        slots = max(_LEAST_SLOTS, min(_MOST_SLOTS, _CELLS // len(self._stages) ** 2))
        # Sizes are rounded up to slots; with a little more room what fits to the byte is found too.
        tried = (solve_nested(self._stages, int(room * more), slots=slots, table=fastest_rotor()) for more in _ROOM)
        fits = [solution for solution in tried if solution is not None and solution.peak_bytes <= room]
        return self._nesting(min(fits, key=lambda solution: solution.seconds)) if fits else None

    def smallest(self, most_bytes: int) -> Nesting | None:
        """One that needs about as little as any, of those within ``most_bytes``; None where none is."""
        best = self.fastest(most_bytes)
        low, high = 0, most_bytes if best is None else best.peak_bytes
        for _ in range(_BISECTIONS):
            middle = (low + high) // 2
            if best is None or middle == low:
                break
            found = self.fastest(middle)
            if found is None:
                low = middle
            else:
                best, high = found, min(middle, found.peak_bytes)
        return best

    def _nesting(self, solution: NestedSolution) -> Nesting:
        simulated = simulate(self._stages, solution.schedule)
        items = _items(solution.schedule, self._names)
        return Nesting(
            segments=tuple(item for item in items if isinstance(item, tuple)),
            forwards=simulated.forwards[:-1],
            extra_s=max(0.0, solution.seconds - self._once_s),
            peak_bytes=max(self._stem.saved_bytes + simulated.peak_bytes, self._stem.peak_bytes),
        )


def _items(schedule: Schedule | None, names: tuple[str, ...]) -> Nest:
    """Units and segments in order; the head, which comes last, has no name."""
    items: list[str | Nest] = []
    while schedule is not None:
        if isinstance(schedule, Now):
            items += names[schedule.stage : schedule.stage + 1]
            schedule = schedule.rest
        else:
            items.append(_items(schedule.left, names))
            schedule = schedule.right
    return tuple(items)


def _peak(span: Span, *, is_backward: bool) -> int:
    """Largest of a span's visits of one kind; gradients of parameters that were there before do not count."""
    return max(visit.peak_bytes for visit in span.visits[int(is_backward) :: 2])


def _not_below_zero(head: Stage) -> Stage:
    """The head as a stage: it may let go of more than it makes, which nothing that runs later could use."""
    option = head.options[0]
    held = StageOption(
        max(0, option.saved_bytes),
        max(0, option.forward_peak_bytes),
        max(0, option.backward_peak_bytes),
        option.forward_s,
        option.backward_s,
    )
    return Stage(head.input_bytes, head.forward_s, max(0, head.forward_peak_bytes), head.grad_bytes, (held,), 0)
