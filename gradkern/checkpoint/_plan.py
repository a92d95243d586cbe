"""The plan: what is kept, what is recomputed, and what that was measured to need."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import secrets
import stat
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradkern.checkpoint._apply import applied_within, apply_recompute, is_applied, remove_recompute
from gradkern.checkpoint._bytes import format_bytes, parse_bytes
from gradkern.checkpoint._fingerprint import Fingerprint, TensorInfo
from gradkern.checkpoint._native_solver import fastest_chain
from gradkern.checkpoint._offload import Offload
from gradkern.checkpoint._plot import Picture, draw
from gradkern.checkpoint._recompute import Recompute
from gradkern.checkpoint._segments import Nest, names_in
from gradkern.checkpoint._solver import MOST_BYTES, Option, peak_of, solve
from gradkern.checkpoint._timeline import timeline
from gradkern.checkpoint._unit_plan import NESTED, OFFLOAD, UnitPlan, checked, read_unit
from gradkern.checkpoint._units import HEAD, STEM
from gradkern.errors import PlanInfeasibleError
from gradkern.loss import Batch, LossFn

if TYPE_CHECKING:
    from gradkern.checkpoint._job import HoldsBytes
    from gradkern.checkpoint._validate import Validation

__all__ = ["Plan", "choose", "infeasible", "least_peak"]

_FORMAT = "gradkern.checkpoint.plan"
_VERSION = 3


@dataclass(frozen=True)
class Plan:
    """Which units of a model to recompute in backward so that a step fits into a budget. Made by ``plan``.

    Attributes:
        budget_bytes: The budget it was made for.
        natural_peak_bytes: Peak of a step of the model as it is.
        predicted_peak_bytes: Peak of a step under this plan; a step under it was run and measured.
        modelled_peak_bytes: The same as the profile of the units alone foretold it.
        least_feasible_bytes: The smallest peak of the plans that were run to make this one. Nesting may meet a smaller
            budget still; the error of one that cannot be met names the least.
        gap: Bound on how much faster any other choice of units could be, as a fraction of the time of forward
            and backward under the ideal choice. It is proven for a chain of units, one after the other, with the
            bytes and seconds measured for each and without nesting; 0.0 means that no choice is faster there, or that
            none but a nested one fits.
        fixed_bytes: Of every peak, what is alive all through a step: parameters, buffers, optimizer state, the batch.
        floor_bytes: Above those, what the end of a step needs whatever is chosen: gradients and the optimizer's own.
        source: What its bytes and seconds were read from: ``"cpu"``, the name of the GPU that the model is on, or
            ``"simulated ..."``.
        units: What to do with each unit.
        segments: Units that are recomputed together, by name: what flows into the first is held, and when backward
            arrives they all run again, of inner tuples only holding what flows in. Empty unless units are nested.
        offloads: Units whose saved tensors wait on the host, and when they travel. Empty unless some are offloaded.
        fingerprint: The model it is for.
    """

    budget_bytes: int
    natural_peak_bytes: int
    predicted_peak_bytes: int
    modelled_peak_bytes: int
    least_feasible_bytes: int
    gap: float
    fixed_bytes: int
    floor_bytes: int
    source: str
    units: tuple[UnitPlan, ...]
    segments: tuple[Nest, ...]
    offloads: tuple[Offload, ...]
    fingerprint: Fingerprint

    def apply(self, model: nn.Module) -> None:
        """Make the planned units of ``model`` recompute in backward, in place.

        Module identities, classes, hooks and ``state_dict`` keys stay; ``copy.deepcopy`` and pickles of the
        model carry the plan along. Gradients are bit-equal to those of the unwrapped model, dropout included,
        as long as units compute from arguments, parameters, buffers and torch's global generator alone; that
        they did so was checked while planning. Buffers such as running statistics are updated once. Modules
        with a ``use_cache`` argument are called with ``use_cache=False`` while gradients are enabled.
        ``torch.compile`` cannot trace units that are nested or selective, or recomputed ones with
        ``mutated_buffers``. Selective units can be back-propagated once.

        Args:
            model: A model with the class, modules, parameters and buffers of the one planned for.

        Raises:
            ValueError: The model is not the one planned for; the message names the first difference.
            RuntimeError: This or another plan is applied already, to the model or to a part of it. Nothing is
                changed in either case.
        """
        difference = self.fingerprint.difference(Fingerprint.of(model))
        if difference is not None:
            raise ValueError(f"this plan is for another model: {difference}; make a plan for this one")
        if is_applied(model):
            which = "this plan" if is_applied(model, self._id) else "another plan"
            raise RuntimeError(f"{which} is applied to this model already; remove it first")
        planned = applied_within(model)
        if planned is not None:
            raise RuntimeError(
                f"a plan made for another model reaches into this one, at {planned!r}; remove that plan from the "
                "model it was applied to first"
            )
        apply_recompute(model, self._recompute(), self.segments, self.offloads, plan_id=self._id)

    def validate(
        self,
        model: nn.Module,
        batch: Batch,
        loss_fn: LossFn | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        accumulate: int = 1,
        recorder: HoldsBytes | None = None,
    ) -> Validation:
        """Measure a step under this plan, and put a new plan in its place where that is called for.

        That is where the step needs more than the budget, or gives other gradients than without a plan, bit for bit.

        Forward and backward run on the batch, the optimizer steps as a deep copy; afterwards everything is as it was,
        as after ``plan``. Of use where the batch is not the one planned for, or the plan was made elsewhere: on another
        machine, for a GPU, with ``for_budget`` or for a length between.

        Args:
            model: With this plan applied, on the CPU or one GPU.
            batch: As in ``checkpoint.plan``; likewise what follows.
            loss_fn: See there.
            optimizer: See there.
            accumulate: See there.
            recorder: See there.

        Returns:
            What was predicted, measured and compared, and the plan that is applied now.

        Raises:
            PlanInfeasibleError: The step needs more than the budget and no plan fits; this one stays applied.
            RuntimeError: This plan is not applied to ``model``.
        """
        from gradkern.checkpoint._validate import validate  # lazy: it makes plans

        return validate(self, model, batch, loss_fn, optimizer=optimizer, accumulate=accumulate, recorder=recorder)

    def remove(self, model: nn.Module) -> None:
        """Undo ``apply``: the model is again exactly what it was.

        Raises:
            RuntimeError: This plan is not applied to ``model``, or another tool has replaced the forward of a
                unit since. Nothing is changed then.
        """
        if is_applied(model) and not is_applied(model, self._id):
            raise RuntimeError("another plan is applied to this model; remove that one with its own remove")
        remove_recompute(model)

    @property
    def step_s(self) -> float:
        """Seconds forward and backward of a micro-batch with everything kept."""
        return math.fsum(unit.forward_s + unit.backward_s for unit in self.units)

    @property
    def extra_s(self) -> float:
        """Seconds that recomputing adds to them."""
        return math.fsum(unit.chosen.extra_s for unit in self.units)

    def for_budget(self, budget: int | str) -> Plan:
        """Choose for another budget from the costs that this plan was made with, in milliseconds.

        Nothing runs: ``predicted_peak_bytes`` is what the model of a chain says, and ``modelled_peak_bytes`` the same.
        Make the plan that you train with by ``checkpoint.plan``, or check this one with ``validate``.

        Args:
            budget: Bytes, or text that ``parse_bytes`` reads.

        Raises:
            PlanInfeasibleError: No choice fits, as modelled.
            TypeError: ``budget`` is neither ``int`` nor ``str``.
            ValueError: ``budget`` does not parse or is not positive.
        """
        return choose(self, self._costs, self._least_bytes, parse_bytes(budget))

    def pareto(self, count: int = 40) -> list[tuple[int, float]]:
        """What budgets cost: (peak in bytes, seconds added), as modelled, the smallest peak first.

        Args:
            count: Budgets to try, evenly from the least that fits to all kept.

        Returns:
            The distinct choices found; none needs both more bytes and more time than another.

        Raises:
            TypeError: ``count`` is no ``int``.
            ValueError: ``count`` is below 2.
        """
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"pareto: count must be an int, got {type(count).__name__}")
        if count < 2:
            raise ValueError(f"pareto: count must be at least 2, got {count}")
        low = self._least_bytes
        high = self.fixed_bytes + max(peak_of(self._costs, (0,) * len(self._costs)), self.floor_bytes)
        budgets = {low + (high - low) * at // (count - 1) for at in range(count)}
        plans = [self.for_budget(budget) for budget in sorted(budgets)]
        found: dict[float, int] = {}
        for plan in plans:
            found.setdefault(plan.extra_s, plan.predicted_peak_bytes)
        return sorted((peak, seconds) for seconds, peak in found.items())

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw live memory over a step beside the budget, and what other budgets would cost.

        Both are modelled from the costs in the plan.

        Args:
            path: Where to; the ending says in which format, for example ``.png`` or ``.svg``.

        Raises:
            ImportError: matplotlib is not installed.
            OSError: The file cannot be written.
            ValueError: No format has this ending.
        """
        chosen = [unit.chosen for unit in self.units]
        kept = [unit.options[0] for unit in self.units]
        picture = Picture(
            title=f"{self.fingerprint.model_class.rpartition('.')[2]}, {self.source}: "
            f"{format_bytes(self.predicted_peak_bytes)} of {format_bytes(self.budget_bytes)}",
            planned=timeline(self.units, chosen, self.fixed_bytes, self.floor_bytes),
            kept=timeline(self.units, kept, self.fixed_bytes, self.floor_bytes),
            budget_bytes=self.budget_bytes,
            pareto=self.pareto(),
            chosen=(self.predicted_peak_bytes, self.extra_s),
            step_s=self.step_s,
        )
        draw(picture, path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON. The file appears complete or not at all; an older one is replaced.

        A new file gets the permissions that the process gives any new file, one replaced keeps its own.

        Raises:
            OSError: The folder does not exist or cannot be written.
        """
        target = Path(path)
        document = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        try:
            with temporary.open("x", encoding="utf-8") as file:
                if target.exists():
                    temporary.chmod(stat.S_IMODE(target.stat().st_mode))
                json.dump(document, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that ``save`` wrote.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is truncated, not a plan, of another version, or its fields do not fit.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is not a complete JSON file ({error}); make the plan again and save it"
            ) from error
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a checkpoint plan; expected JSON with format {_FORMAT!r}")
        if document.get("version") != _VERSION:
            raise ValueError(
                f"{path} has version {document.get('version')!r}, this gradkern reads version {_VERSION}; "
                "make the plan again"
            )
        try:
            return cls._from_document(document)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged: {type(error).__name__} {error}; make the plan again and save it"
            ) from error

    def __str__(self) -> str:
        """Write the plan as a table."""
        share = 100 * self.extra_s / self.step_s if self.step_s else 0.0
        recomputed = sum(unit.recompute is not None for unit in self.units)
        width = max(len(unit.name) for unit in self.units)
        lines = [
            f"natural peak    {format_bytes(self.natural_peak_bytes):>12}",
            f"budget          {format_bytes(self.budget_bytes):>12}",
            f"predicted peak  {format_bytes(self.predicted_peak_bytes):>12}   {self.source}",
            f"least feasible  {format_bytes(self.least_feasible_bytes):>12}",
            f"recomputed      {recomputed:>12} of {len(self.units)} units, about {share:.1f} % more time, "
            f"gap {100 * self.gap:.2f} %",
            *([f"offloaded       {len(self.offloads):>12} of {len(self.units)} units"] if self.offloads else []),
            "",
            f"{'unit':<{width}}  {'option':<9}  {'held':>12}  {'if kept':>12}  {'forward':>9}  {'backward':>9}  "
            f"{'again':>9}",
        ]
        lines += [
            f"{unit.name:<{width}}  {unit.option:<9}  {format_bytes(unit.chosen.saved_bytes):>12}  "
            f"{format_bytes(unit.options[0].saved_bytes):>12}  {1e3 * unit.forward_s:>6.2f} ms  "
            f"{1e3 * unit.backward_s:>6.2f} ms  {1e3 * unit.chosen.extra_s:>6.2f} ms"
            for unit in self.units
        ]
        return "\n".join(lines)

    def is_applied(self, model: nn.Module) -> bool:
        """Whether this plan, or one equal to it, is applied to ``model``."""
        return is_applied(model, self._id)

    def does_as(self, other: Plan) -> bool:
        """Whether it recomputes the same units in the same way."""
        return (self._recompute(), self.segments, self.offloads) == (
            other._recompute(),
            other.segments,
            other.offloads,
        )

    @functools.cached_property
    def _costs(self) -> list[list[Option]]:
        """Of every unit alone, for the solver."""
        return [[option.cost for option in unit.alone] for unit in self.units]

    @functools.cached_property
    def _least_bytes(self) -> int:
        """The smallest peak without nesting, as modelled."""
        return least_peak(self, self._costs)

    @functools.cached_property
    def _id(self) -> str:
        """Tells plans apart, across processes, by what they do and promise."""
        chosen = replace(self, units=tuple(replace(unit, options=(unit.chosen,)) for unit in self.units))
        return hashlib.sha256(json.dumps(asdict(chosen), sort_keys=True).encode()).hexdigest()

    def _recompute(self) -> dict[str, Recompute]:
        return {unit.name: unit.recompute for unit in self.units if unit.recompute is not None}

    @classmethod
    def _from_document(cls, document: dict[str, Any]) -> Plan:
        """Rebuild and check; errors name the field."""
        known = {field.name for field in fields(cls)}
        values = {name: document[name] for name in known}
        for name in known - {"gap", "source", "units", "segments", "offloads", "fingerprint"}:
            values[name] = checked(name, document[name], int)
            if values[name] < 0:
                raise ValueError(f"field {name} is below zero, {values[name]}")
        values["gap"] = float(checked("gap", document["gap"], (int, float)))
        values["source"] = checked("source", document["source"], str)
        values["units"] = tuple(read_unit(unit) for unit in checked("units", document["units"], list))
        names = [unit.name for unit in values["units"]]
        if len(names) < 3 or (names[0], names[-1]) != (STEM, HEAD) or not 0 <= values["gap"] < math.inf:
            raise ValueError("field units does not go from <stem> to <head>, or field gap is no share")
        values["segments"] = tuple(map(_read_nest, checked("segments", document["segments"], list)))
        nested = [unit.name for unit in values["units"] if unit.option == NESTED]
        if [name for nest in values["segments"] for name in names_in(nest)] != nested:
            raise ValueError("field segments does not hold the units with the option 'nested', in their order")
        values["offloads"] = tuple(map(_read_offload, checked("offloads", document["offloads"], list)))
        offloaded = [unit.name for unit in values["units"] if unit.option == OFFLOAD]
        if [each.unit for each in values["offloads"]] != offloaded:
            raise ValueError("field offloads does not hold the units with the option 'offload', in their order")
        places = {name for each in values["offloads"] for name in (each.released_at, each.fetched_at)}
        if not places <= set(names[1:-1]):
            raise ValueError(f"field offloads names {sorted(places - set(names[1:-1]))}, which are no units")
        stored = checked("fingerprint", document["fingerprint"], dict)
        values["fingerprint"] = Fingerprint(
            model_class=checked("model_class", stored["model_class"], str),
            modules=tuple(checked("modules", name, str) for name in checked("modules", stored["modules"], list)),
            parameters=_read_tensors("parameters", stored["parameters"]),
            buffers=_read_tensors("buffers", stored["buffers"]),
        )
        return cls(**values)


def _read_tensors(field: str, stored: Any) -> tuple[TensorInfo, ...]:
    """Rebuild the (name, shape, dtype) of a fingerprint."""
    return tuple(
        (
            checked(field, name, str),
            tuple(checked(field, size, int) for size in checked(field, shape, list)),
            checked(field, dtype, str),
        )
        for name, shape, dtype in checked(field, stored, list)
    )


def _read_nest(stored: Any) -> Nest:
    """Rebuild a segment."""
    items = checked("segments", stored, list)
    return tuple(_read_nest(item) if isinstance(item, list) else checked("segments", item, str) for item in items)


def _read_offload(stored: Any) -> Offload:
    """Rebuild when a unit's saved tensors travel."""
    values = checked("offloads", stored, dict)
    return Offload(*(checked(name, values[name], str) for name in ("unit", "released_at", "fetched_at")))


def infeasible(budget_bytes: int, least_feasible_bytes: int, how: str = "") -> PlanInfeasibleError:
    """The error for a budget that nothing fits into."""
    return PlanInfeasibleError(
        f"no choice of units to recompute fits into {format_bytes(budget_bytes)} ({budget_bytes} bytes){how}; "
        f"the least feasible budget is {least_feasible_bytes} bytes "
        f"({format_bytes(least_feasible_bytes)}). Use a smaller batch or a larger budget",
        least_feasible_bytes=least_feasible_bytes,
    )


def choose(plan: Plan, costs: list[list[Option]], least_bytes: int, budget_bytes: int) -> Plan:
    """Choose for a budget as ``Plan.for_budget`` does, from costs that need not be those of the plan's options.

    Args:
        plan: What it says of bytes beside the units holds.
        costs: Of every unit's options that can be chosen alone.
        least_bytes: What :func:`least_peak` found for them.
        budget_bytes: Of the whole step.

    Raises:
        PlanInfeasibleError: No choice fits, as modelled.
    """
    capacity = min(budget_bytes - plan.fixed_bytes, MOST_BYTES)
    solution = None if capacity < plan.floor_bytes else solve(costs, capacity, chain=fastest_chain())
    if solution is None and (plan.segments or plan.offloads) and plan.predicted_peak_bytes <= budget_bytes:
        return replace(plan, budget_bytes=budget_bytes)
    if solution is None:
        raise infeasible(budget_bytes, least_bytes, " without nesting or offloading, which this does not try")
    peak_bytes = plan.fixed_bytes + max(peak_of(costs, solution.choices), plan.floor_bytes)
    units = zip(plan.units, solution.choices, strict=True)
    return replace(
        plan,
        budget_bytes=budget_bytes,
        predicted_peak_bytes=peak_bytes,
        modelled_peak_bytes=peak_bytes,
        least_feasible_bytes=least_bytes,
        gap=(solution.extra_s - solution.lower_bound_s) / (plan.step_s + solution.lower_bound_s),
        units=tuple(replace(unit, option=unit.alone[choice].name) for unit, choice in units),
        segments=(),
        offloads=(),
    )


def least_peak(plan: Plan, costs: list[list[Option]]) -> int:
    """The smallest peak without nesting, as modelled."""
    return plan.fixed_bytes + max(fastest_chain()(costs).least_capacity()[0], plan.floor_bytes)
