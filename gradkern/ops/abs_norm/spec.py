"""Specification of ``abs_norm``."""

from __future__ import annotations

import torch

from gradkern.ops import _registry
from gradkern.ops._chunks import chunk_count
from gradkern.ops._spec import OpSpec
from gradkern.ops._table import Operands
from gradkern.ops.abs_norm import reference

__all__ = ["SPEC"]


def _native(operands: Operands, partials: torch.Tensor, *, maximum: bool) -> None:
    torch.ops.gradkern._abs_norm_table_(operands.table, operands.cache.dtype_code("tensors"), maximum, partials)


def _traceable(tensors: list[torch.Tensor], *, maximum: bool) -> torch.Tensor:
    operands = Operands(SPEC.name, {"tensors": tensors})
    partials = torch.empty(operands.cache.chunks, dtype=torch.float64, device=operands.device())
    _registry.select(SPEC, partials.device)(operands, partials, maximum=maximum)
    return partials


def _fake(tensors: list[torch.Tensor], *, maximum: bool) -> torch.Tensor:
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.empty(sum(chunk_count(t.numel()) for t in tensors), dtype=torch.float64, device=device)


SPEC = _registry.register(
    OpSpec(
        name="abs_norm",
        schema="(Tensor[] tensors, *, bool maximum) -> Tensor",
        reference=reference.abs_norm,
        native=_native,
        triton="gradkern.ops.abs_norm.triton:abs_norm",
        traceable=_traceable,
        fake=_fake,
        bytes_moved=lambda dtype: dtype.itemsize,
    )
)
