from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradkern import _native
from gradkern.checkpoint._native_solver import NativeChain
from gradkern.checkpoint._solver import Option, ReferenceChain, extra_seconds, peak_of, solve

native = pytest.mark.skipif(_native.unavailable_reason() is not None, reason=str(_native.unavailable_reason()))
CHAINS = [ReferenceChain, pytest.param(NativeChain, marks=native)]

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


def random_units(seed, count, options):
    drawn = random.Random(seed)
    return [
        [
            Option(drawn.randrange(-(10**6), 10**9), drawn.randrange(10**9), drawn.random() if k else 0.0)
            for k in range(options)
        ]
        for _ in range(count)
    ]


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


@pytest.mark.parametrize("chain", CHAINS)
@settings(max_examples=150, deadline=None)
@given(chains(), st.integers(-50, 300))
def test_equals_brute_force(chain, units, capacity):
    best = brute_force(units, capacity)
    solution = solve(units, capacity, chain=chain)
    if best is None:
        assert solution is None
        return
    assert simulate(units, solution.choices) <= capacity
    assert solution.extra_s == best == extra_seconds(units, solution.choices)
    assert solution.lower_bound_s == best


@pytest.mark.parametrize("chain", CHAINS)
@settings(max_examples=150, deadline=None)
@given(chains(max_units=7, scale=997), st.integers(0, 300_000), st.sampled_from([2, 3, 5]))
def test_few_states_are_feasible_and_bound_brute_force(chain, units, capacity, states):
    best = brute_force(units, capacity)
    solution = solve(units, capacity, states=states, chain=chain)
    if best is None:
        assert solution is None
        return
    assert simulate(units, solution.choices) <= capacity
    assert solution.lower_bound_s <= best <= solution.extra_s


@settings(max_examples=60, deadline=None)
@given(chains(max_units=7, scale=997), st.lists(st.integers(0, 300_000), min_size=6, max_size=6))
def test_more_capacity_never_costs_more_time(units, capacities):
    solutions = [solve(units, capacity) for capacity in sorted(capacities)]
    times = [math.inf if solution is None else solution.extra_s for solution in solutions]
    assert times == sorted(times, reverse=True)


def milp(units, capacity):
    """The least added time by HiGHS: a 0/1 variable for every option, two rows for every unit: one choice, its peak."""
    owner = np.repeat(np.arange(len(units)), [len(options) for options in units])
    saved = np.array([option.saved_bytes for options in units for option in options], dtype=float)
    peak = np.array([option.peak_bytes for options in units for option in options], dtype=float)
    extra = np.array([option.extra_s for options in units for option in options])
    unit = np.arange(len(units))[:, None]
    is_own = (owner == unit).astype(float)
    held = (owner < unit) * saved + is_own * peak
    done = scipy.optimize.milp(
        extra,
        integrality=np.ones(len(extra)),
        bounds=(0, 1),
        constraints=[(is_own, 1, 1), (held / capacity, -np.inf, 1)],
        options={"mip_rel_gap": 0.0},
    )
    assert done.success
    return done.fun


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
@pytest.mark.parametrize(("count", "options"), [(15, 3), (25, 4), (40, 2)])
def test_equals_a_mixed_integer_solver(chain, share, count, options):
    units = random_units(count, count, options)
    low, high = ReferenceChain(units).least_capacity()[0], peak_of(units, [0] * count)
    capacity = low + int(share * (high - low))
    solution = solve(units, capacity, chain=chain)
    assert solution.extra_s == solution.lower_bound_s == pytest.approx(milp(units, capacity), rel=1e-6, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(chains(max_units=7))
def test_least_capacity_is_the_smallest_peak_of_any_choice(units):
    peaks = {
        choices: simulate(units, choices) for choices in itertools.product(*(range(len(options)) for options in units))
    }
    capacity, choices = ReferenceChain(units).least_capacity()
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


@native
@settings(max_examples=300, deadline=None)
@given(chains(max_units=7, scale=997), st.integers(-1000, 300_000), st.sampled_from([2, 3, 8, 4096]))
def test_native_gives_the_answers_of_the_reference(units, capacity, states):
    """The same choice and the same bound, bit for bit, not merely as good ones."""
    ours, reference = NativeChain(units), ReferenceChain(units)
    assert ours.least_capacity() == reference.least_capacity()
    assert ours.cheapest(capacity, states) == reference.cheapest(capacity, states)


@native
@pytest.mark.parametrize("states", [50, 4096])
@pytest.mark.parametrize(("count", "options"), [(1, 1), (40, 3), (100, 16), (7, 300)])
def test_native_solves_what_is_large_as_the_reference_does(count, options, states):
    units = random_units(count, count, options)
    low, high = ReferenceChain(units).least_capacity()[0], peak_of(units, [0] * count)
    for share in (0.0, 0.3, 0.7):
        capacity = low + int(share * (high - low))
        solution = solve(units, capacity, states=states, chain=NativeChain)
        assert solution == solve(units, capacity, states=states)
        assert states == 50 or solution.extra_s == solution.lower_bound_s
        assert peak_of(units, solution.choices) <= capacity


@pytest.mark.parametrize("chain", CHAINS)
def test_units_that_free_much(chain):
    units = [[Option(-(10**7) - index, 0, 0.0), Option(1, 1, 1.0)] for index in range(3)]
    assert solve(units, 10**6, chain=chain).choices == (0, 0, 0)


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_without_units(chain):
    assert solve([], 10, chain=chain).choices == ()


@pytest.mark.parametrize("chain", CHAINS)
def test_unit_without_options_is_refused(chain):
    with pytest.raises(ValueError, match="at least one option"):
        chain([[Option(1, 1, 0.0)], []])


@native
def test_what_would_be_read_beyond_its_end_is_refused():
    first, column, choices = torch.tensor([0, 2]), torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    extra = torch.zeros(2, dtype=torch.float64)
    good = [first, column, column, extra]
    bad = [
        ("first", 0, torch.tensor([0, 2, 3])),
        ("first must begin", 0, torch.tensor([1, 2])),
        ("expected 1 to", 0, torch.tensor([0, 0])),
        ("saved", 1, torch.zeros(1, dtype=torch.int64)),
        ("peak", 2, torch.zeros(2)),
        ("extra", 3, column),
    ]
    assert torch.ops.gradkern._prefix_knapsack_(*good, 10, 2, choices)
    for match, place, wrong in bad:
        operands = [*good]
        operands[place] = wrong
        with pytest.raises(RuntimeError, match=match):
            torch.ops.gradkern._prefix_knapsack_(*operands, 10, 2, choices)
        with pytest.raises(RuntimeError, match=match):
            torch.ops.gradkern._least_capacity_(*operands, choices)
    with pytest.raises(RuntimeError, match="states must be 2 or more"):
        torch.ops.gradkern._prefix_knapsack_(*good, 10, 1, choices)


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
