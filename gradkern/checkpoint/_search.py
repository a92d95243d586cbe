"""Searching for a plan: profile, solve, run the answer, correct until it holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from gradkern.checkpoint._apply import uses_cache
from gradkern.checkpoint._native_solver import fastest_chain
from gradkern.checkpoint._nesting import NestedChain, Nesting
from gradkern.checkpoint._offload import Offload
from gradkern.checkpoint._offloading import traffic
from gradkern.checkpoint._operators import UnitOperators, saving_sets
from gradkern.checkpoint._profile import CycleCost, Difference, Trial
from gradkern.checkpoint._recompute import OpCall, Recompute
from gradkern.checkpoint._segments import names_in
from gradkern.checkpoint._solver import MOST_BYTES, Option, extra_seconds, peak_of, solve
from gradkern.checkpoint._unit_plan import KEEP, NESTED, OFFLOAD, RECOMPUTE, UnitOption, UnitPlan
from gradkern.checkpoint._units import HEAD, STEM, WHOLE_MODEL, unit_module

__all__ = ["Found", "Profile", "SavingSets", "fit", "profile"]

# Choices that are run and found above the budget before the one of least memory is taken.
_MAX_CORRECTIONS = 8

# Sets of held outputs that are run even of units that have no equal.
_LEAST_TRIES = 6

# Nesting makes something of three units at least, and its longer way through Python is paid for by so much less time.
_LEAST_NESTED = 3
_WORTH_NESTING = 0.95


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
        repeats: Whether gradients are the same bits from run to run, so that they can be compared.
    """

    names: tuple[str, ...]
    buffers: Mapping[str, tuple[str, ...]]
    kept: CycleCost
    natural: CycleCost
    recomputed: CycleCost
    options: tuple[tuple[UnitOption, ...], ...]
    repeats: bool

    @property
    def costs(self) -> list[list[Option]]:
        """For the solver."""
        return [[option.cost for option in options] for options in self.options]

    @property
    def step_s(self) -> float:
        """Seconds forward and backward with everything kept."""
        return self.kept.seconds

    def recompute(self, choices: Sequence[int]) -> dict[str, Recompute]:
        """What to recompute under a choice for stem, units and head."""
        chosen = zip(self.names, choices[1:-1], self.options[1:-1], strict=True)
        return {
            name: Recompute(self.buffers[name], options[choice].saved_ops) for name, choice, options in chosen if choice
        }

    def unit_plans(
        self, choices: Sequence[int], nesting: Nesting | None, offloads: Sequence[Offload]
    ) -> tuple[UnitPlan, ...]:
        """Write a choice down; of units in a nesting or offloaded that is how they run."""
        names = (STEM, *self.names, HEAD)
        otherwise = self._offloaded(offloads) if nesting is None else self._nested(nesting)
        plans = []
        for name, choice, options, kept in zip(names, choices, self.options, self.kept.spans, strict=True):
            option = otherwise.get(name, options[choice])
            plans.append(
                UnitPlan(
                    name=name,
                    option=option.name,
                    options=options if option in options else (*options, option),
                    forward_s=kept.forward_s,
                    backward_s=kept.backward_s,
                    gradient_bytes=kept.visits[1].gradient_bytes if len(kept.visits) > 1 else 0,
                    mutated_buffers=self.buffers.get(name, ()),
                )
            )
        return tuple(plans)

    def _offloaded(self, offloads: Sequence[Offload]) -> dict[str, UnitOption]:
        """How offloaded units run."""
        found = {}
        for each in offloads:
            keep, again = self.options[1 + self.names.index(each.unit)][:2]
            found[each.unit] = UnitOption(OFFLOAD, again.saved_bytes, keep.peak_bytes, 0.0)
        return found

    def _nested(self, nesting: Nesting) -> dict[str, UnitOption]:
        """How units of a nesting run: recomputed, alone or together."""
        found = {}
        forwards = dict(zip(self.names, nesting.forwards, strict=True))
        for segment in nesting.segments:
            names = names_in(segment)
            for name in names:
                at = 1 + self.names.index(name)
                again = self.options[at][1]
                if len(names) > 1:
                    saved_bytes = again.saved_bytes if name == names[-1] else 0
                    extra_s = (forwards[name] - 1) * self.kept.spans[at].forward_s
                    again = UnitOption(NESTED, saved_bytes, again.peak_bytes, extra_s)
                found[name] = again
        return found


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
    repeats = True
    if recomputed.grad_bits != kept.grad_bits:
        repeats = trial.measure(names, {}).grad_bits == kept.grad_bits
        if repeats:
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
        repeats=repeats,
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

    Units of one kind try different sets in one cycle, so that a model of many equal units takes one cycle more. Where
    there are more sets than that, some are not run, but each is part of one that was, at least of that of all operators
    in any: it holds less than the smallest such one by what it lacks, and is taken to need no more at the peak. A cycle
    whose gradients are not those of ``kept`` counts for nothing, and so does a set that is part of no other.
    """
    run: dict[int, dict[frozenset[OpCall], Difference]] = {at: {} for at in range(len(kinds))}
    tries = [_tries(kind) for kind in kinds]
    cycles = max((-(-len(each) // len(kind.indices)) for each, kind in zip(tries, kinds, strict=True)), default=0)
    for cycle in range(cycles):
        chosen, tried = dict(plain), {}
        for at, kind in enumerate(kinds):
            first = cycle * len(kind.indices)
            for index, saved_ops in zip(kind.indices, tries[at][first:], strict=False):
                name = names[index - 1]
                chosen[name] = Recompute(plain[name].mutated_buffers, saved_ops)
                tried[at, frozenset(saved_ops)] = index
        trial.progress("measuring with some outputs held")
        cost = trial.measure(names, chosen)
        if kept is None or cost.grad_bits == kept.grad_bits:
            for (at, held), index in tried.items():
                run[at][held] = cost.spans[index].beyond(recomputed.spans[index])
    found: dict[tuple[int, int], Difference] = {}
    for at, kind in enumerate(kinds):
        for number, saved_ops in enumerate(kind.sets):
            ran, wanted = kind.operators[0], frozenset(saved_ops)
            larger = min((held for held in run[at] if held >= wanted), key=ran.held_bytes, default=None)
            if larger is not None:
                difference = run[at][larger]
                lacks = ran.held_bytes(larger) - ran.held_bytes(wanted)
                found[at, number] = Difference(difference.saved_bytes - lacks, difference.peak_bytes)
    return found


def _tries(kind: _Kind) -> list[tuple[OpCall, ...]]:
    """The sets of a kind to run: evenly, and where that is not all of them, that of all operators in any."""
    most = max(_LEAST_TRIES, len(kind.indices))
    if len(kind.sets) <= most:
        return list(kind.sets)
    in_any = {call for saved_ops in kind.sets for call in saved_ops}
    everything = tuple(op.call for op in kind.operators[0].operators if op.call in in_any)
    return list(dict.fromkeys([everything, *(kind.sets[number] for number in _spread(len(kind.sets), most - 1))]))


def _spread(count: int, most: int) -> list[int]:
    """At most so many of ``range(count)``, evenly, the last among them."""
    most = min(count, most)
    return [(step * count - 1) // most for step in range(1, most + 1)]


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
        again_s = kind.again_s()
        seconds = [kind.again_s(saved_ops) for saved_ops in kind.sets]
        for index, ran in zip(kind.indices, kind.operators, strict=True):
            keep, again = kept.spans[index], recomputed.spans[index]
            found = [
                UnitOption(KEEP, keep.saved_bytes, keep.peak_bytes, 0.0),
                UnitOption(RECOMPUTE, again.saved_bytes, again.peak_bytes, again_s),
            ]
            for number, saved_ops in enumerate(kind.sets):
                difference = selected.get((at, number))
                if difference is not None:
                    extra_s = seconds[number] + select_s * len(ran.operators)
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
    """The cheapest choice that was run and held, if any: ``choices`` is None where nothing fits.

    Attributes:
        least_feasible_bytes: The smallest peak that was run.
        choices: An option for stem, every unit and head.
        nesting: What stands above it for the units it nests.
        offloads: Likewise, units that are offloaded.
        peak_bytes: Of the step, as it was run.
        modelled_bytes: The same as modelled.
        gap: Bound on how much faster another choice could be, as a share of the step; of choices without nesting and
            offloading.
    """

    least_feasible_bytes: int
    choices: tuple[int, ...] | None
    nesting: Nesting | None
    offloads: tuple[Offload, ...]
    peak_bytes: int
    modelled_bytes: int
    gap: float


@dataclass(frozen=True)
class _Run:
    """A choice as it was run."""

    choices: tuple[int, ...]
    nesting: Nesting | None
    peak_bytes: int
    modelled_bytes: int
    extra_s: float
    offloads: tuple[Offload, ...] = ()


class _Search:
    """Runs whole steps under choices, each once, and keeps what they needed.

    Args:
        trial: Runs the model.
        measured: Its profile.
        fixed_bytes: Alive all through a step.
        step_bytes: What the optimizer's step needs for a moment.
    """

    def __init__(self, trial: Trial, measured: Profile, fixed_bytes: int, step_bytes: int) -> None:
        self.costs = measured.costs
        self.runs: dict[object, _Run] = {}
        self._trial = trial
        self._measured = measured
        self._fixed_bytes = fixed_bytes
        self._step_bytes = step_bytes

    def enter(self, choices: tuple[int, ...], cycle: CycleCost) -> _Run:
        """Write down a run of one choice for stem, units and head."""
        extra_s = extra_seconds(self.costs, choices)
        run = _Run(choices, None, self._step(cycle), self._modelled(peak_of(self.costs, choices)), extra_s)
        return self.runs.setdefault(choices, run)

    def run(self, choices: tuple[int, ...]) -> _Run | None:
        """Run a choice, unless it was run before; None where it changes a gradient."""
        if choices in self.runs:
            return self.runs[choices]
        self._trial.progress("running a plan")
        cycle = self._trial.measure(self._measured.names, self._measured.recompute(choices))
        if self._measured.repeats and cycle.grad_bits != self._measured.kept.grad_bits:
            return None
        return self.enter(choices, cycle)

    def run_nested(self, nesting: Nesting) -> _Run | None:
        """Run a nesting, unless it was run before; None where it changes a gradient."""
        if nesting.segments in self.runs:
            return self.runs[nesting.segments]
        inside = {name for segment in nesting.segments for name in names_in(segment)}
        all_kept = (0,) * len(self.costs)
        recompute = {name: Recompute(self._measured.buffers[name]) for name in inside}
        self._trial.progress("running a nested plan")
        cycle = self._trial.measure(self._measured.names, recompute, nesting.segments)
        if self._measured.repeats and cycle.grad_bits != self._measured.kept.grad_bits:
            return None
        run = _Run(all_kept, nesting, self._step(cycle), self._modelled(nesting.peak_bytes), nesting.extra_s)
        return self.runs.setdefault(nesting.segments, run)

    def run_offloaded(
        self, choices: tuple[int, ...], offloads: tuple[Offload, ...], modelled_bytes: int
    ) -> _Run | None:
        """Run a choice with some of the units that it keeps offloaded; None where that changes a gradient."""
        if (choices, offloads) in self.runs:
            return self.runs[choices, offloads]
        self._trial.progress("running a plan that offloads")
        recompute = self._measured.recompute(choices)
        cycle = self._trial.measure(self._measured.names, recompute, offloads=offloads)
        if self._measured.repeats and cycle.grad_bits != self._measured.kept.grad_bits:
            return None
        # What waits for the link shows in the clock.
        extra_s = max(extra_seconds(self.costs, choices), cycle.seconds - self._measured.kept.seconds)
        run = _Run(choices, None, self._step(cycle), self._modelled(modelled_bytes), extra_s, offloads)
        return self.runs.setdefault((choices, offloads), run)

    def _step(self, cycle: CycleCost) -> int:
        """Peak of the step that a cycle belongs to, the optimizer's part included."""
        return self._fixed_bytes + max(cycle.peak_bytes, cycle.end_bytes + self._step_bytes)

    def _modelled(self, cycle_bytes: int) -> int:
        return self._fixed_bytes + max(cycle_bytes, self._measured.kept.end_bytes + self._step_bytes)


def fit(
    trial: Trial,
    measured: Profile,
    budget_bytes: int,
    fixed_bytes: int,
    step_bytes: int,
    link_bytes_per_s: float = 0.0,
) -> Found:
    """Solve and run until a choice holds, tightening the capacity by what the last one was over.

    Args:
        trial: Runs the model.
        measured: Its profile.
        budget_bytes: Of the whole step.
        fixed_bytes: Alive all through it.
        step_bytes: What the optimizer's step needs for a moment.
        link_bytes_per_s: Of the link to a host that what units save may wait on; 0 where there is none.
    """
    search = _Search(trial, measured, fixed_bytes, step_bytes)
    costs, chain = search.costs, fastest_chain()
    search.enter((0,) * len(costs), measured.kept)
    search.enter(tuple(min(1, len(options) - 1) for options in costs), measured.recomputed)
    search.run(chain(costs).least_capacity()[1])
    capacity = min(budget_bytes - fixed_bytes, MOST_BYTES)
    lower_bound_s = math.inf  # where no choice without nesting fits, none is faster
    for attempt in range(_MAX_CORRECTIONS):
        solution = solve(costs, capacity, chain=chain)
        if solution is None:
            break
        if attempt == 0:
            lower_bound_s = solution.lower_bound_s
        run = search.run(solution.choices)
        if run is None or run.peak_bytes <= budget_bytes:
            break
        capacity -= run.peak_bytes - budget_bytes
    if link_bytes_per_s > 0.0:
        _offload(search, measured, budget_bytes, fixed_bytes, link_bytes_per_s)
    single = _fastest(search, budget_bytes)
    _nest(search, measured, budget_bytes, fixed_bytes, None if single is None else single.extra_s)
    least_bytes = min(run.peak_bytes for run in search.runs.values())
    best = _fastest(search, budget_bytes)
    if best is None:
        return Found(least_bytes, None, None, (), 0, 0, 0.0)
    lower_bound_s = min(lower_bound_s, best.extra_s)
    return Found(
        least_feasible_bytes=least_bytes,
        choices=best.choices,
        nesting=best.nesting,
        offloads=best.offloads,
        peak_bytes=best.peak_bytes,
        modelled_bytes=best.modelled_bytes,
        gap=(best.extra_s - lower_bound_s) / (measured.step_s + lower_bound_s),
    )


def _fastest(search: _Search, budget_bytes: int) -> _Run | None:
    holding = [run for run in search.runs.values() if run.peak_bytes <= budget_bytes]
    return min(holding, key=lambda run: run.extra_s, default=None)


def _offload(search: _Search, measured: Profile, budget_bytes: int, fixed_bytes: int, link_bytes_per_s: float) -> None:
    """Run choices that offload, of those that should be faster than what holds the fastest first."""
    chain = fastest_chain()
    spared = fixed_bytes
    for _ in range(_MAX_CORRECTIONS):
        capacity = min(budget_bytes - spared, MOST_BYTES)
        holding = _fastest(search, budget_bytes)
        best = None
        for way in traffic(measured.names, measured.buffers, measured.kept.spans, link_bytes_per_s):
            costs = way.costs(measured.names, search.costs)
            solution = solve(costs, capacity, chain=chain)
            faster = solution is not None and (best is None or solution.extra_s < best[0].extra_s)
            if solution is not None and faster and (holding is None or solution.extra_s < holding.extra_s):
                best = solution, way.offloads, peak_of(costs, solution.choices)
        if best is None:
            break
        run = search.run_offloaded(best[0].choices, *best[1:])
        if run is None or run.peak_bytes <= budget_bytes:
            break
        spared += run.peak_bytes - budget_bytes


def _nest(search: _Search, measured: Profile, budget_bytes: int, fixed_bytes: int, single_s: float | None) -> None:
    """Run nestings where nothing else holds, or where one should be faster than what does (``single_s``)."""
    if len(measured.buffers) < len(measured.names) or len(measured.names) < _LEAST_NESTED:
        return
    nested = NestedChain.of(measured.names, measured.kept, measured.recomputed)
    if nested is None:
        return
    capacity = min(budget_bytes - fixed_bytes, MOST_BYTES)
    for _ in range(_MAX_CORRECTIONS):
        nesting = nested.fastest(capacity)
        if nesting is None or (single_s is not None and nesting.extra_s > _WORTH_NESTING * single_s):
            break
        run = search.run_nested(nesting)
        if run is None or run.peak_bytes <= budget_bytes:
            break
        capacity -= run.peak_bytes - budget_bytes
    if _fastest(search, budget_bytes) is None:
        smallest = nested.smallest(max(run.peak_bytes for run in search.runs.values()) - fixed_bytes)
        if smallest is not None:
            search.run_nested(smallest)
