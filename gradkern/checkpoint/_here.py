"""Searching for a plan on this machine, and measuring one."""

from __future__ import annotations

import gc

import torch

from gradkern.checkpoint._job import LOOP_BYTES, HoldsBytes, Job, Outcome
from gradkern.checkpoint._meter import Machine, make_meter
from gradkern.checkpoint._optimizer import OptimizerCost, measure_optimizer
from gradkern.checkpoint._preserve import Preserved, preserved
from gradkern.checkpoint._profile import Trial
from gradkern.checkpoint._search import fit, profile
from gradkern.checkpoint._storages import live_bytes, storages_of

__all__ = ["measure_here", "search_here"]


def search_here(job: Job) -> Outcome:
    """Profile, solve and confirm, with the model's state put aside."""
    source = Machine()
    with preserved(job.model) as aside, torch.enable_grad():
        rewind = aside.rewind_generators
        trial = Trial(job.model, job.batch, job.loss_fn, job.accumulate, rewind, source, job.progress)
        measured = profile(trial, job.candidates, aside.changed_buffers, job.saving_sets)
        step = OptimizerCost(0, 0)
        if job.optimizer is not None:
            step = measure_optimizer(job.optimizer, measured.kept.has_grad, source)
        fixed_bytes = _fixed_bytes(aside, job.recorder, job.model, job.optimizer, job.batch) + step.missing_state_bytes
        found = fit(trial, measured, job.budget_bytes, fixed_bytes, step.step_bytes)
        return Outcome(measured, found, fixed_bytes, step.step_bytes, "cpu")


def measure_here(job: Job) -> tuple[int, tuple[int | None, ...]]:
    """Return the peak of a step of the model as it is, a plan applied or not, and the bits of its gradients.

    The model's state is put aside meanwhile. The job's candidates are its units in order of execution.
    """
    source = Machine()
    with preserved(job.model) as aside, torch.enable_grad():
        rewind = aside.rewind_generators
        trial = Trial(job.model, job.batch, job.loss_fn, job.accumulate, rewind, source, job.progress)
        cycle = trial.measure(job.candidates)
        step = OptimizerCost(0, 0)
        if job.optimizer is not None:
            step = measure_optimizer(job.optimizer, cycle.has_grad, source)
        fixed_bytes = _fixed_bytes(aside, job.recorder, job.model, job.optimizer, job.batch) + step.missing_state_bytes
        return fixed_bytes + max(cycle.peak_bytes, cycle.end_bytes + step.step_bytes), cycle.grad_bits


def _fixed_bytes(aside: Preserved, recorder: HoldsBytes | None, *roots: object) -> int:
    """Bytes alive all through a step: everything there is now, without what is put aside for profiling."""
    gc.collect()
    allocator = make_meter().allocator
    alive = live_bytes(allocator, *roots) + LOOP_BYTES
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
