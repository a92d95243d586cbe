"""Specification of ``step_scalars_``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradkern.ops import _registry
from gradkern.ops._spec import OpSpec
from gradkern.ops.step_scalars import reference

__all__ = ["SPEC"]


def _native(
    scalars: torch.Tensor,
    steps: Sequence[torch.Tensor],
    partials: Sequence[torch.Tensor],
    *,
    max_norm: float,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> None:
    scale = None if grad_scale is None else float(grad_scale)
    skip = found_inf is not None and float(found_inf) != 0.0
    torch.ops.gradkern._step_scalars_native_(scalars, steps, partials, max_norm, scale, skip)


def _traceable(
    scalars: torch.Tensor,
    steps: list[torch.Tensor],
    partials: list[torch.Tensor],
    *,
    max_norm: float,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    backend = _registry.select(SPEC, scalars.device)
    backend(scalars, steps, partials, max_norm=max_norm, grad_scale=grad_scale, found_inf=found_inf)


def _fake(
    scalars: torch.Tensor,
    steps: list[torch.Tensor],
    partials: list[torch.Tensor],
    *,
    max_norm: float,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    torch._check(scalars.dtype == torch.float64, lambda: "step_scalars_: scalars must be fp64")


SPEC = _registry.register(
    OpSpec(
        name="step_scalars_",
        schema=(
            "(Tensor(a!) scalars, Tensor(b!)[] steps, Tensor[] partials, *, float max_norm, Tensor? grad_scale=None, "
            "Tensor? found_inf=None) -> ()"
        ),
        reference=reference.step_scalars_,
        native=_native,
        triton="gradkern.ops.step_scalars.triton:step_scalars_",
        traceable=_traceable,
        fake=_fake,
        bytes_moved=lambda: 0,
    )
)
