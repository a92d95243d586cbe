"""Row x column form of the preconditioner: what influence is propagated with, in O(rows + columns) bytes.

Coordinates whose second moment happens to be tiny get huge steps that say nothing about the data; averaging
the squared denominators over rows and columns (the estimate of Adafactor, Shazeer and Stern, 2018) removes
them and raises the agreement of influence with retraining. Conservation is checked with the exact preconditioner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gradkern.rollback._lanes import dot, pairs_sum

__all__ = ["smooth", "smoothed_sizes", "unsmooth"]

_STORED = torch.bfloat16


def smooth(preconditioner: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Compress a preconditioner ``P``.

    Args:
        preconditioner: Elementwise ``P_t``, fp32. Of a convolution all but the first dimension count as one.

    Returns:
        For a matrix, the means of ``1 / P²`` over its columns and over its rows (shapes ``(rows,)`` and
        ``(columns,)``); for anything else ``P`` itself, flattened. bf16: range matters here, digits do not.
        Where ``P`` is zero (a learning rate of zero) the means are infinite and :func:`unsmooth` gives zero.
    """
    if preconditioner.dim() < 2:
        return (preconditioner.reshape(-1).to(_STORED),)
    inverse = preconditioner.flatten(1).reciprocal()
    rows = dot(inverse, inverse) / torch.full_like(inverse[:, 0], inverse.shape[1])
    columns = pairs_sum(inverse * inverse) / torch.full_like(inverse[0], inverse.shape[0])
    return rows.to(_STORED), columns.to(_STORED)


def smoothed_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """How many elements each tensor has that :func:`smooth` gives for a parameter."""
    size = math.prod(shape)
    return (size,) if len(shape) < 2 else (shape[0], size // shape[0])


def unsmooth(stored: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """Expand what :func:`smooth` gave to fp32 of ``shape``; ``sqrt(mean / (rows ⊗ columns))`` if a matrix."""
    if len(stored) == 1:
        return stored[0].float().reshape(tuple(shape))
    rows, columns = stored[0].float(), stored[1].float()
    if not torch.isfinite(rows).all():
        return rows.new_zeros(tuple(shape))
    # Three roots instead of the root of a product, which would leave fp32's range.
    found = rows.mean().sqrt() * rows.rsqrt().unsqueeze(1) * columns.rsqrt().unsqueeze(0)
    return found.reshape(tuple(shape))
