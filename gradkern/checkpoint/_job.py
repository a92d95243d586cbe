"""What is to be planned, and what a search for a plan found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from gradkern.checkpoint._search import Found, Profile, SavingSets
from gradkern.loss import Batch, LossFn

__all__ = ["LOOP_BYTES", "HoldsBytes", "Job", "Outcome"]

# Room for the scalars that loops keep from step to step, such as losses to be logged.
LOOP_BYTES = 4096


class HoldsBytes(Protocol):
    """Something that keeps memory for the length of training, such as a ``gradkern.rollback`` recorder."""

    def held_bytes(self) -> int:
        """Bytes it holds while training."""
        ...


@dataclass(frozen=True)
class Job:
    """The arguments of ``plan``, checked.

    Attributes:
        candidates: Names of modules that may be units.
        saving_sets: Of units, sets of operators whose outputs may be held; None finds some.
        offload: Whether what units save may wait on the host.
    """

    model: nn.Module
    batch: Batch
    loss_fn: LossFn | None
    budget_bytes: int
    optimizer: torch.optim.Optimizer | None
    accumulate: int
    recorder: HoldsBytes | None
    candidates: list[str]
    progress: Callable[[str], None]
    saving_sets: Mapping[str, SavingSets] | None = None
    offload: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a search found. Holds no tensors but parameters, for errors carry it along."""

    measured: Profile
    found: Found
    fixed_bytes: int
    step_bytes: int
    source: str
