"""What searches among sketches take and give, however they search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradkern.rollback._reduce import quantize_rows

__all__ = ["TopScores", "quantize_queries", "require_k"]


@dataclass(frozen=True, slots=True)
class TopScores:
    """The best samples for each of some queries, the most helpful first.

    Attributes:
        ids: Sample ids, int64, shape ``(queries, k)``.
        scores: Estimates of :attr:`Influence.score`, fp32, of the same shape.
    """

    ids: Tensor
    scores: Tensor


def require_k(k: int) -> None:
    """Raise ``ValueError`` where there is nothing to find."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")


def quantize_queries(queries: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of queries.

    Raises:
        ValueError: They have another shape or dtype, or are not finite.
    """
    if queries.dim() != 2 or queries.shape[1] != width or queries.dtype != torch.float32:
        raise ValueError(
            f"queries must be of shape (queries, {width}) and fp32, got {tuple(queries.shape)} and {queries.dtype}; "
            "make them with Sketches.project()"
        )
    if not bool(torch.isfinite(queries).all()):
        raise ValueError("queries must be finite, got NaN or infinity: the gradient of the query's loss is not finite")
    return quantize_rows(queries)
