"""Searching for a plan on this machine, and measuring one."""

from __future__ import annotations

import gc

import torch

from gradkern.checkpoint._job import LOOP_BYTES, Job, Outcome
from gradkern.checkpoint._meter import Machine, Source
from gradkern.checkpoint._optimizer import OptimizerCost, measure_optimizer
from gradkern.checkpoint._preserve import Preserved, preserved
from gradkern.checkpoint._profile import Trial
from gradkern.checkpoint._search import fit, profile
from gradkern.checkpoint._storages import device_of, live_bytes, storages_of

__all__ = ["measure_here", "search_here"]


def search_here(job: Job) -> Outcome:
    """Profile, solve and confirm, with the model's state put aside."""
    device = device_of("plan", job.model, job.batch, job.optimizer)
    source = Machine(device)
    with preserved(job.model) as aside, torch.enable_grad():
        rewind = aside.rewind_generators
        trial = Trial(job.model, job.batch, job.loss_fn, job.accumulate, rewind, source, job.progress)
        measured = profile(trial, job.candidates, aside.changed_buffers, job.saving_sets)
        step = OptimizerCost(0, 0)
        if job.optimizer is not None:
            step = measure_optimizer(job.optimizer, measured.kept.has_grad, source)
        fixed_bytes = _fixed_bytes(source, aside, job) + step.missing_state_bytes
        found = fit(trial, measured, job.budget_bytes, fixed_bytes, step.step_bytes)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        return Outcome(measured, found, fixed_bytes, step.step_bytes, name)


def measure_here(job: Job) -> tuple[int, tuple[int | None, ...]]:
    """Return the peak of a step of the model as it is, a plan applied or not, and the bits of its gradients.

    The model's state is put aside meanwhile. The job's candidates are its units in order of execution.
    """
    source = Machine(device_of("validate", job.model, job.batch, job.optimizer))
    with preserved(job.model) as aside, torch.enable_grad():
        rewind = aside.rewind_generators
        trial = Trial(job.model, job.batch, job.loss_fn, job.accumulate, rewind, source, job.progress)
        cycle = trial.measure(job.candidates)
        step = OptimizerCost(0, 0)
        if job.optimizer is not None:
            step = measure_optimizer(job.optimizer, cycle.has_grad, source)
        fixed_bytes = _fixed_bytes(source, aside, job) + step.missing_state_bytes
        return fixed_bytes + max(cycle.peak_bytes, cycle.end_bytes + step.step_bytes), cycle.grad_bits


def _fixed_bytes(source: Source, aside: Preserved, job: Job) -> int:
    """Bytes alive all through a step: everything there is now, without what is put aside for profiling."""
    gc.collect()
    allocator, recorder = source.meter().allocator, job.recorder
    roots = job.model, job.optimizer, job.batch
    alive = live_bytes(allocator, *roots) + LOOP_BYTES
    if allocator is not None:
        alive -= aside.held_bytes(allocator)
    if recorder is None or (allocator is not None and allocator.place == "cuda"):
        return alive  # what a recorder has on a GPU is there already; the rest of it waits on the host
    seen = 0
    if allocator is not None:
        known = storages_of(*roots, places=(allocator.place,))
        seen = sum(
            allocator.size_of(storage)
            for key, storage in storages_of(recorder, places=(allocator.place,)).items()
            if key not in known and allocator.owns(storage)
        )
    return alive + max(0, recorder.held_bytes() - seen)
