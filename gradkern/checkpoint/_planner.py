"""Making a plan of a model on this machine or on a GPU that is not here."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from gradkern.checkpoint._bytes import parse_bytes
from gradkern.checkpoint._fingerprint import Fingerprint
from gradkern.checkpoint._meter import Machine, make_meter
from gradkern.checkpoint._optimizer import OptimizerCost, measure_optimizer
from gradkern.checkpoint._plan import Plan, infeasible
from gradkern.checkpoint._preserve import Preserved, preserved
from gradkern.checkpoint._profile import Trial
from gradkern.checkpoint._recompute import applied_within
from gradkern.checkpoint._search import Found, Profile, fit, profile
from gradkern.checkpoint._storages import live_bytes, require_cpu, storages_of, tensors_of
from gradkern.checkpoint._units import find_units
from gradkern.loss import Batch, LossFn

__all__ = ["HoldsBytes", "plan"]

# Room for the scalars that loops keep from step to step, such as losses to be logged.
_LOOP_BYTES = 4096


class HoldsBytes(Protocol):
    """Something that keeps memory for the length of training, such as a ``gradkern.rollback`` recorder."""

    def held_bytes(self) -> int:
        """Bytes it holds while training."""
        ...


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
    outcome = _search_here(model, batch, loss_fn, budget_bytes, optimizer, accumulate, recorder, candidates)
    return _as_plan(outcome, budget_bytes, model)


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


@dataclass(frozen=True)
class _Outcome:
    """What a search found. Holds no tensors but the model's, for errors carry it along."""

    measured: Profile
    found: Found
    fixed_bytes: int
    step_bytes: int
    source: str


def _search_here(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn | None,
    budget_bytes: int,
    optimizer: torch.optim.Optimizer | None,
    accumulate: int,
    recorder: HoldsBytes | None,
    candidates: list[str],
) -> _Outcome:
    """Profile, solve and confirm on this machine, with the model's state put aside."""
    with preserved(model) as aside, torch.enable_grad():
        trial = Trial(model, batch, loss_fn, accumulate, aside.rewind_generators, Machine())
        measured = profile(trial, candidates, aside)
        optimizer_cost = OptimizerCost(0, 0)
        if optimizer is not None:
            optimizer_cost = measure_optimizer(optimizer, measured.kept.has_grad)
        fixed_bytes = _fixed_bytes(aside, recorder, model, optimizer, batch) + optimizer_cost.missing_state_bytes
        found = fit(trial, measured, budget_bytes, fixed_bytes, optimizer_cost.step_bytes)
        return _Outcome(measured, found, fixed_bytes, optimizer_cost.step_bytes, "cpu")


def _as_plan(outcome: _Outcome, budget_bytes: int, model: nn.Module) -> Plan:
    """Write down what was found.

    Raises:
        PlanInfeasibleError: Nothing was.
    """
    measured, found = outcome.measured, outcome.found
    if found.choices is None:
        raise infeasible(budget_bytes, found.least_feasible_bytes)
    natural = measured.natural
    return Plan(
        budget_bytes=budget_bytes,
        natural_peak_bytes=outcome.fixed_bytes + max(natural.peak_bytes, natural.end_bytes + outcome.step_bytes),
        predicted_peak_bytes=found.peak_bytes,
        modelled_peak_bytes=found.modelled_bytes,
        least_feasible_bytes=found.least_feasible_bytes,
        gap=found.gap,
        fixed_bytes=outcome.fixed_bytes,
        floor_bytes=measured.kept.end_bytes + outcome.step_bytes,
        source=outcome.source,
        units=measured.unit_plans(found.choices),
        fingerprint=Fingerprint.of(model),
    )


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
