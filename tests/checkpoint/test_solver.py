from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradkern.checkpoint._solver import Option, extra_seconds, least_capacity, peak_of, solve

sizes = st.integers(0, 40)


@st.composite
def chains(draw, max_units=10, scale=1):
    units = []
    for _ in range(draw(st.integers(1, max_units))):
        count = draw(st.integers(1, 3 if max_units <= 7 else 2))
        units.append(
            [
                Option(
                    scale * draw(st.integers(-5, 40)) + (draw(st.integers(0, scale - 1)) if scale > 1 else 0),
                    scale * draw(sizes),
                    draw(st.integers(0, 20)) / 4,
                )
                for _ in range(count)
            ]
        )
    return units


def simulate(units, choices):
    """Live bytes step by step: all forwards, then all backwards; each works above what earlier units left."""
    live = peak = 0
    held = []
    for options, choice in zip(units, choices, strict=True):
        peak = max(peak, live + options[choice].peak_bytes)
        live += options[choice].saved_bytes
        held.append(options[choice])
    for option in reversed(held):
        live -= option.saved_bytes
        peak = max(peak, live + option.peak_bytes)
    assert live == 0
    return peak


def brute_force(units, capacity):
    """The least added time of any choice that fits, or None."""
    fits = [
        math.fsum(options[choice].extra_s for options, choice in zip(units, choices, strict=True))
        for choices in itertools.product(*(range(len(options)) for options in units))
        if simulate(units, choices) <= capacity
    ]
    return min(fits, default=None)


@settings(max_examples=150, deadline=None)
@given(chains(), st.integers(0, 300))
def test_equals_brute_force_where_the_grid_is_exact(units, capacity):
    best = brute_force(units, capacity)
    solution = solve(units, capacity)
    if best is None:
        assert solution is None
        return
    assert simulate(units, solution.choices) <= capacity
    assert solution.extra_s == best == extra_seconds(units, solution.choices)
    assert solution.lower_bound_s == best


@settings(max_examples=150, deadline=None)
@given(chains(max_units=7, scale=997), st.integers(0, 300_000), st.sampled_from([8, 32, 128]))
def test_coarse_grid_is_feasible_and_bounds_brute_force(units, capacity, slots):
    best = brute_force(units, capacity)
    solution = solve(units, capacity, slots=slots)
    if best is None:
        assert solution is None
        return
    assert simulate(units, solution.choices) <= capacity
    assert solution.lower_bound_s <= best <= solution.extra_s


@settings(max_examples=60, deadline=None)
@given(chains(max_units=7, scale=997), st.lists(st.integers(0, 300_000), min_size=6, max_size=6))
def test_more_capacity_never_costs_more_time(units, capacities):
    solutions = [solve(units, capacity, slots=64) for capacity in sorted(capacities)]
    times = [math.inf if solution is None else solution.extra_s for solution in solutions]
    assert times == sorted(times, reverse=True)


@settings(max_examples=100, deadline=None)
@given(chains(max_units=7))
def test_least_capacity_is_the_smallest_peak_of_any_choice(units):
    peaks = {
        choices: simulate(units, choices) for choices in itertools.product(*(range(len(options)) for options in units))
    }
    capacity, choices = least_capacity(units)
    assert capacity == min(peaks.values()) == peaks[choices] == peak_of(units, choices)
    assert solve(units, capacity) is not None
    assert solve(units, capacity - 1) is None


def test_prefers_late_units_when_early_ones_hold_memory_longer():
    # Six equal units of which three must go: recomputing the first three gives the lowest peak, as keeping
    # early units costs memory all the way.
    units = [[Option(10, 12, 0.0), Option(1, 13, 1.0)] for _ in range(6)]
    solution = solve(units, peak_of(units, (1, 1, 1, 0, 0, 0)))
    assert solution.choices == (1, 1, 1, 0, 0, 0)
    assert peak_of(units, (0, 1, 0, 1, 0, 1)) > peak_of(units, (1, 1, 1, 0, 0, 0))


def test_hundred_units_within_fifty_milliseconds():
    drawn = random.Random(0)
    units = [
        [
            Option(drawn.randrange(10**6, 10**9), drawn.randrange(10**9), 0.0),
            Option(drawn.randrange(10**6), drawn.randrange(10**9), drawn.random()),
        ]
        for _ in range(100)
    ]
    low, high = least_capacity(units)[0], peak_of(units, [0] * 100)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        solution = solve(units, (low + high) // 2)
        seconds.append(time.process_time() - start)
    assert min(seconds) <= 0.05
    assert peak_of(units, solution.choices) <= (low + high) // 2


def test_units_that_free_much_keep_the_table_small():
    # Sizes without a common divisor, so that only the coarse grid bounds the table.
    units = [[Option(-(10**7) - index, 0, 0.0), Option(1, 1, 1.0)] for index in range(3)]
    tracemalloc.start()
    solution = solve(units, 10**6)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert solution.choices == (0, 0, 0)
    assert peak < 5 * 10**6


def test_unit_without_options_is_refused():
    with pytest.raises(ValueError, match="at least one option"):
        least_capacity([[]])


def test_is_free_of_torch():
    code = (
        "import importlib.util, sys, pathlib;"
        "path = next(p for p in sys.argv[1:]);"
        "spec = importlib.util.spec_from_file_location('solver', path);"
        "module = importlib.util.module_from_spec(spec); sys.modules['solver'] = module;"
        "spec.loader.exec_module(module);"
        "assert 'torch' not in sys.modules;"
        "print(module.solve([[module.Option(1, 1, 0.0)]], 1).choices)"
    )
    from gradkern.checkpoint import _solver

    done = subprocess.run([sys.executable, "-c", code, _solver.__file__], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(0,)"
