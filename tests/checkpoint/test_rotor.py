from __future__ import annotations

import dataclasses
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradkern import _native
from gradkern.checkpoint import _rotor
from gradkern.checkpoint._native_rotor import fastest_rotor, native_table
from gradkern.checkpoint._rotor import (
    Later,
    NestedSolution,
    Now,
    Stage,
    StageOption,
    nested_lower_bound,
    reference_table,
    simulate,
    solve_nested,
)

native = pytest.mark.skipif(_native.unavailable_reason() is not None, reason=str(_native.unavailable_reason()))
TABLES = [reference_table, pytest.param(native_table, marks=native)]
EXACT = 10**6  # slots: no capacity here is more

sizes = st.integers(0, 9)
times = st.integers(0, 12).map(lambda quarters: quarters / 4)


@st.composite
def chains(draw, max_stages=5, max_options=2, scale=1):
    """Any sizes at all, also peaks below what is left behind."""

    def size():
        return scale * draw(sizes) + (draw(st.integers(0, scale - 1)) if scale > 1 else 0)

    def option(_):
        return StageOption(size(), size() + size(), size() + size(), draw(times), draw(times))

    return [
        Stage(size(), draw(times), draw(st.integers(0, 4)) * size(), size(), tuple(map(option, range(options))), size())
        for options in draw(st.lists(st.integers(1, max_options), min_size=1, max_size=max_stages))
    ]


def random_chain(seed, count, options, is_uniform=False):
    """As profiles look: the first option saves most, the last recomputes most."""
    drawn = random.Random(seed)

    def stage():
        size, seconds = drawn.randrange(5 * 10**6, 15 * 10**6), drawn.uniform(0.5, 2.0)
        made = []
        for k in range(options):
            saved = size + int(12 * size * (1 - k / options) * drawn.uniform(0.8, 1.2))
            made.append(StageOption(saved, saved + size, saved + 2 * size, seconds, seconds * (2 + 0.9 * k / options)))
        return Stage(size, seconds, 3 * size, size, tuple(made), size)

    first = stage()
    return [first if is_uniform else stage() for _ in range(count)]


def kept_bytes(stages):
    """The peak, about, if every stage runs once."""
    return sum(stage.options[0].saved_bytes + stage.grad_bytes for stage in stages)


def all_schedules(stages, first, last):
    for option in range(len(stages[first].options)):
        if first == last:
            yield Now(first, option, None)
        else:
            yield from (Now(first, option, rest) for rest in all_schedules(stages, first + 1, last))
    for split in range(first + 1, last + 1):
        for right in all_schedules(stages, split, last):
            yield from (Later(first, split, right, left) for left in all_schedules(stages, first, split - 1))


def brute_force(stages):
    """Peak and seconds of every schedule."""
    return [simulate(stages, schedule)[:2] for schedule in all_schedules(stages, 0, len(stages) - 1)]


def least_seconds(simulated, capacity):
    return min((seconds for peak, seconds in simulated if peak <= capacity), default=math.inf)


def same(solution, expected):
    return (solution is None and expected == math.inf) or solution.seconds == expected


@pytest.mark.parametrize("table", TABLES)
@settings(max_examples=60, deadline=None)
@given(chains(), st.integers(0, 60))
def test_equals_brute_force(table, stages, capacity):
    """At the capacity drawn and at and just below the smallest that anything fits into."""
    simulated = brute_force(stages)
    least = min(peak for peak, _ in simulated)
    for bound in {capacity, least, least - 1}:
        expected = least_seconds(simulated, bound)
        solution = solve_nested(stages, bound, slots=EXACT, table=table)
        assert same(solution, expected)
        assert nested_lower_bound(stages, bound, slots=EXACT, table=table) == expected
        if solution is not None:
            peak, seconds, forwards = simulate(stages, solution.schedule)
            assert peak == solution.peak_bytes <= bound
            assert seconds == solution.seconds
            assert min(forwards) >= 1


@pytest.mark.parametrize("table", TABLES)
@settings(max_examples=60, deadline=None)
@given(chains(scale=997), st.integers(0, 60_000), st.sampled_from([1, 7, 40]))
def test_few_slots_are_feasible_and_bound_brute_force(table, stages, capacity, slots):
    simulated = brute_force(stages)
    best = least_seconds(simulated, capacity)
    assert nested_lower_bound(stages, capacity, slots=slots, table=table) <= best
    solution = solve_nested(stages, capacity, slots=slots, table=table)
    if solution is not None:
        assert solution.peak_bytes <= capacity
        assert solution.seconds >= best


@pytest.mark.parametrize("table", TABLES)
@settings(max_examples=60, deadline=None)
@given(chains(max_stages=12, max_options=3), st.lists(st.integers(-5, 120), min_size=6, max_size=6))
def test_more_capacity_never_costs_more_time(table, stages, capacities):
    solutions = [solve_nested(stages, capacity, slots=EXACT, table=table) for capacity in sorted(capacities)]
    seconds = [math.inf if solution is None else solution.seconds for solution in solutions]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("is_uniform", [False, True])
@pytest.mark.parametrize("slots", [60, 250])
def test_what_is_large_fits_and_is_near_its_bound(table, slots, is_uniform):
    stages = random_chain(slots, 24, 4, is_uniform)
    for share in (0.15, 0.4, 0.8, 1.3):
        capacity = int(share * kept_bytes(stages))
        solution = solve_nested(stages, capacity, slots=slots, table=table)
        peak, seconds, _ = simulate(stages, solution.schedule)
        assert peak == solution.peak_bytes <= capacity
        assert seconds == solution.seconds
        bound = nested_lower_bound(stages, capacity, slots=slots, table=table)
        assert 0.8 * seconds <= bound <= seconds


def revolve_forwards(steps, snapshots):
    """Griewank & Walther (ACM TOMS 26, 2000): forward steps, besides those of the adjoints, with so many snapshots."""

    def reach(snapshots, repeats):
        return math.comb(snapshots + repeats, snapshots) if repeats >= 0 else 0

    repeats = next(repeats for repeats in range(steps + 1) if steps <= reach(snapshots, repeats))
    return repeats * steps - reach(snapshots + 1, repeats - 1)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("snapshots", [1, 2, 3, 4, 7])
def test_equals_revolve_on_a_homogeneous_chain(table, snapshots):
    """Revolve keeps states only, one of them the first, and tapes one step at a time from a state not counted.

    Here a state takes a byte. The first is the caller's, but the state that a step is taped from is held: capacity for
    one tape and ``snapshots`` more bytes. A tape takes more than those, so that there never are two.
    """
    tape = 20
    stage = Stage(1, 1.0, 1, 0, (StageOption(tape, tape, tape, 0.0, 0.0),))
    for steps in range(1, 31):
        solution = solve_nested([stage] * steps, tape + snapshots, slots=EXACT, table=table)
        assert solution.seconds == revolve_forwards(steps, snapshots)
        assert sum(simulate([stage] * steps, solution.schedule).forwards) == solution.seconds + steps
    assert solve_nested([stage] * 2, tape, slots=EXACT, table=table) is None


def test_simulated_by_hand():
    """Two stages begin again, the last is kept: every byte that is alive, step by step."""
    stages = [
        Stage(100, 1.0, 30, 3, (StageOption(40, 41, 45, 1.5, 2.0),), 0),
        Stage(7, 2.0, 20, 5, (StageOption(50, 52, 60, 2.5, 4.0),), 6),
        Stage(9, 4.0, 99, 2, (StageOption(30, 33, 35, 4.5, 8.0), StageOption(10, 70, 75, 4.0, 16.0)), 8),
    ]
    schedule = Later(0, 2, right=Now(2, 0, None), left=Later(0, 1, right=Now(1, 0, None), left=Now(0, 0, None)))
    # 30; 7+20; 9+33; 9+35; then 2 of gradients and 8 of that of x_2 lie there: 2+8+30; 2+8+7+52; 2+7+60; then 7 and 6:
    # 7+6+41; 7+45
    peak, seconds, forwards = simulate(stages, schedule)
    assert (peak, seconds, forwards) == (69, (1 + 2 + 4.5 + 8) + (1 + 2.5 + 4) + (1.5 + 2), (3, 2, 1))
    chain = Now(0, 0, Now(1, 0, Now(2, 1, None)))
    # 41; 40+52; 90+70; 90+75; 40+2+60; 7+45
    assert simulate(stages, chain) == (165, 1.5 + 2.5 + 4 + 16 + 4 + 2, (1, 1, 1))


@pytest.mark.parametrize("table", TABLES)
def test_the_gradient_of_an_input_lies_there_while_earlier_stages_run_again(table):
    stage = Stage(1, 1.0, 4, 0, (StageOption(4, 4, 4, 1.0, 1.0),), 2)
    # By hand: x_1 is held while stage 1 runs, 1 + 4; its gradient, while stage 0 does, 2 + 4.
    for size, least in ((0, 5), (2, 6)):
        stages = [stage, dataclasses.replace(stage, input_grad_bytes=size)]
        assert solve_nested(stages, least - 1, slots=EXACT, table=table) is None
        assert solve_nested(stages, least, slots=EXACT, table=table).schedule == Later(
            0, 1, right=Now(1, 0, None), left=Now(0, 0, None)
        )


@pytest.mark.parametrize("table", TABLES)
def test_options_go_before_splits_and_lower_numbers_first(table):
    free = StageOption(0, 0, 0, 1.0, 1.0)
    stage = Stage(0, 0.0, 0, 0, (free, free))
    assert solve_nested([stage] * 2, 5, table=table).schedule == Now(0, 0, Now(1, 0, None))
    # Nothing can be kept beside anything, so that both splits of three are as good.
    stage = Stage(0, 0.0, 0, 0, (StageOption(5, 5, 5, 1.0, 1.0),))
    assert solve_nested([stage] * 3, 5, table=table).schedule.split == 1


@pytest.mark.parametrize("table", TABLES)
def test_what_takes_as_long_but_does_not_fit_is_not_chosen(table):
    fits, large = StageOption(4, 4, 4, 1.0, 1.0), StageOption(0, 9, 9, 1.0, 1.0)
    stage = Stage(1, 1.0, 1, 0, (large, fits))
    assert solve_nested([stage], 5, table=table).schedule == Now(0, 1, None)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("scale", "peak"), [(1, 8), (10, 77), (10, 80), (13, 102)])
def test_every_stage_of_a_stretch_must_fit_beside_its_input(table, scale, peak):
    """Stage 1 does not at 9 bytes, 2 + 8. Kept it would not do so beside stage 3, 2 + 6 + 4, but beside stage 2.

    The larger ones end where a block of the native table begins, within it and where it ends.
    """

    def stage(size, peak, saved):
        option = StageOption(scale * saved, scale * saved, scale * saved, 1.0, 1.0)
        return Stage(scale * size, 1.0, peak, 0, (option,))

    stages = [stage(0, 2 * scale, 4), stage(2, peak, 6), stage(0, 0, 1), stage(0, 0, 4)]
    needed = 2 * scale + peak
    assert solve_nested(stages[:3], needed - 1, table=table).schedule == Later(
        0, 1, right=Now(1, 0, Now(2, 0, None)), left=Now(0, 0, None)
    )
    assert solve_nested(stages, needed - 1, table=table) is None
    assert solve_nested(stages, needed, table=table).peak_bytes == needed


def with_columns(table, grid):
    """A table as one block, without what goes beyond its slots."""
    return table.transpose(1, 0, 2).reshape(grid.rows, -1)[:, : grid.slots + 1]


@native
@settings(max_examples=200, deadline=None)
@given(chains(max_stages=9, max_options=3, scale=97), st.integers(0, 9000), st.sampled_from([1, 31, 32, 100, 333]))
def test_native_fills_the_table_of_the_reference(stages, capacity, slots):
    """Every number of it, bit for bit, not merely the same schedule."""
    for round_up in (False, True):
        grid = _rotor._grid(stages, capacity, slots, round_up=round_up)
        ours, expected = (with_columns(fill(grid), grid) for fill in (native_table, reference_table))
        assert ours.tobytes() == expected.tobytes()
    solutions = [solve_nested(stages, capacity, slots=slots, table=table) for table in (native_table, None)]
    assert solutions[0] == solutions[1]


@native
@pytest.mark.parametrize("is_uniform", [False, True])
@pytest.mark.parametrize(("count", "options", "slots"), [(1, 1, 500), (30, 3, 300), (25, 8, 257), (40, 2, 64)])
def test_native_solves_what_is_large_as_the_reference_does(count, options, slots, is_uniform):
    stages = random_chain(count, count, options, is_uniform)
    for share in (0.1, 0.3, 0.6, 1.5):
        capacity = int(share * kept_bytes(stages))
        grid = _rotor._grid(stages, capacity, slots, round_up=True)
        ours, expected = (with_columns(fill(grid), grid) for fill in (native_table, reference_table))
        assert ours.tobytes() == expected.tobytes()
        assert solve_nested(stages, capacity, slots=slots, table=native_table) == solve_nested(
            stages, capacity, slots=slots
        )


@native
@pytest.mark.parametrize("snapshots", [1, 2, 4])
def test_sums_of_many_forwards_are_exact(snapshots):
    """Of as many as there can be, else the order of additions would show."""
    drawn = random.Random(snapshots)
    stages = [Stage(1, drawn.random(), 1, 0, (StageOption(20, 20, 20, 0.0, 0.0),)) for _ in range(60)]
    grid = _rotor._grid(stages, 20 + snapshots, EXACT, round_up=True)
    ours, expected = (with_columns(fill(grid), grid) for fill in (native_table, reference_table))
    assert ours.tobytes() == expected.tobytes()


@pytest.mark.parametrize("table", TABLES)
def test_times_of_any_magnitude(table):
    def chain(second):
        return [Stage(1, second, 4, 0, (StageOption(4, 4, 4, second, 2 * second),))] * 4

    expected = solve_nested(chain(1.0), 7, table=table)
    for second in (1e-320, 1e-12, 0.1, 1e200):
        solution = solve_nested(chain(second), 7, table=table)
        assert solution.schedule == expected.schedule
        assert solution.seconds == pytest.approx(expected.seconds * second, rel=1e-9, abs=0)
        bound = nested_lower_bound(chain(second), 7, table=table)
        assert bound == pytest.approx(solution.seconds, rel=1e-9, abs=0)
        assert bound <= solution.seconds


def test_a_thousand_stages_do_not_recurse():
    count = 1000
    free = Stage(0, 0.0, 0, 0, (StageOption(0, 0, 0, 0.0, 0.0),))
    # Where nothing takes time, so says the table, too large to be filled here for what it shows.
    solution = solve_nested([free] * count, 1, table=lambda grid: np.zeros((1, grid.rows, grid.slots + 1)))
    assert simulate([free] * count, solution.schedule) == (0, 0.0, (1,) * count)
    stage = Stage(1, 1.0, 1, 1, (StageOption(3, 5, 6, 1.0, 2.0),))
    schedule = Now(0, 0, None)
    for split in range(1, count):
        schedule = Later(0, split, Now(split, 0, None), schedule)
    forwards = tuple(range(count, 0, -1))
    assert simulate([stage] * count, schedule) == (count - 1 + 6, sum(forwards) + 2.0 * count, forwards)


@pytest.mark.parametrize("table", TABLES)
def test_capacities_at_the_edge(table):
    free = Stage(0, 0.0, 0, 0, (StageOption(0, 0, 0, 1.0, 1.0),))
    assert solve_nested([free], 0, table=table) == NestedSolution(Now(0, 0, None), 2.0, 0)
    assert solve_nested([free], -1, table=table) is None
    assert nested_lower_bound([free], -1, table=table) == math.inf
    large = Stage(0, 0.0, 0, 0, (StageOption(10**15, 10**15, 10**15, 1.0, 1.0),))
    assert solve_nested([large], 10**15, table=table).peak_bytes == 10**15
    assert solve_nested([large], 10**15 - 1, table=table) is None
    assert solve_nested([large], 3, table=table) is None


@pytest.mark.parametrize("solve", [solve_nested, nested_lower_bound])
@pytest.mark.parametrize("capacity", [-1, 10])
def test_what_makes_no_sense_is_refused(solve, capacity):
    option = StageOption(1, 1, 1, 1.0, 1.0)
    stage = Stage(1, 1.0, 1, 1, (option,))
    with pytest.raises(ValueError, match="no stage"):
        solve([], capacity)
    with pytest.raises(ValueError, match="stage 1 without"):
        solve([stage, dataclasses.replace(stage, options=())], capacity)
    with pytest.raises(ValueError, match="slots must be 1 or more"):
        solve([stage], capacity, slots=0)
    for wrong in (
        dataclasses.replace(stage, input_bytes=-1),
        dataclasses.replace(stage, forward_s=math.inf),
        dataclasses.replace(stage, options=(dataclasses.replace(option, saved_bytes=-1),)),
        dataclasses.replace(stage, options=(dataclasses.replace(option, backward_s=math.nan),)),
    ):
        with pytest.raises(ValueError, match="not below zero"):
            solve([wrong], capacity)


@pytest.mark.parametrize(
    ("match", "schedule"),
    [
        ("stage 0 where stage 1 is due", Now(0, 0, None)),
        ("stage 1 where stage 0 is due", Later(0, 1, Now(1, 0, None), Now(0, 0, Now(1, 0, None)))),
        ("runs stage 1, whose input is not there", Now(1, 0, None)),
        ("runs stage 2, whose input is not there", Now(0, 0, Now(2, 0, None))),
        ("runs stage 1, whose input is not there", Later(0, 1, Now(1, 0, None), Now(1, 0, None))),
        ("splits at 0", Later(0, 0, Now(0, 0, None), Now(0, 0, None))),
        ("splits at 2", Later(0, 2, Now(1, 0, None), Now(0, 0, None))),
    ],
)
def test_simulate_refuses_a_schedule_that_is_none(match, schedule):
    stage = Stage(1, 1.0, 1, 1, (StageOption(1, 1, 1, 1.0, 1.0),))
    with pytest.raises(ValueError, match=match):
        simulate([stage] * 2, schedule)


def test_the_fastest_is_the_native_one_where_there_is_one():
    assert fastest_rotor() is (native_table if _native.unavailable_reason() is None else reference_table)


@native
def test_what_would_be_read_or_written_beyond_its_end_is_refused():
    grid = _rotor._grid([Stage(1, 1.0, 1, 1, (StageOption(1, 1, 1, 1.0, 1.0),))] * 2, 40, 40, round_up=True)
    names = ["first", "option_held", "option_needs", "option_s", "input_held", "start_needs", "run_needs", "forward_s"]
    good = [torch.from_numpy(getattr(grid, name)) for name in names]
    table = torch.empty(2, 3, 32, dtype=torch.float64)
    torch.ops.gradkern._rotor_table_(*good, 40, table)
    for place, name in enumerate(names):
        for wrong in (good[place][:-1], good[place].flatten()[:1].to(torch.int32)):
            operands = [*good]
            operands[place] = wrong
            with pytest.raises(RuntimeError, match=name if name != "forward_s" else "first"):
                torch.ops.gradkern._rotor_table_(*operands, 40, table)
    for name in ("option_held", "input_held"):
        operands = [*good]
        operands[names.index(name)] = torch.tensor([0, -1])
        with pytest.raises(RuntimeError, match=f"{name}.1. must not be negative"):
            torch.ops.gradkern._rotor_table_(*operands, 40, table)
    with pytest.raises(RuntimeError, match="table"):
        torch.ops.gradkern._rotor_table_(*good, 64, table)
    with pytest.raises(RuntimeError, match="slots"):
        torch.ops.gradkern._rotor_table_(*good, -1, table)


def test_is_free_of_torch():
    code = (
        "import importlib.util, sys;"
        "spec = importlib.util.spec_from_file_location('rotor', sys.argv[1]);"
        "module = importlib.util.module_from_spec(spec); sys.modules['rotor'] = module;"
        "spec.loader.exec_module(module);"
        "assert 'torch' not in sys.modules;"
        "stage = module.Stage(1, 1.0, 1, 1, (module.StageOption(1, 1, 1, 1.0, 2.0),));"
        "print(module.solve_nested([stage], 9).seconds)"
    )
    done = subprocess.run([sys.executable, "-c", code, _rotor.__file__], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3.0"
