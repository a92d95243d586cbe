"""Specification of ``step_scalars_``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradkern.ops import _registry
from gradkern.ops._chunks import chunk_count
from gradkern.ops._spec import OpSpec
from gradkern.ops._table import Operands
from gradkern.ops.step_scalars import reference

__all__ = ["SPEC"]


def _native(
    scalars: torch.Tensor,
    steps: Sequence[torch.Tensor],
    partials: Sequence[torch.Tensor],
    unsummed: Sequence[reference.Unsummed],
    *,
    max_norm: float,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    skip_nonfinite: bool,
) -> None:
    torch.ops.gradkern._step_scalars_native_(
        scalars,
        steps,
        partials,
        [operands.table for operands, _, _ in unsummed],
        [list(operands.columns).index(column) for operands, column, _ in unsummed],
        [operands.cache.dtype_code(column) for operands, column, _ in unsummed],
        [sums for _, _, sums in unsummed],
        max_norm,
        # These lie on the CPU: tolist() looks there, where float() would ask for an item as a GPU must be asked.
        None if grad_scale is None else grad_scale.reshape(()).tolist(),
        found_inf is not None and bool(found_inf.reshape(()).tolist()),
        skip_nonfinite,
    )


def _traceable(
    scalars: torch.Tensor,
    steps: list[torch.Tensor],
    partials: list[torch.Tensor],
    grads: list[torch.Tensor],
    *,
    max_norm: float,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    skip_nonfinite: bool = False,
) -> torch.Tensor:
    operands = Operands(SPEC.name, {"grads": grads})
    sums = torch.empty(operands.cache.chunks, dtype=torch.float64, device=scalars.device)
    _registry.select(SPEC, scalars.device)(
        scalars,
        steps,
        partials,
        [reference.Unsummed(operands, "grads", sums)] if grads else [],
        max_norm=max_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        skip_nonfinite=skip_nonfinite,
    )
    return sums


def _fake(
    scalars: torch.Tensor,
    steps: list[torch.Tensor],
    partials: list[torch.Tensor],
    grads: list[torch.Tensor],
    *,
    max_norm: float,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    skip_nonfinite: bool = False,
) -> torch.Tensor:
    torch._check(scalars.dtype == torch.float64, lambda: "step_scalars_: scalars must be fp64")
    return scalars.new_empty(sum(chunk_count(grad.numel()) for grad in grads))


SPEC = _registry.register(
    OpSpec(
        name="step_scalars_",
        schema=(
            "(Tensor(a!) scalars, Tensor(b!)[] steps, Tensor[] partials, Tensor[] grads, *, float max_norm, "
            "Tensor? grad_scale=None, Tensor? found_inf=None, bool skip_nonfinite=False) -> Tensor"
        ),
        reference=reference.step_scalars_,
        native=_native,
        triton="gradkern.ops.step_scalars.triton:step_scalars_",
        traceable=_traceable,
        fake=_fake,
        bytes_moved=lambda grad_dtype=None: 0 if grad_dtype is None else grad_dtype.itemsize,
    )
)
