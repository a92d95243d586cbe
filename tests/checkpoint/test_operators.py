"""Recomputing but for some operators: which are worth holding, and whether what runs again is what was priced."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
import torch
from checkpoint_cases import CASES
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import SAC_IGNORED_OPS

from gradkern.checkpoint import measure_peak, plan
from gradkern.checkpoint._apply import apply_recompute, remove_recompute
from gradkern.checkpoint._operators import Operator, UnitOperators, record_operators, saving_sets
from gradkern.checkpoint._profile import Trial
from gradkern.checkpoint._recompute import Recompute
from gradkern.testing import same_bits


class Count(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in SAC_IGNORED_OPS:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def made_up(costs):
    operators = [
        Operator((f"op{at}", 0), (), float(seconds), held) for at, (seconds, held) in enumerate(costs, start=1)
    ]
    return UnitOperators(tuple(operators), len(operators))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30) | st.none()), min_size=1, max_size=9))
@example([(30, 1), (40, 2), (1, 0)])
def test_no_set_is_beaten_by_any_other(costs):
    unit = made_up(costs)
    bytes_of = {op.call: op.held_bytes for op in unit.operators if op.held_bytes is not None}
    seconds_of = {op.call: op.seconds for op in unit.operators}

    def cost(held):
        return sum(map(bytes_of.get, held)), -sum(map(seconds_of.get, held))

    subsets = {cost(held) for size in range(1, 1 + len(bytes_of)) for held in itertools.combinations(bytes_of, size)}
    subsets.add((0, 0))
    front = {one for one in subsets if not any(o != one and o[0] <= one[0] and o[1] <= one[1] for o in subsets)}
    found = [cost(held) for held in saving_sets([unit], most_bytes=10**6)]
    assert found == sorted(set(found))
    assert set(found) <= front
    assert len(found) <= 48
    if len(front) <= 48:
        assert set(found) | {(0, 0)} == front | {(0, 0)}
    # The hull: of the operators sorted by seconds a byte the first, the first two and so on, and all in the end.
    worth = sorted((c for c in bytes_of if seconds_of[c]), key=lambda c: -seconds_of[c] / max(1e-9, bytes_of[c]))
    at_a_price = [cost(worth[: count + 1]) for count in range(len(worth))]
    assert {one for one in at_a_price if one in front} <= set(found)
    assert not worth or found[-1] == at_a_price[-1]
    # What takes no bytes is in every set.
    free = {call for call in worth if bytes_of[call] == 0}
    assert all(free <= set(held) for held in saving_sets([unit], most_bytes=10**6))


def test_no_set_holds_more_than_it_may():
    unit = made_up([(8, 10), (4, 10), (2, 10), (1, 10)])
    assert saving_sets([unit], 25) == [(("op1", 0),), (("op1", 0), ("op2", 0))]
    assert saving_sets([unit], 9) == []


@pytest.mark.parametrize(("equals", "most"), [(1, 48), (6, 48), (8, 36), (80, 12)])
def test_many_sets_are_thinned_out_evenly(equals, most):
    unit = made_up([(100 - at, 10) for at in range(60)])
    sizes = [unit.held_bytes(held) for held in saving_sets([unit] * equals, 10**6)]
    assert len(sizes) <= most
    assert sizes[-1] == 600
    assert max(after - before for before, after in itertools.pairwise([0, *sizes])) <= 600 / (most // 2 - 1) + 10


def test_what_the_unit_returns_is_held_for_nothing():
    class Splits(nn.Module):
        def forward(self, x):
            values, at = torch.max(torch.exp(x), dim=1)
            return values + 0.0, at[:4]

    model = nn.ModuleList([Splits()])
    ran = record_operators(model, ["0"], lambda: model[0](torch.randn(8, 16)), time.perf_counter)["0"]
    held = {op.call[0]: op.held_bytes for op in ran.operators}
    # Of the maximum, the places are returned (a part of them is as much memory as all) and the values are not.
    expected = {"aten.exp.default": 8 * 16 * 4, "aten.max.dim": 8 * 4, "aten.add.Tensor": 0, "aten.slice.Tensor": None}
    assert held == expected


def test_the_smallest_set_stays_where_there_are_many():
    unit = made_up([(5, 0)] + [(100 - at, 10) for at in range(60)])
    assert saving_sets([unit], 10**6)[0] == (("op1", 0),)


def test_what_is_written_in_place_after_it_was_returned_is_not_held():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            h = torch.sin(self.linear(x))
            return h, torch.tanh(h)

    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Two(), Two()])

        def forward(self, x):
            for block in self.blocks:
                h, x = block(x)
                with torch.no_grad():
                    h.mul_(0.5)
            return x

    model = Changes()
    ran = record_operators(model, ["blocks.0"], lambda: model(torch.randn(4, 8)), time.perf_counter)["blocks.0"]
    held = {op.call[0]: op.held_bytes for op in ran.operators}
    assert held["aten.sin.default"] is None
    assert held["aten.tanh.default"] == 0


@torch.library.custom_op("gradkern_test::noisy", mutates_args=())
def noisy(x: torch.Tensor) -> torch.Tensor:
    """Draws from the global generator, and does not say so."""
    return x + torch.rand_like(x)


noisy.register_autograd(lambda ctx, grad: grad)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        widths = (32, 8, 40, 24, 56, 16, 48, 32)
        self.layers = nn.ModuleList(itertools.starmap(nn.Linear, itertools.pairwise(widths)))

    def forward(self, x):
        h = x
        for at, layer in enumerate(self.layers):
            h = torch.cos(torch.tanh(layer(h)))
            if at == 1:
                h = noisy(h)
            if at == 3:
                h = nn.functional.dropout(h, 0.5)
        return x + h


@pytest.mark.parametrize("seed", range(8))
def test_no_option_holds_what_must_be_drawn_again(seed, monkeypatch):
    """Of a unit without equals few sets are run: none may come of it that holds what no right run has held."""
    torch.manual_seed(seed)
    seconds = torch.rand(100).tolist()
    found = Trial.operators

    def timed(self, units):
        return {
            name: replace(ran, operators=tuple(replace(op, seconds=seconds[at]) for at, op in enumerate(ran.operators)))
            for name, ran in found(self, units).items()
        }

    monkeypatch.setattr(Trial, "operators", timed)
    model, x = nn.Sequential(nn.Linear(32, 32), Noisy()), torch.randn(64, 32)
    made = plan(model, x, lambda y, _: y.square().mean(), budget="1 GiB", units="1")
    (unit,) = (unit for unit in made.units if unit.name == "1")

    def gradients():
        torch.manual_seed(7)
        return torch.autograd.grad(model(x).square().mean(), list(model.parameters()))

    expected = gradients()
    for option in unit.options:
        chosen = replace(
            made, units=tuple(replace(each, option=option.name) if each is unit else each for each in made.units)
        )
        chosen.apply(model)
        assert all(map(same_bits, gradients(), expected)), option.name
        chosen.remove(model)


def test_attention_draws_only_where_it_drops():
    def ran(dropout):
        query = torch.randn(1, 2, 8, 16)
        model = nn.Sequential(Attends(dropout), Attends(dropout))
        return record_operators(model, ["0"], lambda: model(query), time.perf_counter)["0"].operators

    assert [op.held_bytes is not None for op in ran(0.0) if "attention" in op.call[0]] == [True]
    assert [op.held_bytes for op in ran(0.5) if "dropout" in op.call[0] or "bernoulli" in op.call[0]] == [None]


class Attends(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.dropout = dropout

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=self.dropout)


class Hard(nn.Module):
    """A draw, a view, a change in place, and outputs that share a storage."""

    def __init__(self):
        super().__init__()
        self.rise, self.fall = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        h = nn.functional.dropout(self.rise(x), 0.5).view(-1, 64)
        h = torch.sin(h)
        h = torch.relu_(h * 2)
        left, right = h.chunk(2, -1)
        return x + self.fall(torch.cat([torch.exp(left), right], -1))


def test_what_cannot_be_held():
    model = nn.Sequential(Hard(), Hard())
    ran = record_operators(model, ["0", "1"], lambda: model(torch.randn(8, 16)), time.perf_counter)
    assert list(ran) == ["0", "1"]
    assert ran["0"].signature == ran["1"].signature
    held = {op.call[0]: op.held_bytes for op in ran["0"].operators}
    assert held["aten.addmm.default"] == 8 * 16 * 4
    assert held["aten.sin.default"] == 8 * 64 * 4
    # A draw must be drawn again; a view has no bytes of its own; what relu_ overwrites is not what was computed.
    drawn = [name for name in held if "bernoulli" in name or "dropout" in name]
    assert drawn
    assert all(held[name] is None for name in [*drawn, "aten.view.default", "aten.split.Tensor", "aten.relu_.default"])
    doubled = [op for op in ran["0"].operators if op.call[0] == "aten.mul.Tensor"][-1]
    assert doubled.held_bytes is None


@pytest.mark.parametrize("held", [0, 1, 2])
def test_what_runs_again_is_what_was_priced(held):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(2)))
    x = torch.randn(8, 16)
    ran = record_operators(model, ["0", "1"], lambda: model(x).sum(), time.perf_counter)
    holdable = [op.call for op in ran["0"].operators if op.held_bytes is not None][:held]
    with Count() as kept:
        model(x).sum().backward()
    model.zero_grad()
    apply_recompute(model, {name: Recompute(saved_ops=tuple(holdable)) for name in ran}, plan_id="test")
    with Count() as recomputed:
        model(x).sum().backward()
    remove_recompute(model)
    again = sum(unit.needed - sum(op.call in holdable for op in unit.operators[: unit.needed]) for unit in ran.values())
    assert len(recomputed.names) - len(kept.names) == again
    assert 0 < ran["0"].needed < len(ran["0"].operators)


@pytest.mark.parametrize("name", CASES)
def test_every_option_has_the_same_gradients_and_the_bytes_it_says(name):
    case = CASES[name]()
    free = plan(case.model, case.batch, case.loss_fn, budget="1 GiB")

    def cycle():
        torch.manual_seed(5)
        case.loss().backward()
        return [param.grad for param in case.model.parameters()]

    def gradients():
        found = measure_peak(cycle, model=case.model)
        case.model.zero_grad()
        return found.result, found.peak_bytes

    expected, _ = gradients()
    ours = sum(grad.nbytes for grad in expected)
    names = sorted({option.name for unit in free.units for option in unit.options})
    assert "select 1" in names
    for option in names:
        units = [
            replace(unit, option=option) if option in [each.name for each in unit.options] else unit
            for unit in free.units
        ]
        chosen = replace(free, units=tuple(units))
        chosen.apply(case.model)
        found = None  # those of the option before would count
        gradients()
        found, peak = gradients()
        chosen.remove(case.model)
        assert all(map(same_bits, found, expected))
        # The model of a chain, from what each unit was measured to need in other company.
        costs = [(unit.chosen.saved_bytes, unit.chosen.peak_bytes) for unit in chosen.units]
        modelled = max(sum(saved for saved, _ in costs[:at]) + peak_of_one for at, (_, peak_of_one) in enumerate(costs))
        assert 0.95 * (peak - ours) <= free.fixed_bytes + modelled <= 1.1 * (peak - ours) + 8192


def test_another_budget_from_the_same_costs(mlp_case):
    free = plan(mlp_case.model, mlp_case.batch, mlp_case.loss_fn, budget="1 GiB")
    low, high = free.least_feasible_bytes, free.natural_peak_bytes
    plans = [free.for_budget(low + 8192 + (high - low) * share // 10) for share in range(11)]
    assert [made.predicted_peak_bytes <= made.budget_bytes for made in plans] == [True] * 11
    extra = [made.extra_s for made in plans]
    assert extra == sorted(extra, reverse=True)
    assert extra[0] > extra[-1] == 0.0
    assert free.for_budget(high + 8192).units == free.units
