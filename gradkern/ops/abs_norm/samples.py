"""Inputs of ``abs_norm`` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

from gradkern.ops._chunks import DTYPE_CODES
from gradkern.ops._spec import Sample
from gradkern.ops._values import SIZES, edge_values

__all__ = ["samples"]


def samples() -> Iterator[Sample]:
    """Every dtype, sum and maximum, with values finite and not, and the empty list."""
    for maximum in (False, True):
        for dtype in DTYPE_CODES:
            kwargs = {"maximum": maximum}
            finite = [edge_values(n, dtype, finite=True) for n in SIZES]
            yield Sample(f"{dtype} {maximum=} finite edges", (finite,), kwargs)
            yield Sample(f"{dtype} {maximum=} edges", ([edge_values(n, dtype) for n in SIZES],), kwargs)
        yield Sample(f"empty list {maximum=}", ([],), {"maximum": maximum})
