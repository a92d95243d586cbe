"""The rotor recurrence: nested recomputation of a chain of unlike stages. Knows numpy, not torch.

Stage ``k`` makes ``x_{k+1}`` of ``x_k``. A stage either runs such that it can be back-propagated at once (*now*, by one
of its options, whose saved bytes live until its backward), or a stretch of stages runs without saving anything and
starts again from its input when its turn comes (*later*). With ``x_a`` there, stages after ``b`` back-propagated and
``m`` bytes left, ``C(a, b, m)``, the least seconds for stages ``a`` to ``b``, is the smallest of

- now, over the options ``o`` of ``a``: ``forward_o + backward_o + C(a + 1, b, m - saved_o)``
- later, over ``a < j <= b``: ``forward_a + .. + forward_{j-1} + C(j, b, m - x_j) + C(a, j - 1, m)``

each where its runs fit into ``m`` beside the gradients made so far. That is the best among all schedules that keep
what they save until it is used; finding the best of all is NP-hard.

``m`` goes in slots. Sizes held and bytes needed are rounded up to whole slots, so that what is found fits to the byte;
rounded down, the same table proves a bound. Seconds are rounded down to a quantum so large that every sum of them is
exact: the order of additions cannot matter, more memory never costs more, and equal means equal.

``reference_table`` is the recurrence as it stands here; ``_native_rotor`` fills the same table in C++.

Source:
    Beaumont, Eyraud-Dubois, Herrmann, Joly & Shilova, "Optimal checkpointing for heterogeneous chains: how to train
    deep neural networks with limited memory", arXiv 1911.13214.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Grid",
    "Later",
    "NestedSolution",
    "Now",
    "Schedule",
    "Stage",
    "StageOption",
    "Table",
    "nested_lower_bound",
    "reference_table",
    "simulate",
    "solve_nested",
]

DEFAULT_SLOTS = 500

# Bits that a sum of doubles may have and be exact.
_SUM_BITS = 53

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class StageOption:
    """One way to run a stage forward such that it can be back-propagated.

    Attributes:
        saved_bytes: Held from its forward to its backward, its output included.
        forward_peak_bytes: Most bytes alive while it runs forward beyond what was there, saved bytes included.
        backward_peak_bytes: Most bytes alive while it runs backward beyond what was there before its forward, saved
            bytes, the gradients of its output and input and of its parameters included.
        forward_s: Seconds of its forward.
        backward_s: Seconds of its backward, whatever that recomputes included.
    """

    saved_bytes: int
    forward_peak_bytes: int
    backward_peak_bytes: int
    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class Stage:
    """One stage of a chain.

    Attributes:
        input_bytes: Size of its input; that of the first stage is the caller's and charged to nobody.
        forward_s: Seconds to run it without saving anything.
        forward_peak_bytes: Most bytes alive meanwhile beyond its input, its output included.
        grad_bytes: Gradients of parameters that its backward leaves behind for good.
        options: The ways to run it such that it can be back-propagated.
        input_grad_bytes: The gradient of its input, which lies there while earlier stages run forward again.
    """

    input_bytes: int
    forward_s: float
    forward_peak_bytes: int
    grad_bytes: int
    options: tuple[StageOption, ...]
    input_grad_bytes: int = 0


@dataclass(frozen=True)
class Now:
    """Run ``stage`` by ``option``, then ``rest``, the stages after it, if there are any, then its backward."""

    stage: int
    option: int
    rest: Schedule | None


@dataclass(frozen=True)
class Later:
    """Run from ``stage`` to before ``split`` without saving, then ``right`` from ``split`` on, then ``left`` again."""

    stage: int
    split: int
    right: Schedule
    left: Schedule


# Solving and simulating do not recurse; comparing or printing a schedule of hundreds of stages would.
Schedule: TypeAlias = Now | Later


@dataclass(frozen=True)
class NestedSolution:
    """A schedule that fits.

    Attributes:
        schedule: What to run.
        seconds: What it takes, as ``simulate`` finds.
        peak_bytes: What it needs, as ``simulate`` finds.
    """

    schedule: Schedule
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Grid:
    """A chain in whole slots and exact seconds: all that a table is filled from.

    Attributes:
        slots: What there is.
        first: Options of stage ``i`` are numbers ``first[i]`` to ``first[i + 1]``.
        option_held: What an option holds until its backward.
        option_needs: By the last stage to go and option: what must be left to take it.
        option_s: Its seconds, forward and backward.
        input_held: What the input of a stage takes.
        start_needs: By the last stage to go and stage: what it needs to run without saving, its input being held.
        run_needs: As ``start_needs``, but from an input that goes with it.
        forward_s: Seconds of a stage that saves nothing.
    """

    slots: int
    first: Integers
    option_held: Integers
    option_needs: Integers
    option_s: Floats
    input_held: Integers
    start_needs: Integers
    run_needs: Integers
    forward_s: Floats

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.forward_s)

    @property
    def rows(self) -> int:
        """Of a table."""
        return _row(0, self.stages)


# Fills a table: the least seconds, infinite where nothing fits, by block of slots, stages to go and slot of the block.
# The blocks are as wide as suits who fills them, and the last may go beyond the slots there are.
Table: TypeAlias = Callable[[Grid], Floats]


def _row(first: int, last: int) -> int:
    """Of a table, for the stages from ``first`` to ``last``."""
    return last * (last + 1) // 2 + first


def _at(table: Floats, row: int | Integers, slots: int | Integers) -> Floats:
    width = table.shape[2]
    seconds: Floats = table[slots // width, row, slots % width]
    return seconds


def solve_nested(
    stages: Sequence[Stage],
    capacity_bytes: int,
    *,
    slots: int = DEFAULT_SLOTS,
    table: Table | None = None,
) -> NestedSolution | None:
    """Choose what to run when so that the peak fits and the step takes least.

    Args:
        stages: In forward order.
        capacity_bytes: Bound on the peak, by ``simulate``, of what is chosen.
        slots: Parts that the capacity is divided into. Where they are bytes, that is where the capacity is no more,
            the schedule is the best of its kind and more capacity never costs more time.
        table: What fills the table; the reference when None.

    Returns:
        The solution, or None where nothing fits the grid.

    Raises:
        ValueError: There is no stage, a stage without options, a size or time below zero, or less than one slot.
    """
    if capacity_bytes < 0:
        _check(stages, slots)
        return None
    grid = _grid(stages, capacity_bytes, slots, round_up=True)
    filled = (table or reference_table)(grid)
    if _at(filled, _row(0, grid.stages - 1), grid.slots) == np.inf:
        return None
    schedule = _read(grid, filled)
    peak_bytes, seconds, _ = simulate(stages, schedule)
    return NestedSolution(schedule, seconds, peak_bytes)


def nested_lower_bound(
    stages: Sequence[Stage],
    capacity_bytes: int,
    *,
    slots: int = DEFAULT_SLOTS,
    table: Table | None = None,
) -> float:
    """Return seconds that no schedule of this kind beats, infinite where none fits; arguments of ``solve_nested``."""
    if capacity_bytes < 0:
        _check(stages, slots)
        return math.inf
    grid = _grid(stages, capacity_bytes, slots, round_up=False)
    return float(_at((table or reference_table)(grid), _row(0, grid.stages - 1), grid.slots))


class Simulated(NamedTuple):
    """What ``simulate`` finds; ``forwards`` says how often each stage ran forward."""

    peak_bytes: int
    seconds: float
    forwards: tuple[int, ...]


class _Backward(NamedTuple):
    """Due when the stages after it are back-propagated."""

    stage: int
    option: StageOption


class _Drop(NamedTuple):
    """Due when the stages from this one on are back-propagated: its input goes."""

    stage: int


def simulate(stages: Sequence[Stage], schedule: Schedule) -> Simulated:
    """Run a schedule step by step, with every thing that is alive by name.

    Args:
        stages: In forward order.
        schedule: For all of them.

    Returns:
        The exact peak in bytes, the seconds and how often each stage ran forward.

    Raises:
        ValueError: The schedule runs a stage whose input is not there, or does not back-propagate every stage once,
            from the last to the first.
    """
    memory = _Memory()
    seconds: list[float] = []
    forwards = [0] * len(stages)
    due = len(stages) - 1  # none once done: what ends last began with nothing held, hence at the first stage
    todo: list[Schedule | _Backward | _Drop] = [schedule]
    while todo:
        step = todo.pop()
        at = step.stage
        if isinstance(step, _Drop):
            memory.drop(f"input {at}")
        elif isinstance(step, _Backward):
            if at != due:
                raise ValueError(f"the schedule back-propagates stage {at} where stage {due} is due")
            # Both are part of the peak of the backward.
            memory.drop(f"saved {at}")
            memory.drop(f"gradient of input {at + 1}")
            memory.touch(step.option.backward_peak_bytes)
            memory.hold(f"gradients {at}", stages[at].grad_bytes)
            memory.hold(f"gradient of input {at}", stages[at].input_grad_bytes)
            seconds.append(step.option.backward_s)
            due -= 1
        elif at and f"input {at}" not in memory and f"saved {at - 1}" not in memory:
            raise ValueError(f"the schedule runs stage {at}, whose input is not there")
        elif isinstance(step, Now):
            option = stages[at].options[step.option]
            memory.touch(option.forward_peak_bytes)
            memory.hold(f"saved {at}", option.saved_bytes)
            seconds.append(option.forward_s)
            forwards[at] += 1
            todo.append(_Backward(at, option))
            if step.rest is not None:
                todo.append(step.rest)
        else:
            if not at < step.split < len(stages):
                raise ValueError(f"the schedule splits at {step.split} what begins with stage {at}")
            for k in range(at, step.split):
                memory.touch(stages[k].forward_peak_bytes)
                memory.hold(f"input {k + 1}", stages[k + 1].input_bytes)
                if k > at:
                    memory.drop(f"input {k}")
                seconds.append(stages[k].forward_s)
                forwards[k] += 1
            todo += [step.left, _Drop(step.split), step.right]
    return Simulated(memory.peak_bytes, math.fsum(seconds), tuple(forwards))


class _Memory:
    """Things alive, by name."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._bytes = 0
        self.peak_bytes = 0

    def __contains__(self, thing: str) -> bool:
        return thing in self._sizes

    def touch(self, size: int) -> None:
        """So many bytes come and go."""
        self.peak_bytes = max(self.peak_bytes, self._bytes + size)

    def hold(self, thing: str, size: int) -> None:
        self._sizes[thing] = size
        self._bytes += size
        self.touch(0)

    def drop(self, thing: str) -> None:
        self._bytes -= self._sizes.pop(thing, 0)


def _check(stages: Sequence[Stage], slots: int) -> None:
    if not stages:
        raise ValueError("there is nothing to schedule: the chain has no stage")
    if slots < 1:
        raise ValueError(f"slots must be 1 or more, got {slots}")
    for i, stage in enumerate(stages):
        if not stage.options:
            raise ValueError(f"every stage needs at least one option, got stage {i} without")
        sizes = [stage.input_bytes, stage.forward_peak_bytes, stage.grad_bytes, stage.input_grad_bytes]
        times = [stage.forward_s]
        for option in stage.options:
            sizes += [option.saved_bytes, option.forward_peak_bytes, option.backward_peak_bytes]
            times += [option.forward_s, option.backward_s]
        if min(sizes) < 0 or not all(0 <= time < math.inf for time in times):
            raise ValueError(f"sizes and seconds must be finite and not below zero, got {stage} at {i}")


def _grid(stages: Sequence[Stage], capacity_bytes: int, slots: int, *, round_up: bool) -> Grid:
    """Rounded up, whatever fits the grid fits; rounded down, whatever fits does fit the grid, in no more seconds."""
    _check(stages, slots)
    count = len(stages)
    parts, whole = (slots, capacity_bytes) if capacity_bytes > slots else (1, 1)

    def in_slots(sizes: Integers) -> Integers:
        # What is twice too large is too large, whatever the rounding; cut, it does not overflow.
        scaled = np.minimum(sizes, 2 * capacity_bytes + 1) * parts
        return -(-scaled // whole) if round_up else scaled // whole

    exponent = _exponent(stages)

    def exact(times: list[float]) -> Floats:
        # Down, so that a bound stays one.
        rounded: Floats = np.ldexp(np.floor(np.ldexp(np.array(times), -exponent)), exponent)
        return rounded

    def integers(values: Sequence[int]) -> Integers:
        return np.array(values, dtype=np.int64)

    inputs = integers([stage.input_bytes for stage in stages])
    # Nothing needs less than what it leaves behind, whatever the profile says.
    outputs = np.append(inputs[1:], 0)
    forward = np.maximum(integers([stage.forward_peak_bytes for stage in stages]), outputs)
    grads = integers([stage.grad_bytes for stage in stages])
    input_grads = integers([stage.input_grad_bytes for stage in stages])
    grads_after = np.cumsum(grads[::-1])[::-1] - grads
    # Beside a forward while stages after b are back-propagated.
    beside = grads_after + np.append(input_grads[1:], 0)

    options = [option for stage in stages for option in stage.options]
    owner = np.repeat(np.arange(count), [len(stage.options) for stage in stages])
    saved = integers([option.saved_bytes for option in options])
    option_forward = np.maximum(integers([option.forward_peak_bytes for option in options]), saved)
    option_backward = np.maximum(integers([option.backward_peak_bytes for option in options]), saved)
    option_backward = np.maximum(option_backward, (grads + input_grads)[owner]) + grads_after[owner]
    return Grid(
        slots=min(slots, capacity_bytes),
        first=np.append(0, np.cumsum([len(stage.options) for stage in stages])),
        option_held=in_slots(saved),
        option_needs=in_slots(np.maximum(beside[:, None] + option_forward, option_backward)),
        option_s=exact([option.forward_s for option in options]) + exact([option.backward_s for option in options]),
        input_held=in_slots(inputs),
        start_needs=in_slots(beside[:, None] + forward),
        run_needs=in_slots(beside[:, None] + (inputs + forward)),
        forward_s=exact([stage.forward_s for stage in stages]),
    )


def _exponent(stages: Sequence[Stage]) -> int:
    """Of the quantum of seconds, as a power of two: no schedule takes more than ``2 ** _SUM_BITS`` of it."""
    # A stage runs at most once for every split after it, and once to be back-propagated.
    forwards = len(stages) * math.fsum(stage.forward_s for stage in stages)
    last = math.fsum(max(option.forward_s + option.backward_s for option in stage.options) for stage in stages)
    return math.frexp(forwards + last)[1] - _SUM_BITS


def reference_table(grid: Grid) -> Floats:
    """Fill a table in numpy."""
    table: Floats = np.full((grid.rows, grid.slots + 1), np.inf)
    end = grid.slots + 1
    before = np.append(0.0, np.cumsum(grid.forward_s))
    for b in range(grid.stages):
        for a in range(b, -1, -1):
            row = table[_row(a, b)]
            for o in range(grid.first[a], grid.first[a + 1]):
                if a == b:
                    least = grid.option_needs[b, o]
                    np.minimum(row[least:], grid.option_s[o], out=row[least:])
                    continue
                held = grid.option_held[o]
                least = max(grid.option_needs[b, o], held)
                if least < end:
                    rest = table[_row(a + 1, b), least - held : end - held]
                    np.minimum(row[least:], grid.option_s[o] + rest, out=row[least:])
            needs = grid.start_needs[b, a]
            for j in range(a + 1, b + 1):
                held = grid.input_held[j]
                least = max(needs, held)
                if least < end:
                    right = table[_row(j, b), least - held : end - held]
                    left = table[_row(a, j - 1), least:]
                    np.minimum(row[least:], (before[j] - before[a]) + right + left, out=row[least:])
                needs = max(needs, grid.run_needs[b, j])
    return table[None]


class _Stretch(NamedTuple):
    """Stages to go, and the slots left for them."""

    first: int
    last: int
    slots: int


def _read(grid: Grid, table: Floats) -> Schedule:
    """The schedule that a table tells of: options before splits, lower numbers first."""
    before = np.append(0.0, np.cumsum(grid.forward_s))
    chosen: list[tuple[_Stretch, int, bool]] = []
    todo = [_Stretch(0, grid.stages - 1, grid.slots)]
    while todo:
        stretch = a, b, slots = todo.pop()
        option = _option_of(grid, table, stretch)
        if option is None:
            j = _split_of(grid, table, before, stretch)
            chosen.append((stretch, j, False))
            todo += [_Stretch(a, j - 1, slots), _Stretch(j, b, slots - int(grid.input_held[j]))]
        else:
            chosen.append((stretch, option - int(grid.first[a]), True))
            if a < b:
                todo.append(_Stretch(a + 1, b, slots - int(grid.option_held[option])))
    # Parts come after what they are parts of, the right one first.
    made: list[Schedule] = []
    for stretch, choice, is_now in reversed(chosen):
        if is_now:
            made.append(Now(stretch.first, choice, made.pop() if stretch.first < stretch.last else None))
        else:
            made.append(Later(stretch.first, choice, right=made.pop(), left=made.pop()))
    return made[0]


def _option_of(grid: Grid, table: Floats, stretch: _Stretch) -> int | None:
    """Number of the option that a table tells to take; None where it is a split."""
    a, b, slots = stretch
    seconds = _at(table, _row(a, b), slots)
    for option in range(grid.first[a], grid.first[a + 1]):
        rest_slots = slots - grid.option_held[option]
        if slots < grid.option_needs[b, option] or rest_slots < 0:
            continue
        rest = _at(table, _row(a + 1, b), rest_slots) if a < b else 0.0
        if grid.option_s[option] + rest == seconds:
            return option
    return None


def _split_of(grid: Grid, table: Floats, before: Floats, stretch: _Stretch) -> int:
    a, b, slots = stretch
    # The first that takes so long is not after one that fits, hence runs no stage that does not fit.
    splits = a + 1 + np.flatnonzero(grid.input_held[a + 1 : b + 1] <= slots)
    right = _at(table, _row(0, b) + splits, slots - grid.input_held[splits])
    left = _at(table, splits * (splits - 1) // 2 + a, slots)
    seconds = (before[splits] - before[a]) + right + left
    return int(splits[np.argmax(seconds == _at(table, _row(a, b), slots))])
