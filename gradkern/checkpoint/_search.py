"""Searching for a plan: profile, solve, run the answer, correct until it holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from gradkern.checkpoint._native_solver import fastest_chain
from gradkern.checkpoint._operators import UnitOperators, saving_sets
from gradkern.checkpoint._profile import CycleCost, Difference, Trial
from gradkern.checkpoint._recompute import OpCall, Recompute, uses_cache
from gradkern.checkpoint._solver import Option, extra_seconds, peak_of, solve
from gradkern.checkpoint._unit_plan import KEEP, RECOMPUTE, UnitOption, UnitPlan
from gradkern.checkpoint._units import HEAD, STEM, WHOLE_MODEL, unit_module

__all__ = ["Found", "Profile", "SavingSets", "fit", "profile"]

# Choices that are run and found above the budget before the one of least memory is taken.
_MAX_CORRECTIONS = 4


SavingSets = tuple[tuple[OpCall, ...], ...]


@dataclass(frozen=True)
class Profile:
    """What a model costs. Holds no tensors but the parameters, by which gradients are told.

    Attributes:
        names: The units in order of execution.
        buffers: Those that can be recomputed, with the buffers that their forward changes.
        kept: A cycle with every unit kept.
        natural: One of the model as it is.
        recomputed: One with every unit recomputed that can be.
        options: Of stem, units and head.
    """

    names: tuple[str, ...]
    buffers: Mapping[str, tuple[str, ...]]
    kept: CycleCost
    natural: CycleCost
    recomputed: CycleCost
    options: tuple[tuple[UnitOption, ...], ...]

    @property
    def costs(self) -> list[list[Option]]:
        """For the solver."""
        return [[option.cost for option in options] for options in self.options]

    @property
    def step_s(self) -> float:
        """Seconds forward and backward with everything kept."""
        return math.fsum(span.forward_s + span.backward_s for span in self.kept.spans)

    def recompute(self, choices: Sequence[int]) -> dict[str, Recompute]:
        """What to recompute under a choice for stem, units and head."""
        chosen = zip(self.names, choices[1:-1], self.options[1:-1], strict=True)
        return {
            name: Recompute(self.buffers[name], options[choice].saved_ops) for name, choice, options in chosen if choice
        }

    def unit_plans(self, choices: Sequence[int]) -> tuple[UnitPlan, ...]:
        """Write a choice down."""
        names = (STEM, *self.names, HEAD)
        rows = zip(names, choices, self.options, self.kept.spans, strict=True)
        return tuple(
            UnitPlan(
                name=name,
                option=options[choice].name,
                options=options,
                forward_s=kept.forward_s,
                backward_s=kept.backward_s,
                gradient_bytes=kept.visits[1].gradient_bytes if len(kept.visits) > 1 else 0,
                mutated_buffers=self.buffers.get(name, ()),
            )
            for name, choice, options, kept in rows
        )


def profile(
    trial: Trial,
    candidates: list[str],
    changed_buffers: Callable[[], list[str]],
    known_sets: Mapping[str, SavingSets] | None,
) -> Profile:
    """Measure every option of every unit.

    Args:
        trial: Runs the model.
        candidates: Names of modules that may be units.
        changed_buffers: Names the buffers that what ran so far has changed.
        known_sets: Of units, sets of operators whose outputs may be held; None finds those worth it.
    """
    trial.progress("finding the order of the units")
    names, repeatable = trial.survey(candidates)
    changed = changed_buffers()
    plain = {name: Recompute(_mutated_buffers(trial.model, name, changed)) for name in names if name in repeatable}
    if trial.source.compares_bits:
        trial.warm_up(plain)
    trial.progress("measuring with everything kept")
    kept = trial.measure(names, {})
    trial.progress("measuring with everything recomputed")
    recomputed = trial.measure(names, plain)
    repeats = trial.measure(names, {}).grad_bits == kept.grad_bits if recomputed.grad_bits != kept.grad_bits else True
    if repeats and recomputed.grad_bits != kept.grad_bits:
        plain = _with_right_gradients(trial, names, plain, kept)
        recomputed = trial.measure(names, plain)
    # A plan turns key/value caches off, so its cycle with everything kept is not that of the model as it is. A cache
    # only holds what backward needs anyway, but for copies; a simulation does without them.
    natural = trial.measure(names) if uses_cache(trial.model) and trial.source.compares_bits else kept
    trial.progress("timing operators")
    operators = trial.operators(list(plain))
    kinds = _kinds(trial, names, operators, kept, recomputed, known_sets)
    selected = _measure_sets(trial, names, plain, kinds, kept if repeats else None, recomputed)
    return Profile(
        names=tuple(names),
        buffers={name: how.mutated_buffers for name, how in plain.items()},
        kept=kept,
        natural=natural,
        recomputed=recomputed,
        options=_options(kinds, kept, recomputed, selected, trial.source.select_s),
    )


def _with_right_gradients(
    trial: Trial, names: list[str], plain: dict[str, Recompute], kept: CycleCost
) -> dict[str, Recompute]:
    """The units that can be recomputed without a change of any gradient's bits.

    Some operators save what they fill only later (``functional.rrelu`` at the end of a unit does), so that recomputing
    hands something else to backward. Gradients of the kept step must be the same bits from run to run.
    """
    right = {name: how for name, how in plain.items() if trial.measure(names, {name: how}).grad_bits == kept.grad_bits}
    return right if trial.measure(names, right).grad_bits == kept.grad_bits else {}


@dataclass(frozen=True)
class _Kind:
    """Units of one class that ran the same operators: what outputs are worth holding in one is worth it in all.

    Attributes:
        indices: Their positions among stem, units and head.
        operators: What each ran.
        forward_s: Seconds forward: noise must not decide between equal units.
        sets: Sets of operators whose outputs may be held.
    """

    indices: tuple[int, ...]
    operators: tuple[UnitOperators, ...]
    forward_s: float
    sets: SavingSets

    def again_s(self, saved_ops: tuple[OpCall, ...] = ()) -> float:
        """Seconds that run again where the outputs of ``saved_ops`` are held."""
        return self.forward_s * statistics.median(unit.share_again(saved_ops) for unit in self.operators)


def _kinds(
    trial: Trial,
    names: Sequence[str],
    operators: Mapping[str, UnitOperators],
    kept: CycleCost,
    recomputed: CycleCost,
    known_sets: Mapping[str, SavingSets] | None,
) -> list[_Kind]:
    """Sort the units that can be recomputed into kinds."""
    alike: dict[object, list[int]] = {}
    for index, name in enumerate(names, start=1):
        if name in operators:
            alike.setdefault((type(unit_module(trial.model, name)), operators[name].signature), []).append(index)
    kinds = []
    for indices in alike.values():
        ran = tuple(operators[names[index - 1]] for index in indices)
        spared = max(kept.spans[index].saved_bytes - recomputed.spans[index].saved_bytes for index in indices)
        forward_s = statistics.median(kept.spans[index].forward_s for index in indices)
        name = names[indices[0] - 1]
        sets = tuple(saving_sets(ran, spared - 1)) if known_sets is None else known_sets.get(name, ())
        kinds.append(_Kind(tuple(indices), ran, forward_s, sets))
    return kinds


def _measure_sets(
    trial: Trial,
    names: Sequence[str],
    plain: Mapping[str, Recompute],
    kinds: Sequence[_Kind],
    kept: CycleCost | None,
    recomputed: CycleCost,
) -> dict[tuple[int, int], Difference]:
    """Measure what units with some outputs held need beyond plain ones, by position of kind and of set.

    Units of one kind try different sets in one cycle, so that a model of many equal units takes one cycle more. A cycle
    whose gradients are not those of ``kept`` counts for nothing.
    """
    found: dict[tuple[int, int], Difference] = {}
    cycles = max((-(-len(kind.sets) // len(kind.indices)) for kind in kinds), default=0)
    for cycle in range(cycles):
        chosen, tried = dict(plain), {}
        for at, kind in enumerate(kinds):
            first = cycle * len(kind.indices)
            for index, number in zip(kind.indices, range(first, len(kind.sets)), strict=False):
                name = names[index - 1]
                chosen[name] = Recompute(plain[name].mutated_buffers, kind.sets[number])
                tried[at, number] = index
        trial.progress("measuring with some outputs held")
        cost = trial.measure(names, chosen)
        if kept is None or cost.grad_bits == kept.grad_bits:
            for which, index in tried.items():
                found[which] = cost.spans[index].beyond(recomputed.spans[index])
    return found


def _options(
    kinds: Sequence[_Kind],
    kept: CycleCost,
    recomputed: CycleCost,
    selected: Mapping[tuple[int, int], Difference],
    select_s: float,
) -> tuple[tuple[UnitOption, ...], ...]:
    """Options of every span; stem, head and units that cannot be recomputed have one, ``keep``."""
    options: list[tuple[UnitOption, ...]] = []
    for keep, again in zip(kept.spans, recomputed.spans, strict=True):
        saved_bytes = max(keep.saved_bytes, again.saved_bytes)
        options.append((UnitOption(KEEP, saved_bytes, max(keep.peak_bytes, again.peak_bytes), 0.0),))
    for at, kind in enumerate(kinds):
        for index, ran in zip(kind.indices, kind.operators, strict=True):
            keep, again = kept.spans[index], recomputed.spans[index]
            found = [
                UnitOption(KEEP, keep.saved_bytes, keep.peak_bytes, 0.0),
                UnitOption(RECOMPUTE, again.saved_bytes, again.peak_bytes, kind.again_s()),
            ]
            for number, saved_ops in enumerate(kind.sets):
                difference = selected.get((at, number))
                if difference is not None:
                    extra_s = kind.again_s(saved_ops) + select_s * len(ran.operators)
                    saved_bytes, peak_bytes = again.with_difference(difference)
                    found.append(UnitOption(f"select {number + 1}", saved_bytes, peak_bytes, extra_s, saved_ops))
            options[index] = tuple(found)
    return tuple(options)


def _mutated_buffers(model: nn.Module, name: str, changed: list[str]) -> tuple[str, ...]:
    """Buffers, named from the unit, that its forward changes, or may change once all of it is in train mode.

    What modules now in eval mode will change when they train is not seen by running the model, and putting them
    into train mode for a try can fail (BatchNorm refuses a batch of one); so all their buffers count.
    """
    unit = unit_module(model, name)
    prefix = "" if name == WHOLE_MODEL else name + "."
    found = dict.fromkeys(buffer.removeprefix(prefix) for buffer in changed if buffer.startswith(prefix))
    for path, module in unit.named_modules(remove_duplicate=False):
        if not module.training:
            inner = (buffer for buffer, _ in module.named_buffers(remove_duplicate=False))
            found.update(dict.fromkeys(f"{path}.{buffer}" if path else buffer for buffer in inner))
    return tuple(found)


@dataclass(frozen=True)
class Found:
    """The cheapest choice that was run and held, if any: ``choices`` is None where nothing fits."""

    least_feasible_bytes: int
    choices: tuple[int, ...] | None
    peak_bytes: int
    modelled_bytes: int
    gap: float


class _Runs:
    """Peaks of whole steps under the choices that were run, each run once."""

    def __init__(self, trial: Trial, costs: Profile, fixed_bytes: int, step_bytes: int) -> None:
        self._trial = trial
        self._costs = costs
        self._fixed_bytes = fixed_bytes
        self._step_bytes = step_bytes
        self._peaks: dict[tuple[int, ...], int] = {}

    def absolute(self, cycle: CycleCost) -> int:
        """Peak of the step that this cycle belongs to, the optimizer's part included."""
        return self._fixed_bytes + max(cycle.peak_bytes, cycle.end_bytes + self._step_bytes)

    def know(self, choices: tuple[int, ...], cycle: CycleCost) -> None:
        """Enter a run of one choice for stem, units and head."""
        self._peaks[choices] = self.absolute(cycle)

    def peak(self, choices: tuple[int, ...]) -> int:
        """Peak of a step under a choice of option for stem, units and head."""
        if choices not in self._peaks:
            self._trial.progress("running a plan")
            self.know(choices, self._trial.measure(self._costs.names, self._costs.recompute(choices)))
        return self._peaks[choices]


def fit(trial: Trial, measured: Profile, budget_bytes: int, fixed_bytes: int, step_bytes: int) -> Found:
    """Solve and run until a choice holds, tightening the capacity by what the last one was over.

    Args:
        trial: Runs the model.
        measured: Its profile.
        budget_bytes: Of the whole step.
        fixed_bytes: Alive all through it.
        step_bytes: What the optimizer's step needs for a moment.
    """
    runs = _Runs(trial, measured, fixed_bytes, step_bytes)
    costs = measured.costs
    all_kept, all_recomputed = (0,) * len(costs), tuple(min(1, len(options) - 1) for options in costs)
    runs.know(all_kept, measured.kept)
    runs.know(all_recomputed, measured.recomputed)
    chain = fastest_chain()
    least = chain(costs).least_capacity()[1]
    peaks = {choices: runs.peak(choices) for choices in (all_kept, all_recomputed, least)}
    capacity = budget_bytes - fixed_bytes
    lower_bound_s = 0.0
    for attempt in range(_MAX_CORRECTIONS):
        solution = solve(costs, capacity, chain=chain)
        if solution is None:
            break
        if attempt == 0:
            lower_bound_s = solution.lower_bound_s
        peaks[solution.choices] = runs.peak(solution.choices)
        excess = peaks[solution.choices] - budget_bytes
        if excess <= 0:
            break
        capacity -= excess
    least_bytes = min(peaks.values())
    holding = [choices for choices, peak in peaks.items() if peak <= budget_bytes]
    if not holding:
        return Found(least_bytes, None, 0, 0, 0.0)
    best = min(holding, key=lambda choices: extra_seconds(costs, choices))
    extra_s = extra_seconds(costs, best)
    lower_bound_s = min(lower_bound_s, extra_s)
    floor_bytes = measured.kept.end_bytes + step_bytes
    return Found(
        least_feasible_bytes=least_bytes,
        choices=best,
        peak_bytes=peaks[best],
        modelled_bytes=fixed_bytes + max(peak_of(costs, best), floor_bytes),
        gap=(extra_s - lower_bound_s) / (measured.step_s + lower_bound_s),
    )
