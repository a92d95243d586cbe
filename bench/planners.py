"""Ways to choose what to recompute, ours and others', on one profile of a model, each choice run.

Bytes are those that the allocator hook counts. Seconds are simulated: every operator that runs takes as long as its
arithmetic or its memory traffic would on the GPU of ``GPU``, so that a noisy machine decides nothing. A way to choose
has one knob; all its settings are run, and for a budget the fastest of those that stay within it counts.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import compress, product
from typing import Any

import torch
from torch import nn
from torch._functorch._activation_checkpointing.knapsack import dp_knapsack, greedy_knapsack, ilp_knapsack
from torch.utils.checkpoint import checkpoint

from gradkern.checkpoint._allocator import load_allocator
from gradkern.checkpoint._apply import apply_recompute, remove_recompute
from gradkern.checkpoint._gpus import find_gpu
from gradkern.checkpoint._meter import AllocatorMeter, Machine, Mark, Meter
from gradkern.checkpoint._plan import infeasible
from gradkern.checkpoint._preserve import preserved
from gradkern.checkpoint._profile import Trial
from gradkern.checkpoint._recompute import Recompute
from gradkern.checkpoint._search import fit, profile
from gradkern.checkpoint._segments import Nest, names_in
from gradkern.checkpoint._simulate import Simulation
from gradkern.checkpoint._units import find_units
from gradkern.errors import PlanInfeasibleError
from gradkern.loss import compute_loss

from .architectures import Architecture
from .harness import Report
from .planner_peers import ckptplan, sac_milp
from .profiled import Choice, Profiled

__all__ = ["CHOOSERS", "compare"]

GPU = "H100"
BUDGETS = 20
SETTINGS = 20
MOST_UNITS = 6

_ROUNDING = 1 + 1e-9


def all_of_them(profiled: Profiled) -> list[Choice]:
    """Every set of units to recompute, where there are few."""
    names = profiled.names
    if len(names) > MOST_UNITS:
        return []
    return [profiled.recomputed(list(compress(names, bits))) for bits in product((0, 1), repeat=len(names))]


def every_n_layers(profiled: Profiled) -> list[Choice]:
    """As transformers' ``activation_checkpointing_enable(every_n_layers=n)``: the first of every n."""
    names = profiled.names
    return [profiled.recomputed(names[::n]) for n in range(1, len(names) + 1)]


def _by_units(knapsack: Callable[..., Any]) -> Callable[[Profiled], list[Choice]]:
    """One of torch's knapsacks over whole units."""

    def choices(profiled: Profiled) -> list[Choice]:
        names = profiled.names
        total = sum(map(profiled.spared_bytes, names))
        memory = [max(1, profiled.spared_bytes(name)) / max(1, total) for name in names]
        seconds = [profiled.again_s(name) for name in names]
        found = []
        for setting in range(SETTINGS + 1):
            _, _, again = knapsack(memory, seconds, setting / SETTINGS)
            found.append(profiled.recomputed([names[at] for at in again]))
        return found

    return choices


def _by_operators(knapsack: Callable[..., Any]) -> Callable[[Profiled], list[Choice]]:
    """One of torch's knapsacks over the operators of all units, as the partitioner of torch.compile uses them."""

    def choices(profiled: Profiled) -> list[Choice]:
        items = [
            (name, op)
            for name in profiled.names
            for op in profiled.operators[name].operators[: profiled.operators[name].needed]
            if op.held_bytes is not None and op.seconds > 0
        ]
        held_bytes = [max(1, op.held_bytes or 0) for _, op in items]  # torch divides by them
        memory = [each / sum(held_bytes) for each in held_bytes]
        found = []
        for setting in range(SETTINGS + 1):
            _, saved, again = knapsack(memory, [op.seconds for _, op in items], setting / SETTINGS)
            recomputed = {items[at][0] for at in again}
            held = {name: tuple(items[at][1].call for at in saved if items[at][0] == name) for name in recomputed}
            # Where every operator is saved there is nothing to recompute: that unit is kept.
            found.append({name: Recompute(profiled.measured.buffers[name], calls) for name, calls in held.items()})
        return found

    return choices


CHOOSERS: dict[str, Callable[[Profiled], list[Choice]]] = {
    "all sets of units": all_of_them,
    "every n layers": every_n_layers,
    "torch greedy, units": _by_units(greedy_knapsack),
    "torch dp, units": _by_units(dp_knapsack),
    "torch ilp, units": _by_units(ilp_knapsack),
    "torch greedy, operators": _by_operators(greedy_knapsack),
    "torch dp, operators": _by_operators(dp_knapsack),
    "torch ilp, operators": _by_operators(ilp_knapsack),
    "torch sac_milp": sac_milp,
    "ckptplan": ckptplan,
}


class _CountedMeter(AllocatorMeter):
    """Bytes of this machine, seconds of the simulated one."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(load_allocator())
        self._simulation = simulation

    def mark(self) -> None:
        """As ``AllocatorMeter.mark``."""
        super().mark()
        self.marks[-1] = Mark(*self.marks[-1][:2], self._simulation.seconds)


class _Counted(Machine):
    """This machine with a clock that nothing disturbs."""

    select_s = 0.0

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation

    def meter(self) -> Meter:
        """Bytes by the allocator hook."""
        return _CountedMeter(self._simulation)

    def clock(self) -> float:
        """Simulated seconds."""
        return self._simulation.seconds


class _Laboratory:
    """One model, profiled, in which choices are run."""

    def __init__(self, made: Architecture) -> None:
        self._made = made
        self._simulation = Simulation(find_gpu(GPU), 1, compares_bits=True)
        self._source = _Counted(self._simulation)
        self._runs: dict[object, tuple[int, float]] = {}
        with self._trial() as (trial, changed_buffers):
            measured = profile(trial, find_units(made.model), changed_buffers, None)
            self.profiled = Profiled(measured, trial.operators(list(measured.buffers)))

    def ours(self, budget: int) -> tuple[int, float]:
        """Peak and seconds of our choice for a budget.

        Raises:
            PlanInfeasibleError: Nothing fits.
        """
        with self._trial() as (trial, _):
            found = fit(trial, self.profiled.measured, budget, 0, 0)
        if found.choices is None:
            raise infeasible(budget, found.least_feasible_bytes)
        if found.nesting is None:
            return self.run(self.profiled.measured.recompute(found.choices))
        names = [name for segment in found.nesting.segments for name in names_in(segment)]
        return self.run(self.profiled.recomputed(names), found.nesting.segments)

    def is_no_slower(self, peak: int, seconds: float) -> bool:
        """Whether ours takes no longer than so many seconds within a peak."""
        try:
            return self.ours(peak)[1] <= seconds * _ROUNDING
        except PlanInfeasibleError:
            return False

    def least_and_natural(self) -> tuple[int, int]:
        """The smallest peak that we reach, and the peak with everything kept."""
        with self._trial() as (trial, _):
            return fit(trial, self.profiled.measured, 1, 0, 0).least_feasible_bytes, self.run({})[0]

    def run(self, choice: Choice, segments: tuple[Nest, ...] = ()) -> tuple[int, float]:
        """Peak in bytes and simulated seconds of forward and backward, each choice run once."""
        key = tuple(sorted(choice.items(), key=lambda item: item[0])), segments
        if key not in self._runs:
            with self._trial() as (trial, _):
                cycle = trial.measure(self.profiled.measured.names, choice, segments)
            seconds = math.fsum(span.forward_s + span.backward_s for span in cycle.spans)
            self._runs[key] = cycle.peak_bytes, seconds
        return self._runs[key]

    def run_segments(self, count: int) -> tuple[int, float] | None:
        """The same with the units in segments, each recomputed as a whole; None where they are in no common list."""
        names = self.profiled.names
        parent, _, _ = names[0].rpartition(".")
        holder = self._made.model.get_submodule(parent)
        if not isinstance(holder, (nn.Sequential, nn.ModuleList)) or any(n.rpartition(".")[0] != parent for n in names):
            return None
        own = dict(holder._modules)
        units = [own[name.rpartition(".")[2]] for name in names]
        size = math.ceil(len(units) / count)
        segments = [_Segment(units[at : at + size]) for at in range(0, len(units), size)]
        try:
            for name, unit in own.items():
                if unit in units:
                    at = units.index(unit)
                    if at % size == 0:
                        holder._modules[name] = segments[at // size]
                    else:
                        del holder._modules[name]
            apply_recompute(self._made.model, {}, plan_id="bench")  # key/value caches off, as for the others
            try:
                return self._measured()
            finally:
                remove_recompute(self._made.model)
        finally:
            holder._modules.clear()
            holder._modules.update(own)

    @contextmanager
    def _trial(self) -> Iterator[tuple[Trial, Callable[[], list[str]]]]:
        made = self._made
        with preserved(made.model) as aside, self._simulation.watching([]), torch.enable_grad():
            yield (
                Trial(made.model, made.batch, made.loss_fn, 1, aside.rewind_generators, self._source, _untold),
                aside.changed_buffers,
            )

    def _measured(self) -> tuple[int, float]:
        """Of the model as it is."""
        gc.collect()
        gc.disable()
        try:
            with preserved(self._made.model) as aside, self._simulation.watching([]):
                aside.rewind_generators()
                meter = _CountedMeter(self._simulation)
                with meter:
                    # As the profile runs it, so that equal choices need equal bytes.
                    loss = compute_loss(*self._made)
                    (loss / 1).backward()
        finally:
            gc.enable()
        return max(mark.peak_bytes for mark in meter.marks[1:]), meter.marks[-1].time_s - meter.marks[0].time_s


class _Segment(nn.Module):
    """Units one after the other, recomputed together."""

    def __init__(self, units: list[nn.Module]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        """Hand the first argument on from unit to unit."""
        return checkpoint(self._run, hidden, *args, use_reentrant=False, **kwargs)

    def _run(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        for unit in self.units:
            output = unit(hidden, *args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        return output


def _untold(text: str) -> None:
    """Nobody asked for progress."""


def compare(report: Report, case: str, made: Architecture) -> None:
    """Whether ours is the fastest at every budget, and at every peak that another reaches."""
    laboratory = _Laboratory(made)
    families = {}
    for name, choose in CHOOSERS.items():
        try:
            choices = choose(laboratory.profiled)
        except ImportError as missing:
            print(f"{case}: no {name}: {missing}", file=sys.stderr)
            continue
        families[name] = [laboratory.run(choice) for choice in choices]
    count = len(laboratory.profiled.names)
    segments = laboratory.run_segments(math.ceil(math.sqrt(count)))
    if segments is not None:
        families["sqrt(n)"] = [segments]
    least, natural = laboratory.least_and_natural()
    budgets = [least + (natural - least) * step // BUDGETS for step in range(1, BUDGETS + 1)]
    ours = {budget: laboratory.ours(budget) for budget in budgets}
    wins = []
    for budget, (peak, seconds) in ours.items():
        assert peak <= budget
        others = [s for runs in families.values() for p, s in runs if p <= budget]
        wins.append(seconds <= min(others, default=math.inf) * _ROUNDING)
    report.add(case, "gradkern", "fastest_within_budget", 100 * statistics.fmean(wins), "%")
    for name, runs in families.items():
        best = {budget: min((s for p, s in runs if p <= budget), default=None) for budget in budgets}
        slower = [100 * (seconds / ours[budget][1] - 1) for budget, seconds in best.items() if seconds is not None]
        report.add(case, name, "budgets_met", len(slower), "")
        if slower:
            report.add(case, name, "slower_than_gradkern_mean", statistics.fmean(slower), "%")
        equal = [laboratory.is_no_slower(peak, seconds) for peak, seconds in set(runs)]
        if equal:
            report.add(case, name, "gradkern_no_slower_at_its_peaks", 100 * statistics.fmean(equal), "%")
