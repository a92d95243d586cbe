"""Specification of ``sumsq``."""

from __future__ import annotations

import torch

from gradkern.ops import _registry
from gradkern.ops._chunks import chunk_count
from gradkern.ops._spec import OpSpec
from gradkern.ops._table import Operands
from gradkern.ops.sumsq import reference

__all__ = ["SPEC"]


def _native(operands: Operands, partials: torch.Tensor, *, column: str = "tensors") -> None:
    position = list(operands.columns).index(column)
    torch.ops.gradkern._sumsq_table_(operands.table, position, operands.cache.dtype_code(column), partials)


def _total_chunks(tensors: list[torch.Tensor]) -> int:
    return sum(chunk_count(t.numel()) for t in tensors)


def _traceable(tensors: list[torch.Tensor]) -> torch.Tensor:
    operands = Operands(SPEC.name, {"tensors": tensors})
    device = operands.device()
    partials = torch.empty(_total_chunks(tensors), dtype=torch.float64, device=device)
    _registry.select(SPEC, device)(operands, partials)
    return partials


def _fake(tensors: list[torch.Tensor]) -> torch.Tensor:
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.empty(_total_chunks(tensors), dtype=torch.float64, device=device)


SPEC = _registry.register(
    OpSpec(
        name="sumsq",
        schema="(Tensor[] tensors) -> Tensor",
        reference=reference.sumsq,
        native=_native,
        triton="gradkern.ops.sumsq.triton:sumsq",
        traceable=_traceable,
        fake=_fake,
        bytes_moved=lambda dtype: dtype.itemsize,
    )
)
