"""Specification of ``sumsq_exact``."""

from __future__ import annotations

import torch

from gradkern.ops import _registry
from gradkern.ops._spec import OpSpec
from gradkern.ops._table import Operands
from gradkern.ops.sumsq_exact import reference

__all__ = ["SPEC"]


def _native(operands: Operands, limbs: torch.Tensor, *, column: str = "tensors") -> None:
    position = list(operands.columns).index(column)
    torch.ops.gradkern._sumsq_exact_table_(operands.table, position, operands.cache.dtype_code(column), limbs)


def _traceable(tensors: list[torch.Tensor]) -> torch.Tensor:
    operands = Operands(SPEC.name, {"tensors": tensors})
    limbs = torch.empty(reference.WORDS, dtype=torch.int64, device=operands.device())
    _registry.select(SPEC, limbs.device)(operands, limbs)
    return limbs


def _fake(tensors: list[torch.Tensor]) -> torch.Tensor:
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.empty(reference.WORDS, dtype=torch.int64, device=device)


SPEC = _registry.register(
    OpSpec(
        name="sumsq_exact",
        schema="(Tensor[] tensors) -> Tensor",
        reference=reference.sumsq_exact,
        native=_native,
        triton="gradkern.ops.sumsq_exact.triton:sumsq_exact",
        traceable=_traceable,
        fake=_fake,
        bytes_moved=lambda dtype: dtype.itemsize,
    )
)
