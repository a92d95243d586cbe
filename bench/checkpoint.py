"""Suite ``checkpoint``: do plans hold their budget, are they the best, and how long does one take.

Every model of ``bench.architectures`` is planned for ten budgets between the least that fits and what it needs by
itself; each plan is applied, and a steady step runs under an allocator that refuses the first byte above the budget.
The solver is timed on chains of unrelated random options, which no real model is as hard as. Other ways to choose are
compared with in ``bench.planners``; ``bench.plan_scale`` plans what is long, large or of many lengths.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from functools import partial

import torch

import gradkern as gk
from gradkern.checkpoint import Plan
from gradkern.checkpoint._native_solver import NativeChain, fastest_chain
from gradkern.checkpoint._solver import Option, ReferenceChain, peak_of, solve
from gradkern.errors import BudgetExceededError
from gradkern.loss import compute_loss
from gradkern.testing import same_bits

from .architectures import ARCHITECTURES, Architecture
from .harness import Report, interleave
from .plan_scale import any_length, nested, offloading, seventy_billion
from .planners import compare

__all__ = ["run"]

BUDGETS = 10
CHAINS = ((100, 2), (100, 16), (1000, 16))
SHARES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9)
REFERENCE_UNITS = 100  # larger chains take the reference minutes
COMPARED = ("gpt2", "llama", "bert", "vit", "mlp_mixer", "cnn", "mlp")


def run(report: Report, rounds: int) -> None:
    """The solver, then every model."""
    for units, options in CHAINS:
        _solver(report, units, options, rounds)
    nested(report, rounds)
    runs = [record for name, make in ARCHITECTURES.items() for record in _model(report, name, make())]
    _summary(report, "all models", runs)
    report.add("all models", "gradkern", "models", len(ARCHITECTURES), "")
    for name in COMPARED:
        compare(report, name, ARCHITECTURES[name]())
    any_length(report)
    offloading(report)
    seventy_billion(report)


def _random_chain(units: int, options: int, seed: int) -> list[list[Option]]:
    drawn = random.Random(seed)
    return [
        [
            Option(drawn.randrange(10**6, 10**9), drawn.randrange(10**9), drawn.random() if k else 0.0)
            for k in range(options)
        ]
        for _ in range(units)
    ]


def _solver(report: Report, units: int, options: int, rounds: int) -> None:
    """Seconds of a solution, how far from the best it can be, and whether more capacity ever cost more."""
    case = f"{units} units x {options}"
    chain = _random_chain(units, options, seed=0)
    low, high = fastest_chain()(chain).least_capacity()[0], peak_of(chain, [0] * units)
    middle = low + (high - low) // 4
    systems: dict[str, Callable[[], object]] = {"gradkern": partial(solve, chain, middle, chain=fastest_chain())}
    if fastest_chain() is NativeChain and units <= REFERENCE_UNITS:
        systems["gradkern reference"] = partial(solve, chain, middle, chain=ReferenceChain)
    report.add_times(case, "solve", interleave(systems, report.device, rounds=rounds), systems)
    gaps, slower = [], 0
    for seed in range(5):
        chain = _random_chain(units, options, seed)
        low, high = fastest_chain()(chain).least_capacity()[0], peak_of(chain, [0] * units)
        before = float("inf")
        for share in SHARES:
            solution = solve(chain, low + int(share * (high - low)), chain=fastest_chain())
            assert solution is not None
            gaps.append((solution.extra_s - solution.lower_bound_s) / solution.extra_s if solution.extra_s else 0.0)
            slower += solution.extra_s > before
            before = solution.extra_s
    report.add(case, "gradkern", "largest_certified_gap", 100 * max(gaps), "%")
    report.add(case, "gradkern", "gap_within_1_percent", 100 * statistics.fmean(gap <= 0.01 for gap in gaps), "%")
    report.add(case, "gradkern", "more_capacity_cost_more", slower, "")


class _Training:
    """A model in training, beyond its first step, which makes the optimizer's state."""

    def __init__(self, made: Architecture) -> None:
        self._made = made
        self._optimizer = torch.optim.AdamW(made.model.parameters())
        self.free = self.plan("64 GiB")
        self.step()

    def plan(self, budget: int | str) -> Plan:
        """Planned anew, not applied."""
        return gk.checkpoint.plan(*self._made, budget=budget, optimizer=self._optimizer)

    def budgets(self) -> list[int]:
        """From a tenth above the least that fits to what the model needs by itself."""
        least, natural = self.free.least_feasible_bytes, self.free.natural_peak_bytes
        return [least + (natural - least) * k // BUDGETS for k in range(1, BUDGETS + 1)]

    def step(self) -> None:
        """One step, as in a training loop."""
        compute_loss(*self._made).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def holds(self, budget: int) -> bool:
        """Whether the second of two steps stays within the budget."""
        self.step()
        try:
            with gk.checkpoint.enforce(budget, model=self._made.model, optimizer=self._optimizer):
                self.step()
        except BudgetExceededError:
            self._optimizer.zero_grad()
            return False
        return True

    def peak_bytes(self) -> int:
        """Of a step."""
        return gk.checkpoint.measure_peak(self.step, model=self._made.model, optimizer=self._optimizer).peak_bytes


class _Run:
    """One model under one budget."""

    def __init__(self, plan: Plan, measured_bytes: int, *, is_held: bool) -> None:
        self.predicted = plan.predicted_peak_bytes / measured_bytes
        self.modelled = plan.modelled_peak_bytes / measured_bytes
        self.used = measured_bytes / plan.budget_bytes
        self.recomputes = any(unit.option != "keep" for unit in plan.units)
        self.is_held = is_held


def _model(report: Report, name: str, made: Architecture) -> list[_Run]:
    training = _Training(made)
    runs = []
    for budget in training.budgets():
        plan = training.plan(budget)
        plan.apply(made.model)
        is_held = training.holds(budget)
        measured = training.peak_bytes()
        plan.remove(made.model)
        runs.append(_Run(plan, measured, is_held=is_held))
    _summary(report, name, runs)
    least, natural = training.free.least_feasible_bytes, training.free.natural_peak_bytes
    report.add(name, "gradkern", "least_of_natural", 100 * least / natural, "%")
    report.add(name, "gradkern", "gradients_bit_equal", float(_is_bit_equal(made, training.plan(least))), "")
    return runs


def _is_bit_equal(made: Architecture, plan: Plan) -> bool:
    """Whether the plan changes no bit of any gradient, dropout included."""
    gradients = []
    for apply in (False, True):
        if apply:
            plan.apply(made.model)
        torch.manual_seed(0)
        compute_loss(*made).backward()
        gradients.append([p.grad for p in made.model.parameters() if p.grad is not None])
        made.model.zero_grad()
    plan.remove(made.model)
    return len(gradients[0]) == len(gradients[1]) and all(map(same_bits, *gradients))


def _summary(report: Report, case: str, runs: list[_Run]) -> None:
    report.add(case, "gradkern", "runs", len(runs), "")
    report.add(case, "gradkern", "budget_violations", sum(not run.is_held for run in runs), "")
    for metric, ratios in (
        ("predicted_of_measured", [run.predicted for run in runs]),
        ("modelled_of_measured", [run.modelled for run in runs]),
    ):
        report.add(case, "gradkern", f"{metric}_min", 100 * min(ratios), "%")
        report.add(case, "gradkern", f"{metric}_max", 100 * max(ratios), "%")
        within = statistics.fmean(1.0 <= ratio <= 1.01 for ratio in ratios)
        report.add(case, "gradkern", f"{metric}_within_1_percent", 100 * within, "%")
    used = [run.used for run in runs if run.recomputes]
    if used:
        report.add(case, "gradkern", "median_used_of_budget", 100 * statistics.median(used), "%")
