"""Making a plan of a model on this machine or on a GPU that is not here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, overload

import torch
from torch import nn

from gradkern.checkpoint._apply import applied_within
from gradkern.checkpoint._bytes import parse_bytes
from gradkern.checkpoint._fingerprint import Fingerprint
from gradkern.checkpoint._gpus import Gpu, find_gpu
from gradkern.checkpoint._here import search_here
from gradkern.checkpoint._job import HoldsBytes, Job, Outcome
from gradkern.checkpoint._nesting import Nesting
from gradkern.checkpoint._plan import Plan, infeasible
from gradkern.checkpoint._recompute import OpCall
from gradkern.checkpoint._search import SavingSets
from gradkern.checkpoint._segments import Nest, names_in
from gradkern.checkpoint._shapes import ShapePlans, cut, length_of
from gradkern.checkpoint._storages import device_of
from gradkern.checkpoint._units import find_units
from gradkern.loss import Batch, LossFn

__all__ = ["check_arguments", "plan"]

# Of a unit, where lengths between those measured are chosen for while a batch waits.
_MOST_SETS = 24


@overload
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
    gpu: str | None = None,
    shards: int = 1,
    offload: bool = False,
    shapes: None = None,
    progress: Callable[[str], None] | None = None,
) -> Plan: ...


@overload
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
    gpu: str | None = None,
    shards: int = 1,
    offload: Literal[False] = False,
    shapes: Sequence[int],
    progress: Callable[[str], None] | None = None,
) -> ShapePlans: ...


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
    gpu: str | None = None,
    shards: int = 1,
    offload: bool = False,
    shapes: Sequence[int] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Plan | ShapePlans:
    """Choose which blocks of a model to recompute in backward so that a whole step fits into ``budget``.

    The peak is that of a step in its steady state: parameters, buffers, optimizer state (also where it does
    not exist yet), gradients, what is saved for backward, what operators need for a moment, the optimizer's
    own step, the batch, and whatever other tensors the process holds there now and the allocator counts.
    Costs are measured by running the model on ``batch``: a handful of forward and backward passes, and the
    optimizer on a deep copy of itself. The chosen plan is run too; what it was measured to need is
    ``predicted_peak_bytes``. Longer or larger batches need a plan of their own.

    ``model``, ``optimizer`` and the global generators of torch, Python and numpy are left bit for bit as they were;
    what a forward changes beside buffers (plain attributes, generators of its own) is not put back. Units whose
    inputs are changed in place, or that do not give the same bits when run twice, are always kept. A model in
    eval mode is profiled in train mode. Memory that a training loop holds beyond the above is not known here: an
    output kept across ``backward``, gradients kept by ``zero_grad(set_to_none=False)``, evaluation batches.

    Args:
        model: On the CPU or on a CUDA device (on any device with ``gpu``), with no plan applied.
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
        gpu: Plan for this GPU, which need not be here: ``"A100-40"``, ``"A100-80"``, ``"H100"``, ``"H200"``,
            ``"B200"``, ``"RTX4090"`` or ``"MI300X"``. The model, which may be on any device, ``meta`` included, runs on
            tensors without values; bytes are rounded to blocks of 512, attention saves what the GPU's kernels save, and
            seconds are the larger of arithmetic and memory traffic at the rates of the data sheet: modelled, not
            measured. Gradients cannot be compared without values, nor units that do not repeat be found: ``validate``
            does on the machine that trains. Where what runs depends on values, or on tensors that are neither the
            model's nor the batch's, the model itself runs. None measures here: CPU memory by the allocator hook, a
            GPU's as ``torch.cuda.memory_allocated`` counts it; there the batch must fit with everything kept.
        shards: With ``gpu``: processes that parameters, gradients and optimizer state are spread over, as by FSDP. Two
            units and what is in no unit are whole at a time; communication takes no time.
        offload: With ``gpu``: what units save may also wait in the memory of the host, as much of it as the link
            carries there and back while other units run. The host's memory, pinned, is not part of the budget.
        shapes: Three or more lengths, the sizes of dimension 1 that batches may have; the largest is that of ``batch``,
            shorter ones are cut from it. Each is planned for, and the answer chooses for any length up to the largest.
        progress: Called with a few words before each pass over the model.

    Returns:
        A plan, not yet applied; with ``shapes`` a ``ShapePlans``. More budget never gives a slower plan for the same
        measured costs.

    Raises:
        PlanInfeasibleError: No choice fits; the message and ``least_feasible_bytes`` name the smallest budget
            that does.
        RuntimeError: A plan is applied to the model or a part of it, or ``transformers`` gradient checkpointing is on.
        TypeError: An argument is of the wrong type.
        ValueError: ``budget`` does not parse or is not positive, ``gpu`` is not known, a pattern in ``units`` matches
            nothing, ``accumulate`` or ``shards`` is below 1, ``shards`` or ``offload`` is given without ``gpu``,
            ``offload`` with ``shapes``, tensors lie on another device than the CPU or one GPU, the loss has no
            gradient, a unit runs in some passes only though the global generators start alike, what runs depends on
            values that a model without them lacks, or the optimizer needs a closure or cannot step as a deep copy (one
            with attributes of its own, which copies of ``torch.optim.Optimizer`` lack): plan with ``optimizer=None``
            then and leave room for its state.

    Example:
        >>> blocks = [nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(4)]
        >>> model = nn.Sequential(*blocks)
        >>> made = plan(model, torch.randn(64, 32), lambda y, x: y.square().mean(), budget="1 MiB")
        >>> made.apply(model)
        >>> made.predicted_peak_bytes <= 2**20
        True
    """
    budget_bytes = parse_bytes(budget)
    simulated = None if gpu is None else find_gpu(gpu)
    check_arguments(model, optimizer, accumulate, recorder)
    _check_place(model, batch, optimizer, shards, is_here=simulated is None)
    if offload and simulated is None:
        raise ValueError("plan: offload=True needs gpu=, for what is measured here has no host beside it")
    if offload and shapes is not None:
        raise ValueError("plan: offload=True needs one length, not shapes=; plan for the longest")
    candidates = find_units(model, [units] if isinstance(units, str) else list(units))
    told = progress or _untold
    job = Job(model, batch, loss_fn, budget_bytes, optimizer, accumulate, recorder, candidates, told, offload=offload)
    if shapes is None:
        return _plan_one(job, simulated, shards)
    lengths = _checked_lengths(shapes, batch)
    # The longest first: what is worth holding there is measured at the others too.
    longest = _plan_one(job, simulated, shards)
    sets = {unit.name: _some([each.saved_ops for each in unit.options if each.saved_ops]) for unit in longest.units}
    names = [unit.name for unit in longest.units]
    plans = [longest]
    for length in reversed(lengths[:-1]):
        made = _plan_one(replace(job, batch=cut(batch, length), saving_sets=sets), simulated, shards)
        if [unit.name for unit in made.units] != names:
            raise ValueError(
                f"plan: at length {length} the model runs other units than at {lengths[-1]}; leave that length out of "
                "shapes and plan for it alone"
            )
        plans.append(made)
    return ShapePlans(budget_bytes, tuple(lengths), tuple(reversed(plans)))


def _some(sets: list[tuple[OpCall, ...]]) -> SavingSets:
    """At most ``_MOST_SETS`` of them, the last among them."""
    every = max(1, -(-len(sets) // _MOST_SETS))
    return tuple(sets[::-1][::every][::-1])


def _plan_one(job: Job, gpu: Gpu | None, shards: int) -> Plan:
    """Plan for one batch."""
    if gpu is None:
        return _as_plan(search_here(job), job)
    from gradkern.checkpoint._elsewhere import search_elsewhere  # lazy: torch's fake tensors import triton

    return _as_plan(search_elsewhere(job, gpu, shards), job)


def _checked_lengths(shapes: Sequence[int], batch: Batch) -> list[int]:
    """Return the lengths in ascending order, the batch's own the last."""
    if not all(isinstance(length, int) and not isinstance(length, bool) for length in shapes):
        raise TypeError(f"plan: shapes must be lengths, ints, got {list(shapes)}")
    lengths = sorted(set(shapes))
    if len(lengths) < 3 or lengths[0] < 1 or lengths[-1] != length_of(batch):
        raise ValueError(
            f"plan: shapes must be three or more lengths, of which the largest is that of the batch, "
            f"{length_of(batch)}; got {list(shapes)}"
        )
    return lengths


def check_arguments(
    model: nn.Module,
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


def _check_place(
    model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer | None, shards: int, *, is_here: bool
) -> None:
    """Raise for what cannot be planned where it is to be."""
    if isinstance(shards, bool) or not isinstance(shards, int):
        raise TypeError(f"plan: shards must be an int, got {type(shards).__name__}")
    if shards < 1:
        raise ValueError(f"plan: shards must be at least 1, got {shards}")
    if is_here and shards > 1:
        raise ValueError(f"plan: shards={shards} needs gpu=, for what is measured here is one process; name the GPU")
    if is_here:
        device_of("plan", model, batch, optimizer)


def _together(nesting: Nesting | None) -> tuple[Nest, ...]:
    """Segments of more than one unit; a unit alone is recomputed as ever."""
    return () if nesting is None else tuple(nest for nest in nesting.segments if len(names_in(nest)) > 1)


def _untold(text: str) -> None:
    """Nobody asked for progress."""


def _as_plan(outcome: Outcome, job: Job) -> Plan:
    """Write down what was found.

    Raises:
        PlanInfeasibleError: Nothing was.
    """
    measured, found = outcome.measured, outcome.found
    if found.choices is None:
        raise infeasible(job.budget_bytes, found.least_feasible_bytes)
    natural = measured.natural
    return Plan(
        budget_bytes=job.budget_bytes,
        natural_peak_bytes=outcome.fixed_bytes + max(natural.peak_bytes, natural.end_bytes + outcome.step_bytes),
        predicted_peak_bytes=found.peak_bytes,
        modelled_peak_bytes=found.modelled_bytes,
        least_feasible_bytes=found.least_feasible_bytes,
        gap=found.gap,
        fixed_bytes=outcome.fixed_bytes,
        floor_bytes=measured.kept.end_bytes + outcome.step_bytes,
        source=outcome.source,
        units=measured.unit_plans(found.choices, found.nesting, found.offloads),
        segments=_together(found.nesting),
        offloads=found.offloads,
        fingerprint=Fingerprint.of(job.model),
    )
