"""Inputs of ``sumsq`` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

from gradkern.ops._chunks import DTYPE_CODES
from gradkern.ops._spec import Sample
from gradkern.ops._values import SIZES, edge_values, random_values

__all__ = ["samples"]


def samples() -> Iterator[Sample]:
    """Every dtype with ordinary and with edge values, and the empty list."""
    for dtype in DTYPE_CODES:
        yield Sample(f"{dtype}", ([random_values(n, dtype, seed=n) for n in SIZES],), {})
        yield Sample(f"{dtype} edges", ([edge_values(n, dtype) for n in SIZES],), {})
        yield Sample(f"{dtype} finite edges", ([edge_values(n, dtype, finite=True) for n in SIZES],), {})
    yield Sample("empty list", ([],), {})
