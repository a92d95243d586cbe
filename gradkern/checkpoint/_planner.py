"""Making a plan: profile by running, solve, run the answer, correct until it holds."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from gradkern.checkpoint._bytes import format_bytes, parse_bytes
from gradkern.checkpoint._fingerprint import Fingerprint
from gradkern.checkpoint._meter import make_meter
from gradkern.checkpoint._native_solver import fastest_chain
from gradkern.checkpoint._optimizer import OptimizerCost, measure_optimizer
from gradkern.checkpoint._plan import Plan, UnitPlan
from gradkern.checkpoint._preserve import Preserved, preserved
from gradkern.checkpoint._profile import CycleCost, Trial
from gradkern.checkpoint._recompute import applied_within, uses_cache
from gradkern.checkpoint._solver import Option, extra_seconds, peak_of, solve
from gradkern.checkpoint._storages import live_bytes, require_cpu, storages_of, tensors_of
from gradkern.checkpoint._units import HEAD, STEM, WHOLE_MODEL, find_units, unit_module
from gradkern.errors import PlanInfeasibleError
from gradkern.loss import Batch, LossFn

__all__ = ["HoldsBytes", "plan"]

# Room for the scalars that loops keep from step to step, such as losses to be logged.
_LOOP_BYTES = 4096

# Choices that are run and found above the budget before the one of least memory is taken.
_MAX_CORRECTIONS = 4

_KEEP, _RECOMPUTE = 0, 1


class HoldsBytes(Protocol):
    """Something that keeps memory for the length of training, such as a ``gradkern.rollback`` recorder."""

    def held_bytes(self) -> int:
        """Bytes it holds while training."""
        ...


@dataclass(frozen=True)
class _Outcome:
    """What a search found; ``choices`` is None where nothing fits. Holds no tensors."""

    names: tuple[str, ...]
    buffers: dict[str, tuple[str, ...]]
    kept: CycleCost
    recomputed: CycleCost
    natural_peak_bytes: int
    least_feasible_bytes: int
    choices: tuple[int, ...] | None
    predicted_peak_bytes: int
    modelled_peak_bytes: int
    gap: float


def plan(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn | None = None,
    *,
    budget: int | str,
    optimizer: torch.optim.Optimizer | None = None,
    accumulate: int = 1,
    recorder: HoldsBytes | None = None,
    units: str | Sequence[str] = (),
) -> Plan:
    """Choose which blocks of a model to recompute in backward so that a whole step fits into ``budget``.

    The peak is that of a step in its steady state: parameters, buffers, optimizer state (also where it does
    not exist yet), gradients, what is saved for backward, what operators need for a moment, the optimizer's
    own step, the batch, and whatever other CPU tensors the process holds now and the allocator hook counts.
    Costs are measured by running the model on ``batch``: a handful of forward and backward passes, and the
    optimizer on a deep copy of itself. The chosen plan is run too; what it was measured to need is
    ``predicted_peak_bytes``. Longer or larger batches need a plan of their own.

    ``model``, ``optimizer`` and the global generators of torch, Python and numpy are left bit for bit as they were;
    what a forward changes beside buffers (plain attributes, generators of its own) is not put back. Units whose
    inputs are changed in place, or that do not give the same bits when run twice, are always kept. A model in
    eval mode is profiled in train mode. Memory that a training loop holds beyond the above is not known here: an
    output kept across ``backward``, gradients kept by ``zero_grad(set_to_none=False)``, evaluation batches.

    Args:
        model: On the CPU, with no plan applied.
        batch: One micro-batch of the largest shape; see ``gradkern.loss.compute_loss``.
        loss_fn: ``(output, target) -> scalar``; None where the model computes its loss.
        budget: Bytes, or text that ``parse_bytes`` reads.
        optimizer: The optimizer of the training loop, before or after its first step; its hooks on the
            parameters are active while profiling. None counts no state and no step.
        accumulate: Micro-batches a step.
        recorder: Its ``held_bytes()`` count on top as a constant; of those, tensors it has allocated already
            and that the hook counts are not counted twice.
        units: Patterns over the names in ``model.named_modules()``, such as ``"encoder.layers.*"``, of the modules to
            decide about; of nested ones the outermost. Default: the repeated blocks that ``plan`` finds.

    Returns:
        A plan, not yet applied. More budget never gives a slower plan for the same measured costs.

    Raises:
        PlanInfeasibleError: No choice fits; the message and ``least_feasible_bytes`` name the smallest budget
            that does.
        RuntimeError: A plan is applied to the model or a part of it, or ``transformers`` gradient checkpointing is on.
        TypeError: An argument is of the wrong type.
        ValueError: ``budget`` does not parse or is not positive, a pattern in ``units`` matches nothing,
            ``accumulate`` is below 1, a tensor lies outside CPU memory, the loss has no gradient, a unit runs
            in some passes only though the global generators start alike, or the optimizer needs a closure or
            cannot step as a deep copy (one with attributes of its own, which copies of
            ``torch.optim.Optimizer`` lack): plan with ``optimizer=None`` then and leave room for its state.

    Example:
        >>> blocks = [nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(4)]
        >>> model = nn.Sequential(*blocks)
        >>> made = plan(model, torch.randn(64, 32), lambda y, x: y.square().mean(), budget="1 MiB")
        >>> made.apply(model)
        >>> made.predicted_peak_bytes <= 2**20
        True
    """
    budget_bytes = parse_bytes(budget)
    _check_arguments(model, batch, optimizer, accumulate, recorder)
    candidates = find_units(model, [units] if isinstance(units, str) else list(units))
    outcome = _search(model, batch, loss_fn, budget_bytes, optimizer, accumulate, recorder, candidates)
    if outcome.choices is None:
        raise PlanInfeasibleError(
            f"no choice of units to recompute fits into {format_bytes(budget_bytes)} ({budget_bytes} bytes); "
            f"the least feasible budget is {outcome.least_feasible_bytes} bytes "
            f"({format_bytes(outcome.least_feasible_bytes)}). Use a smaller batch or a larger budget",
            least_feasible_bytes=outcome.least_feasible_bytes,
        )
    return Plan(
        budget_bytes=budget_bytes,
        natural_peak_bytes=outcome.natural_peak_bytes,
        predicted_peak_bytes=outcome.predicted_peak_bytes,
        modelled_peak_bytes=outcome.modelled_peak_bytes,
        least_feasible_bytes=outcome.least_feasible_bytes,
        gap=outcome.gap,
        units=_unit_plans(outcome, outcome.choices),
        fingerprint=Fingerprint.of(model),
    )


def _check_arguments(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer | None,
    accumulate: int,
    recorder: HoldsBytes | None,
) -> None:
    """Raise for what cannot be planned, before anything runs."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"plan: model must be an nn.Module, got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"plan: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(accumulate, bool) or not isinstance(accumulate, int):
        raise TypeError(f"plan: accumulate must be an int, got {type(accumulate).__name__}")
    if accumulate < 1:
        raise ValueError(f"plan: accumulate must be at least 1, got {accumulate}")
    if recorder is not None and not callable(getattr(recorder, "held_bytes", None)):
        raise TypeError(f"plan: recorder must have a method held_bytes(), got {type(recorder).__name__}")
    for root in (model, batch, optimizer):
        require_cpu("plan", tensors_of(root))
    planned = applied_within(model)
    if planned is not None:
        raise RuntimeError(
            f"a plan is applied to this model or reaches into it, at {planned or 'the model itself'!r}; remove it "
            "before planning again"
        )
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False):
            raise RuntimeError(
                f"gradient checkpointing of transformers is on in {name or 'the model'!r}; call "
                "model.gradient_checkpointing_disable() first: the plan decides what is recomputed"
            )


def _search(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn | None,
    budget_bytes: int,
    optimizer: torch.optim.Optimizer | None,
    accumulate: int,
    recorder: HoldsBytes | None,
    candidates: list[str],
) -> _Outcome:
    """Profile, solve and confirm, with the model's state put aside."""
    with preserved(model) as aside, torch.enable_grad():
        trial = Trial(model, batch, loss_fn, accumulate, aside.rewind_generators)
        names, repeatable = trial.survey(candidates)
        changed = aside.changed_buffers()
        buffers = {name: _mutated_buffers(model, name, changed) for name in names if name in repeatable}
        trial.warm_up(buffers)
        kept, recomputed = trial.measure(names, {}), trial.measure(names, buffers)
        if recomputed.grad_bits != kept.grad_bits:
            buffers = _with_right_gradients(trial, names, buffers, kept)
            recomputed = trial.measure(names, buffers)
        # A plan turns key/value caches off, so its cycle with everything kept is not that of the model as it is.
        natural = trial.measure(names) if uses_cache(model) else kept
        optimizer_cost = OptimizerCost(0, 0) if optimizer is None else measure_optimizer(optimizer, kept.has_grad)
        fixed_bytes = _fixed_bytes(aside, recorder, model, optimizer, batch) + optimizer_cost.missing_state_bytes
        runs = _Runs(trial, names, buffers, fixed_bytes, optimizer_cost.step_bytes)
        options = _options(model, names, buffers, kept, recomputed)
        runs.know(tuple(_KEEP for _ in options), kept)
        runs.know(tuple(len(unit) - 1 for unit in options), recomputed)
        found = _fit(options, budget_bytes, runs)
        step_s = math.fsum(span.forward_s + span.backward_s for span in kept.spans)
        return _Outcome(
            names=tuple(names),
            buffers=buffers,
            kept=kept,
            recomputed=recomputed,
            natural_peak_bytes=runs.absolute(natural),
            least_feasible_bytes=found.least_feasible_bytes,
            choices=found.choices,
            predicted_peak_bytes=found.peak_bytes,
            modelled_peak_bytes=0 if found.choices is None else runs.modelled(options, found.choices, kept.end_bytes),
            gap=(found.extra_s - found.lower_bound_s) / (step_s + found.lower_bound_s),
        )


def _with_right_gradients(
    trial: Trial, names: list[str], buffers: dict[str, tuple[str, ...]], kept: CycleCost
) -> dict[str, tuple[str, ...]]:
    """The units that can be recomputed without a change of any gradient's bits, as ``buffers``.

    Some operators save what they fill only later (``functional.rrelu`` at the end of a unit does), so that recomputing
    hands something else to backward. Where gradients differ from run to run anyway, nothing can be told.
    """
    if trial.measure(names, {}).grad_bits != kept.grad_bits:
        return buffers
    right = {
        name: changed
        for name, changed in buffers.items()
        if trial.measure(names, {name: changed}).grad_bits == kept.grad_bits
    }
    return right if trial.measure(names, right).grad_bits == kept.grad_bits else {}


@dataclass(frozen=True)
class _Found:
    """The cheapest choice that was run and held, if any."""

    least_feasible_bytes: int
    choices: tuple[int, ...] | None
    peak_bytes: int
    extra_s: float
    lower_bound_s: float


class _Runs:
    """Peaks of whole steps under the choices that were run, each run once."""

    def __init__(
        self,
        trial: Trial,
        names: list[str],
        buffers: dict[str, tuple[str, ...]],
        fixed_bytes: int,
        step_bytes: int,
    ) -> None:
        self.fixed_bytes = fixed_bytes
        self._trial = trial
        self._names = names
        self._buffers = buffers
        self._step_bytes = step_bytes
        self._peaks: dict[tuple[int, ...], int] = {}

    def absolute(self, cycle: CycleCost) -> int:
        """Peak of the step that this cycle belongs to, the optimizer's part included."""
        return self.fixed_bytes + max(cycle.peak_bytes, cycle.end_bytes + self._step_bytes)

    def modelled(self, options: list[list[Option]], choices: tuple[int, ...], end_bytes: int) -> int:
        """Peak of a step under a choice as the solver sees it; ``end_bytes`` are the gradients'."""
        return self.fixed_bytes + max(peak_of(options, choices), end_bytes + self._step_bytes)

    def know(self, choices: tuple[int, ...], cycle: CycleCost) -> None:
        """Enter a run of one choice for stem, units and head."""
        self._peaks[choices[1:-1]] = self.absolute(cycle)

    def peak(self, choices: tuple[int, ...]) -> int:
        """Peak of a step under a choice of option for stem, units and head."""
        units = choices[1:-1]
        if units not in self._peaks:
            chosen = [name for name, option in zip(self._names, units, strict=True) if option == _RECOMPUTE]
            cycle = self._trial.measure(self._names, {name: self._buffers[name] for name in chosen})
            self._peaks[units] = self.absolute(cycle)
        return self._peaks[units]


def _fit(options: list[list[Option]], budget_bytes: int, runs: _Runs) -> _Found:
    """Solve and run until a choice holds, tightening the capacity by what the last one was over."""
    chain = fastest_chain()
    least = chain(options).least_capacity()[1]
    ends = len(options) * (_KEEP,), tuple(len(unit) - 1 for unit in options), least
    peaks = {choices: runs.peak(choices) for choices in ends}
    capacity = budget_bytes - runs.fixed_bytes
    lower_bound_s = 0.0
    for attempt in range(_MAX_CORRECTIONS):
        solution = solve(options, capacity, chain=chain)
        if solution is None:
            break
        if attempt == 0:
            lower_bound_s = solution.lower_bound_s
        peaks[solution.choices] = runs.peak(solution.choices)
        excess = peaks[solution.choices] - budget_bytes
        if excess <= 0:
            break
        capacity -= excess
    holding = [choices for choices, peak in peaks.items() if peak <= budget_bytes]
    best = min(holding, key=lambda choices: extra_seconds(options, choices), default=None)
    extra_s = 0.0 if best is None else extra_seconds(options, best)
    return _Found(
        least_feasible_bytes=min(peaks.values()),
        choices=best,
        peak_bytes=0 if best is None else peaks[best],
        extra_s=extra_s,
        lower_bound_s=min(lower_bound_s, extra_s),
    )


def _options(
    model: nn.Module, names: list[str], recomputable: Container[str], kept: CycleCost, recomputed: CycleCost
) -> list[list[Option]]:
    """Options of every span; stem, head and units that cannot be recomputed have one, ``keep``.

    Times are noisy, and noise must not decide between equal units: units of one class that save the same
    bytes share the median of their times.
    """
    kinds: dict[tuple[type[nn.Module], int, int], list[int]] = {}
    for index, name in enumerate(names, start=1):
        if name not in recomputable:
            continue
        saved = kept.spans[index].saved_bytes, recomputed.spans[index].saved_bytes
        kinds.setdefault((type(unit_module(model, name)), *saved), []).append(index)
    forward_s = {
        index: statistics.median(kept.spans[each].forward_s for each in alike)
        for alike in kinds.values()
        for index in alike
    }
    options = []
    for index, (keep, again) in enumerate(zip(kept.spans, recomputed.spans, strict=True)):
        if index in forward_s:
            options.append(
                [
                    Option(keep.saved_bytes, keep.peak_bytes, 0.0),
                    Option(again.saved_bytes, again.peak_bytes, forward_s[index]),
                ]
            )
        else:
            saved_bytes = max(keep.saved_bytes, again.saved_bytes)
            options.append([Option(saved_bytes, max(keep.peak_bytes, again.peak_bytes), 0.0)])
    return options


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


def _fixed_bytes(aside: Preserved, recorder: HoldsBytes | None, *roots: object) -> int:
    """Bytes alive all through a step: everything there is now, without what is put aside for profiling."""
    gc.collect()
    allocator = make_meter().allocator
    alive = live_bytes(allocator, *roots) + _LOOP_BYTES
    if allocator is not None:
        alive -= aside.held_bytes(allocator)
    if recorder is None:
        return alive
    known = storages_of(*roots)
    seen = 0
    if allocator is not None:
        seen = sum(
            storage.nbytes()
            for key, storage in storages_of(recorder).items()
            if key not in known and allocator.owns(storage)
        )
    return alive + max(0, recorder.held_bytes() - seen)


def _unit_plans(outcome: _Outcome, choices: tuple[int, ...]) -> tuple[UnitPlan, ...]:
    """Write a choice down."""
    names = (STEM, *outcome.names, HEAD)
    return tuple(
        UnitPlan(
            name=name,
            option="recompute" if choice == _RECOMPUTE else "keep",
            saved_bytes=kept.saved_bytes,
            recompute_saved_bytes=(recomputed if name in outcome.buffers else kept).saved_bytes,
            forward_s=kept.forward_s,
            backward_s=kept.backward_s,
            mutated_buffers=outcome.buffers.get(name, ()),
        )
        for name, choice, kept, recomputed in zip(
            names, choices, outcome.kept.spans, outcome.recomputed.spans, strict=True
        )
    )
