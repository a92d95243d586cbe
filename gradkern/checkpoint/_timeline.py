"""Live bytes over one step, as the costs of a plan's units say."""

from __future__ import annotations

from collections.abc import Sequence

from gradkern.checkpoint._unit_plan import UnitOption, UnitPlan

__all__ = ["timeline"]


def timeline(
    units: Sequence[UnitPlan], options: Sequence[UnitOption], fixed_bytes: int, floor_bytes: int
) -> list[tuple[float, int]]:
    """Return (seconds since the step began, live bytes) at the corners of a line.

    Args:
        units: Stem, units and head.
        options: How each runs.
        fixed_bytes: Alive all through the step.
        floor_bytes: Gradients and what the optimizer's step needs, at the end.
    """
    points = [(0.0, fixed_bytes)]
    seconds, prefix = 0.0, [0]
    for unit, option in zip(units, options, strict=True):
        seconds += unit.forward_s
        prefix.append(prefix[-1] + option.saved_bytes)
        points.append((seconds, fixed_bytes + prefix[-1]))
    for at in reversed(range(len(units))):
        unit, option = units[at], options[at]
        middle = seconds + (unit.backward_s + option.extra_s) / 2
        seconds += unit.backward_s + option.extra_s
        points.append((middle, fixed_bytes + prefix[at] + option.peak_bytes))
        gradients = units[at - 1].gradient_bytes if at else floor_bytes
        points.append((seconds, fixed_bytes + prefix[at] + gradients))
    return points
