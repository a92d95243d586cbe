"""What an optimizer asks of a clip policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gradkern.ops._step.codecs import GradTransform
from gradkern.ops.step_scalars.reference import CLIP_COEF, GRAD_MULTIPLIER, SKIP

__all__ = ["ClipPolicy", "Units", "set_clip_"]

Units = tuple[list[torch.Tensor], list[int]]
"""Per parameter: fp32 multipliers of its units, and how many consecutive elements a unit has."""


class ClipPolicy:
    """Decides what an optimizer of gradkern does to gradients before they move parameters.

    Handed to an optimizer as ``clip=``. Every decision is made on the device of the parameters; nothing synchronises
    unless a policy says so. Gradients are not rewritten.

    Attributes:
        norm_type: Order of the norm that the policy decides by; None where it needs none.
        per_group: Whether every parameter group is measured and clipped by itself.
        transform: What the update does to single gradients before the common multiplier.
        error_if_nonfinite: Raise, naming the parameters, where the norm is not finite; synchronises.
        skips: Whether the policy may ask for a step to be skipped.
    """

    norm_type: float | None = 2.0
    per_group: bool = False
    transform: GradTransform = GradTransform.NONE
    error_if_nonfinite: bool = False
    skips: bool = False

    def threshold(self, group: Mapping[str, Any]) -> float:
        """Largest norm of a group (or, unless :attr:`per_group`, of all); ``inf``: measured, not clipped."""
        return math.inf

    def decide_(self, scalars: torch.Tensor, scale: torch.Tensor | float) -> None:
        """Change clip coefficient, multiplier and skip flag of the fp64 block, which holds the norm."""

    def limit(self) -> float:
        """Largest absolute value of a gradient's element, with the transform ``LIMIT``."""
        return math.inf

    def units(
        self, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], scale: torch.Tensor | float
    ) -> Units:
        """Multipliers of every parameter's units, with the transform ``UNITS``."""
        raise NotImplementedError

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """Called by the optimizer that the policy is handed to."""

    def unbind(self, optimizer: torch.optim.Optimizer) -> None:
        """Called by the optimizer when it takes another policy."""

    def joint(self, optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
        """A block of scalars formed with the gradients of other optimizers; None where there are none."""
        return None

    def together(self, optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
        """Optimizers whose gradients are measured with those of one of them, itself among them."""
        return [optimizer]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; empty for policies without memory."""
        return {}

    def check_loaded(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse what :meth:`load_state_dict` cannot take, before anything is changed."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""


def set_clip_(
    scalars: torch.Tensor,
    coefficient: torch.Tensor,
    scale: torch.Tensor | float,
    skip: torch.Tensor | None = None,
) -> None:
    """Write a clip coefficient, and the multiplier that follows from it, to a block of scalars.

    Args:
        scalars: fp64 block, changed in place.
        coefficient: 0-dim fp64.
        scale: Loss scale that the gradients carry.
        skip: 0-dim; non-zero skips the step, besides what asked for it before. None: as it was.
    """
    scalars[CLIP_COEF].copy_(coefficient)
    scalars[GRAD_MULTIPLIER].copy_((coefficient / scale).float())
    if skip is not None:
        scalars[SKIP].copy_(torch.maximum(scalars[SKIP], skip.to(scalars.dtype)))
