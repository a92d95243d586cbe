"""Inputs of ``accumulate_`` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gradkern.ops._chunks import DTYPE_CODES, chunk_count
from gradkern.ops._spec import Sample
from gradkern.ops._values import SIZES, edge_values, random_values

__all__ = ["samples"]


def samples() -> Iterator[Sample]:
    """Every gradient dtype, added and overwritten, with and without partials, ordinary and edge values."""
    chunks = sum(map(chunk_count, SIZES))
    for dtype in DTYPE_CODES:
        for overwrite in (False, True):
            for values in (random_values, edge_values):
                for partials in (torch.zeros(chunks, dtype=torch.float64), None):
                    yield Sample(
                        f"{dtype} {overwrite=} {values.__name__} partials={partials is not None}",
                        (
                            [random_values(n, torch.float32, seed=n + 1) for n in SIZES],
                            [values(n, dtype) for n in SIZES],
                            partials,
                        ),
                        {"overwrite": overwrite},
                    )
    yield Sample("empty lists", ([], [], None), {"overwrite": False})
