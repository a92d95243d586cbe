"""Inputs of ``stash_`` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gradkern.ops._chunks import DTYPE_CODES, chunk_count
from gradkern.ops._spec import Sample
from gradkern.ops._step.codecs import state_blocks
from gradkern.ops._values import SIZES, edge_values, random_values

__all__ = ["samples"]


def samples() -> Iterator[Sample]:
    """Every gradient dtype, ordinary and edge values."""
    partials = torch.zeros(sum(map(chunk_count, SIZES)), dtype=torch.float64)
    for dtype in DTYPE_CODES:
        for values in (random_values, edge_values):
            yield Sample(
                f"{dtype} {values.__name__}",
                (
                    [values(n, dtype) for n in SIZES],
                    [torch.zeros(n, dtype=torch.uint8) for n in SIZES],
                    [torch.zeros(state_blocks(n), dtype=torch.uint8) for n in SIZES],
                    partials,
                    [(n * 0x9E3779B9) & 0xFFFFFFFF for n in SIZES],
                ),
                {},
            )
    yield Sample("empty lists", ([], [], [], torch.zeros(0, dtype=torch.float64), []), {})
