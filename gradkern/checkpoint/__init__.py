"""Plan which activations to recompute so that a whole training step fits into a budget of bytes."""

from __future__ import annotations

from gradkern.checkpoint._allocator import allocator_unavailable_reason
from gradkern.checkpoint._bytes import parse_bytes
from gradkern.checkpoint._guard import Guard, guard
from gradkern.checkpoint._peak import Peak, enforce, measure_peak
from gradkern.checkpoint._plan import Plan
from gradkern.checkpoint._planner import plan
from gradkern.checkpoint._shapes import ShapePlans
from gradkern.checkpoint._unit_plan import UnitOption, UnitPlan
from gradkern.checkpoint._validate import Validation

__all__ = [
    "Guard",
    "Peak",
    "Plan",
    "ShapePlans",
    "UnitOption",
    "UnitPlan",
    "Validation",
    "allocator_unavailable_reason",
    "enforce",
    "guard",
    "measure_peak",
    "parse_bytes",
    "plan",
]
