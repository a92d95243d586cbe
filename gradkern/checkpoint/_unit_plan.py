"""What a plan says of one unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradkern.checkpoint._recompute import OpCall, Recompute
from gradkern.checkpoint._solver import Option
from gradkern.checkpoint._units import HEAD, STEM

__all__ = ["KEEP", "NESTED", "OFFLOAD", "RECOMPUTE", "UnitOption", "UnitPlan", "checked", "read_unit"]

KEEP, RECOMPUTE, NESTED, OFFLOAD = "keep", "recompute", "nested", "offload"


@dataclass(frozen=True)
class UnitOption:
    """One way to run a unit.

    Attributes:
        name: ``"keep"`` (no wrapper at all), ``"recompute"``, ``"select 1"`` and on: recomputed but for some
            operators whose outputs are held, the more the larger the number; ``"nested"``: recomputed together with
            its neighbours, as ``Plan.segments`` says; or ``"offload"``: what it saves waits on the host, and travels as
            ``Plan.offloads`` says.
        saved_bytes: Bytes it holds from forward to backward, its output included.
        peak_bytes: Most bytes at once while it runs forward or backward, above what earlier units hold; gradients that
            are there by then included.
        extra_s: Seconds it adds to a step.
        saved_ops: The operators whose outputs are held: name, and which of its calls in the unit's forward.
    """

    name: str
    saved_bytes: int
    peak_bytes: int
    extra_s: float
    saved_ops: tuple[OpCall, ...] = ()

    @property
    def cost(self) -> Option:
        """For the solver."""
        return Option(self.saved_bytes, self.peak_bytes, self.extra_s)


@dataclass(frozen=True)
class UnitPlan:
    """One unit of a plan, in order of execution.

    Attributes:
        name: Dotted name of the module; ``<stem>`` is everything before the first block, ``<head>``
            everything after the last one, the loss included; ``<model>`` is the whole model as one unit.
        option: Name of the option chosen.
        options: All that were measured; ``"keep"`` alone for the stem, the head, units whose inputs change in place and
            units that do not repeat.
        forward_s: Seconds forward when kept.
        backward_s: Seconds backward when kept.
        gradient_bytes: Gradients of parameters that are there when its backward begins.
        mutated_buffers: Buffers that its forward changes, or may change once modules that were in eval mode
            while planning train; recomputing leaves no trace in them.
    """

    name: str
    option: str
    options: tuple[UnitOption, ...]
    forward_s: float
    backward_s: float
    gradient_bytes: int
    mutated_buffers: tuple[str, ...]

    @property
    def chosen(self) -> UnitOption:
        """The option of the name ``option``."""
        return next(option for option in self.options if option.name == self.option)

    @property
    def recompute(self) -> Recompute | None:
        """How it is recomputed; None where it is not."""
        return None if self.option in (KEEP, OFFLOAD) else Recompute(self.mutated_buffers, self.chosen.saved_ops)

    @property
    def alone(self) -> tuple[UnitOption, ...]:
        """The options that can be chosen whatever the neighbours do."""
        return tuple(option for option in self.options if option.name not in (NESTED, OFFLOAD))


def read_unit(stored: dict[str, Any]) -> UnitPlan:
    """Rebuild a unit from JSON.

    Raises:
        KeyError, TypeError, ValueError: A field is missing, of another type, or does not fit.
    """
    name = checked("name", stored["name"], str)
    buffers = checked("mutated_buffers", stored["mutated_buffers"], list)
    unit = UnitPlan(
        name=name,
        option=checked("option", stored["option"], str),
        options=tuple(_read_option(option) for option in checked("options", stored["options"], list)),
        forward_s=checked("forward_s", stored["forward_s"], (int, float)),
        backward_s=checked("backward_s", stored["backward_s"], (int, float)),
        gradient_bytes=checked("gradient_bytes", stored["gradient_bytes"], int),
        mutated_buffers=tuple(checked("mutated_buffers", buffer, str) for buffer in buffers),
    )
    if name in (STEM, HEAD) and unit.option != KEEP:
        raise ValueError(f"{name} is always kept and cannot have the option {unit.option!r}")
    if unit.option not in [option.name for option in unit.options]:
        raise ValueError(f"unit {name} has the unknown option {unit.option!r}")
    return unit


def checked(name: str, value: Any, expected: type | tuple[type, ...]) -> Any:
    """Return ``value`` if it is of the expected JSON type."""
    if isinstance(value, bool) or not isinstance(value, expected):
        raise TypeError(f"field {name} has the wrong type, {type(value).__name__}")
    return value


def _read_option(stored: dict[str, Any]) -> UnitOption:
    """Rebuild an option."""
    return UnitOption(
        name=checked("name", stored["name"], str),
        saved_bytes=checked("saved_bytes", stored["saved_bytes"], int),
        peak_bytes=checked("peak_bytes", stored["peak_bytes"], int),
        extra_s=checked("extra_s", stored["extra_s"], (int, float)),
        saved_ops=tuple(
            (checked("saved_ops", op, str), checked("saved_ops", call, int))
            for op, call in checked("saved_ops", stored["saved_ops"], list)
        ),
    )
