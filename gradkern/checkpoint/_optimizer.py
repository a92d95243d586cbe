"""What an optimizer's step and state cost, by stepping a copy of it."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkern.checkpoint._meter import Source
from gradkern.checkpoint._valueless import needs_values

__all__ = ["OptimizerCost", "measure_optimizer"]


@dataclass(frozen=True)
class OptimizerCost:
    """Bytes of an optimizer.

    Attributes:
        missing_state_bytes: State that its next step will create and keep. Caches that a deep copy does not
            take along count even where the original has built them: never too little.
        step_bytes: Most bytes alive at once during a later step above those at its start.
    """

    missing_state_bytes: int
    step_bytes: int


def measure_optimizer(
    optimizer: torch.optim.Optimizer, has_grad: frozenset[Tensor], source: Source, *, is_copy: bool = False
) -> OptimizerCost:
    """Deep-copy ``optimizer`` with its parameters, let the copy step twice on zero gradients, and measure.

    The optimizer itself, its parameters, hooks and schedulers see nothing of it. For the length of this call
    the process holds parameters, gradients and state a second time.

    Args:
        optimizer: Any optimizer that can be deep-copied and whose ``step`` needs no closure.
        has_grad: The parameters that receive a gradient.
        source: Where bytes are read.
        is_copy: It is a copy already, of tensors without values perhaps, and may be stepped itself.

    Raises:
        ValueError: The optimizer cannot step without a closure, or its deep copy cannot be made or cannot step:
            ``torch.optim.Optimizer`` drops attributes that a subclass sets itself when it is copied.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__}.step needs a closure, so its memory cannot be measured by a dry "
            "run; plan with optimizer=None and leave room in the budget for its state"
        )
    try:
        copied, trained = (optimizer, _trained(optimizer, has_grad)) if is_copy else _copied(optimizer, has_grad)
        return _measure_steps(copied, trained, source)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError, copy.Error) as error:
        if is_copy and needs_values(error):
            raise  # it asks for values, which the original has
        raise ValueError(
            f"a deep copy of this {type(optimizer).__name__} cannot step, so its memory cannot be measured by a dry "
            f"run ({type(error).__name__}: {error}); plan with optimizer=None and leave room in the budget for its "
            "state, or give it a __deepcopy__ that copies its own attributes too"
        ) from error


def _copied(
    optimizer: torch.optim.Optimizer, has_grad: frozenset[Tensor]
) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """A deep copy, and its parameters that receive a gradient."""
    originals = _params(optimizer)
    trial = copy.deepcopy(optimizer)
    return trial, [copied for copied, param in zip(_params(trial), originals, strict=True) if param in has_grad]


def _trained(optimizer: torch.optim.Optimizer, has_grad: frozenset[Tensor]) -> list[Tensor]:
    return [param for param in _params(optimizer) if param in has_grad]


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _measure_steps(trial: torch.optim.Optimizer, trained: list[Tensor], source: Source) -> OptimizerCost:
    """Measure by stepping."""
    meter = source.meter()
    with meter:
        _step_on_zeros(trial, trained)
        for param in trained:
            param.grad = torch.zeros_like(param)
        meter.mark()
        trial.step()
    _, loaded, finished = meter.marks
    grad_bytes = sum(meter.bytes_of(param.grad) for param in trained if param.grad is not None)
    for param in trained:
        param.grad = None
    return OptimizerCost(
        missing_state_bytes=max(0, loaded.live_bytes - grad_bytes),
        step_bytes=finished.peak_bytes - loaded.live_bytes,
    )


def _step_on_zeros(optimizer: torch.optim.Optimizer, trained: list[Tensor]) -> None:
    """Take one step, for the state that the first step creates."""
    for param in trained:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad()
    for param in trained:
        param.grad = None
