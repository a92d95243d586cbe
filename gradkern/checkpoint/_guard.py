"""Surviving an out-of-memory error in training: plan again, and run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from gradkern.checkpoint._allocator import uncapped
from gradkern.checkpoint._bytes import format_bytes, parse_bytes
from gradkern.checkpoint._gpus import find_gpu
from gradkern.checkpoint._job import HoldsBytes
from gradkern.checkpoint._plan import Plan
from gradkern.checkpoint._planner import check_arguments
from gradkern.checkpoint._planner import plan as make_plan
from gradkern.checkpoint._preserve import Preserved
from gradkern.checkpoint._storages import device_of
from gradkern.checkpoint._units import find_units
from gradkern.errors import PlanInfeasibleError
from gradkern.loss import Batch, LossFn

__all__ = ["Guard", "guard"]

T = TypeVar("T")

# Of the budget, after a plan that was to hold did not.
_TIGHTER = (1.0, 0.95, 0.85)

_NO_MEMORY = "can't allocate memory"  # of torch's plain CPU allocator


class Guard:
    """Runs forward and backward passes, and where memory runs out makes a plan for the batch and runs them again.

    Made by ``guard``.

    Attributes:
        plan: The plan applied to the model; None before any was needed.
        replans: How many times a plan was made.
    """

    def __init__(
        self, model: nn.Module, budget_bytes: int, made: Plan | None, plan_for: Callable[[Batch, int], Plan]
    ) -> None:
        self.plan = made
        self.replans = 0
        self._model = model
        self._budget_bytes = budget_bytes
        self._plan_for = plan_for

    def run(self, cycle: Callable[[], T], batch: Batch) -> T:
        """Call ``cycle`` and return what it returns; after an out-of-memory error plan again and call it again.

        What the failed call left is undone before: gradients, buffers such as running statistics, and the global
        generators of torch (those of GPUs too), Python and numpy. The repeated call computes what the first would
        have, dropout included, so that training goes on as if the better plan had been there from the start.

        Args:
            cycle: Forward and backward passes of all micro-batches of a step, without the optimizer's step.
            batch: The largest micro-batch that ``cycle`` runs, to plan for.

        Raises:
            PlanInfeasibleError: No plan fits this batch. The earlier plan is applied again.
            RuntimeError: Gradients are there before; or the failed call has changed parameters, which cannot be
                undone (an optimizer that steps in backward).
            torch.OutOfMemoryError: Memory ran out under every plan that was to fit.
        """
        if any(param.grad is not None for param in self._model.parameters()):
            raise RuntimeError(
                "guard.run found gradients of an earlier step, which a second try could not restore; run all "
                "micro-batches of a step in one cycle, and call optimizer.zero_grad() after each step"
            )
        aside = Preserved(self._model)
        versions = [param._version for param in self._model.parameters()]
        try:
            return cycle()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not _is_out_of_memory(error):
                raise
            # Its traceback holds the frames of the failed call, and they the tensors that filled the memory.
            reason = _first_line(error)
        for share in _TIGHTER:
            aside.restore()
            if versions != [param._version for param in self._model.parameters()]:
                raise RuntimeError(
                    f"memory ran out ({reason}) after parameters had been changed, by an optimizer that steps in "
                    "backward perhaps; the step cannot be run again. Load a checkpoint and plan with a smaller budget"
                )
            try:
                self._replan(batch, int(share * self._budget_bytes), reason)
            except PlanInfeasibleError:
                if share == 1.0:
                    raise
                break  # of a part of the budget: it is the step that holds too much
            try:
                return cycle()
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                reason = _first_line(error)
        aside.restore()
        raise torch.OutOfMemoryError(
            f"memory ran out under every plan for the budget of {format_bytes(self._budget_bytes)} ({reason}): the "
            "step holds more than plan() knows of. Pass the optimizer, accumulate= and recorder= of the training "
            "loop to guard, or a larger budget"
        )

    def _replan(self, batch: Batch, budget_bytes: int, reason: str) -> None:
        """Put a plan for this batch in place of the one that did not hold."""
        before = self.plan
        if before is not None:
            before.remove(self._model)
        try:
            with uncapped():
                made = self._plan_for(batch, budget_bytes)
        except BaseException as error:
            if before is not None:
                before.apply(self._model)
            if isinstance(error, PlanInfeasibleError):
                raise PlanInfeasibleError(
                    f"memory ran out ({reason}), and {error}", least_feasible_bytes=error.least_feasible_bytes
                ) from None
            raise
        made.apply(self._model)
        self.plan = made
        self.replans += 1


def guard(
    model: nn.Module,
    loss_fn: LossFn | None = None,
    *,
    budget: int | str,
    plan: Plan | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    accumulate: int = 1,
    recorder: HoldsBytes | None = None,
    units: str | Sequence[str] = (),
    gpu: str | None = None,
) -> Guard:
    """Watch over a training loop: see ``Guard.run``.

    Args:
        model: In training; gradients in ``.grad``.
        loss_fn: As in ``plan``, to plan with.
        budget: Bytes for the whole step, or text that ``parse_bytes`` reads.
        plan: The plan that is applied to ``model``; None where none is.
        optimizer: As in ``plan``; likewise what follows.
        accumulate: See there.
        recorder: See there.
        units: See there.
        gpu: Plan for this GPU without running on it, as in ``plan``: needed where ``model`` is on one. None plans by
            running the model on the CPU, where a cap of ``enforce`` is lifted meanwhile.

    Raises:
        RuntimeError: ``plan`` is not applied to ``model``, or another is where ``plan`` is None.
        TypeError, ValueError: ``budget`` is no size, ``model`` is on a GPU and ``gpu`` is None, or
            an argument is not what ``plan`` takes.

    Example:
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)))
        >>> watched = guard(model, lambda y, x: y.square().mean(), budget="1 GiB")
        >>> x = torch.randn(4, 8)
        >>> watched.run(lambda: model(x).square().mean().backward(), x)
        >>> watched.replans
        0
    """
    budget_bytes = parse_bytes(budget)
    if gpu is not None:
        find_gpu(gpu)
    elif device_of("guard", model).type != "cpu":
        raise ValueError(
            "guard: a model on a GPU needs gpu=, for a plan is made when that GPU's memory is full already"
        )
    if plan is None:
        check_arguments(model, optimizer, accumulate, recorder)
        find_units(model, [units] if isinstance(units, str) else list(units))
    if plan is not None and not plan.is_applied(model):
        raise RuntimeError("guard: plan= is not applied to this model; call plan.apply(model) first")

    def plan_for(batch: Batch, nbytes: int) -> Plan:
        return make_plan(
            model,
            batch,
            loss_fn,
            budget=nbytes,
            optimizer=optimizer,
            accumulate=accumulate,
            recorder=recorder,
            units=units,
            gpu=gpu,
        )

    return Guard(model, budget_bytes, plan, plan_for)


def _first_line(error: RuntimeError) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY in str(error)
