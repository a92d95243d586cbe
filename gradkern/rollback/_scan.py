"""The rows of int8 with the highest inner products with a query: in native code, and the same bits in plain torch.

A score is the exact integer inner product, rounded to fp32, times the row's scale, times the query's. Higher ones come
first, of equal ones the smaller id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradkern import _native

__all__ = ["Rows", "native_scan", "reference_scan", "scan"]

# Rows that are converted together.
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Rows:
    """What is searched.

    Attributes:
        codes: Shape ``(n, d)``, int8, contiguous; ``d`` at most 131,071.
        scales: Shape ``(n,)``, fp32, finite.
        ids: Shape ``(n,)``, int64, no two alike.
    """

    codes: Tensor
    scales: Tensor
    ids: Tensor


def scan(rows: Rows, ranges: Tensor, queries: Tensor, query_scales: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the best rows for each query, in native code where that is loaded.

    Args:
        rows: What is searched.
        ranges: First row and one past the last of the parts to look at, without overlap: shape ``(r, 2)``, int64.
        queries: Codes, shape ``(m, d)``, int8.
        query_scales: Shape ``(m,)``, fp32, finite.
        k: How many, at most the rows in ``ranges``.

    Returns:
        Scores, fp32, and ids, int64, both of shape ``(m, k)``.
    """
    found = reference_scan if _native.unavailable_reason() is not None else native_scan
    return found(rows, ranges, queries, query_scales, k)


def native_scan(rows: Rows, ranges: Tensor, queries: Tensor, query_scales: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """In one pass over the rows for all queries, on torch's threads; see :func:`scan`."""
    scores, ids = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
    if scores.numel():
        torch.ops.gradkern._sketch_top_(rows.codes, rows.scales, rows.ids, ranges, queries, query_scales, scores, ids)
    return scores, ids


def reference_scan(rows: Rows, ranges: Tensor, queries: Tensor, query_scales: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """In fp64, which is exact for such integers; see :func:`scan`."""
    made, met = [torch.empty(len(queries), 0)], [torch.empty(0, dtype=torch.int64)]
    for begin, end in ranges.tolist():
        for first in range(begin, end, _CHUNK):
            part = slice(first, min(first + _CHUNK, end))
            # Integers have one zero: 0 times a negative code is not to be -0.
            products = queries.double() @ rows.codes[part].double().t() + 0.0
            made.append(products.float() * rows.scales[part] * query_scales.unsqueeze(1))
            met.append(rows.ids[part])
    ids, order = torch.cat(met).sort()
    scores, positions = torch.cat(made, dim=1)[:, order].sort(dim=1, descending=True, stable=True)
    return scores[:, :k].contiguous(), ids[positions[:, :k]]
