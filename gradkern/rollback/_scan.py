"""The best inner products of int8 rows with a query, over all rows: in native code, and the same bits in plain torch.

A score is the exact integer inner product, rounded to fp32, times the row's scale, times the query's. Higher ones come
first, of equal ones the row with the smaller number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradkern import _native

__all__ = ["native_scan", "reference_scan", "scan"]

# Rows that are converted together.
_CHUNK = 1 << 16


def scan(codes: Tensor, scales: Tensor, queries: Tensor, query_scales: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the best rows for each query, in native code where that is loaded.

    Args:
        codes: Shape ``(n, d)``, int8, contiguous; ``d`` at most 131,071.
        scales: Of rows, shape ``(n,)``, fp32, finite.
        queries: Codes of the queries, shape ``(m, d)``, int8.
        query_scales: Shape ``(m,)``, fp32, finite.
        k: How many, at most ``n``.

    Returns:
        Scores, fp32, and row numbers, int64, both of shape ``(m, k)``.
    """
    found = reference_scan if _native.unavailable_reason() is not None else native_scan
    return found(codes, scales, queries, query_scales, k)


def native_scan(codes: Tensor, scales: Tensor, queries: Tensor, query_scales: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """In one pass over the rows for all queries, on torch's threads; see :func:`scan`."""
    scores, rows = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
    if scores.numel():
        torch.ops.gradkern._sketch_top_(codes, scales, queries, query_scales, scores, rows)
    return scores, rows


def reference_scan(
    codes: Tensor, scales: Tensor, queries: Tensor, query_scales: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """In fp64, which is exact for such integers; see :func:`scan`."""
    parts = [
        (queries.double() @ rows.double().t()).float() * row_scales * query_scales.unsqueeze(1)
        for rows, row_scales in zip(codes.split(_CHUNK), scales.split(_CHUNK), strict=True)
    ]
    scores, rows = torch.cat(parts, dim=1).sort(dim=1, descending=True, stable=True)
    return scores[:, :k].contiguous(), rows[:, :k].contiguous()
