"""Searching for a plan on a GPU that is not here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from gradkern.checkpoint._gpus import Gpu
from gradkern.checkpoint._job import LOOP_BYTES, Job, Outcome
from gradkern.checkpoint._optimizer import OptimizerCost, measure_optimizer
from gradkern.checkpoint._preserve import Generators, preserved
from gradkern.checkpoint._profile import Trial
from gradkern.checkpoint._search import fit, profile
from gradkern.checkpoint._simulate import MetaCopies, Simulation, block_bytes
from gradkern.checkpoint._units import unit_module
from gradkern.checkpoint._valueless import NotSimulatedError, needs_values
from gradkern.loss import Batch

__all__ = ["search_elsewhere"]


def search_elsewhere(job: Job, gpu: Gpu, shards: int) -> Outcome:
    """Profile, solve and confirm on tensors without values; where the model asks for values, on its own.

    Raises:
        ValueError: The model asks for values and has none, being on the meta device or fake itself.
    """
    before = Generators.now()
    try:
        return _search_without_values(job, gpu, shards)
    except (NotSimulatedError, RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
        if not needs_values(error):
            raise
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    finally:
        before.restore()
    from torch._subclasses.fake_tensor import FakeTensor  # lazy: it imports triton

    if any(tensor.device.type != "cpu" or isinstance(tensor, FakeTensor) for tensor in job.model.parameters()):
        raise ValueError(
            f"what this model runs depends on values or on tensors that are not its own ({reason}), so it cannot be "
            "planned for from shapes alone; pass a small model of the same kind with real weights on the CPU, which is "
            "then run"
        )
    job.progress(f"running the model itself, for what it runs depends on values or on tensors of others ({reason})")
    return _search_real(job, gpu, shards)


def _search_without_values(job: Job, gpu: Gpu, shards: int) -> Outcome:
    """Search with copies on the meta device."""
    copies = MetaCopies()
    model = copies.of(job.model)
    optimizer = None if job.optimizer is None else _as_on_gpu(copies.of(job.optimizer))
    batch = copies.of_batch(job.batch)
    if not model.training:
        model.train()
    versions = {name: (buffer, buffer._version) for name, buffer in model.named_buffers(remove_duplicate=False)}

    def changed_buffers() -> list[str]:
        now = dict(model.named_buffers(remove_duplicate=False))
        return [
            name
            for name, (buffer, version) in versions.items()
            if name in now and (now[name] is not buffer or buffer._version != version)
        ]

    simulation = Simulation(gpu, shards, compares_bits=False)
    return _search(job, simulation, model, batch, optimizer, changed_buffers, "")


def _search_real(job: Job, gpu: Gpu, shards: int) -> Outcome:
    """Search with the model as it is; attention allocates as on a CPU."""
    simulation = Simulation(gpu, shards, compares_bits=True)
    with preserved(job.model) as aside:
        model, batch, optimizer = job.model, job.batch, job.optimizer
        return _search(job, simulation, model, batch, optimizer, aside.changed_buffers, ", run on real values")


def _search(
    job: Job,
    simulation: Simulation,
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer | None,
    changed_buffers: Callable[[], list[str]],
    how: str,
) -> Outcome:
    """Search with these tensors in place of the job's."""
    before = Generators.now()
    param_bytes, model_bytes = block_bytes(list(model.parameters())), block_bytes(model, batch)
    # That of a copy was cleared, so that all of it is missing.
    state_bytes = block_bytes(model, optimizer, batch) - model_bytes
    with simulation.watching(list(model.parameters())), torch.enable_grad():
        trial = Trial(model, batch, job.loss_fn, job.accumulate, before.restore, simulation, job.progress)
        measured = profile(trial, job.candidates, changed_buffers, job.saving_sets)
        step = OptimizerCost(0, 0)
        if optimizer is not None:
            is_copy = optimizer is not job.optimizer
            step = measure_optimizer(optimizer, measured.kept.has_grad, simulation, is_copy=is_copy)
        shards = simulation.shards
        step_bytes = -(-step.step_bytes // shards)
        fixed_bytes = (
            -(-(param_bytes + state_bytes + step.missing_state_bytes) // shards)
            + model_bytes
            - param_bytes
            + _gathered_bytes(model, measured.names, shards)
            + simulation.gpu.workspace_bytes
            + (0 if job.recorder is None else job.recorder.held_bytes())
            + LOOP_BYTES
        )
        link_bytes_per_s = simulation.gpu.link_bytes_per_s if job.offload else 0.0
        found = fit(trial, measured, job.budget_bytes, fixed_bytes, step_bytes, link_bytes_per_s)
    spread = f", 1 of {shards} shards" if shards > 1 else ""
    return Outcome(measured, found, fixed_bytes, step_bytes, f"simulated {simulation.gpu.name}{spread}{how}")


def _gathered_bytes(model: nn.Module, names: Sequence[str], shards: int) -> int:
    """Parameters that are whole for a while: of two units, this one and the next, and all that are in no unit."""
    if shards == 1:
        return 0
    units = [block_bytes(list(unit_module(model, name).parameters())) for name in names]
    outside = block_bytes(list(model.parameters())) - sum(units)
    return max(0, outside) + sum(sorted(units)[-2:])


def _as_on_gpu(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Have it begin anew, and choose the implementation that it would choose for parameters on a GPU.

    Counters of steps have values, which copies of them lack; made anew they have them again.
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        if group.get("fused"):
            # It refuses tensors without values; one by one there are the same state and as few temporaries.
            group.update(fused=False, foreach=False)
        elif group.get("foreach", False) is None:
            group["foreach"] = True
    return optimizer
