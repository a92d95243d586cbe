"""Shrinks per-sample gradients: low rank without forming them, then int8 rows.

A sample's weight gradient is ``G = leftᵀ @ right`` with one row per token; for a language model it is as
large as the layer while carrying most of its energy in two or three directions. The functions here find those
directions with thin products only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["dequantize_rows", "low_rank_matrix", "low_rank_product", "quantize_rows"]

_INT8_MAX = 127.0
# Divides zeros by something; smaller rows are nothing beside any gradient.
_TINY = torch.finfo(torch.float32).tiny


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise along the last dimension to int8 with one scale a row.

    Args:
        rows: Shape ``(..., n)``, fp32.

    Returns:
        ``(codes, scale)``: int8 of the same shape and fp32 of shape ``(...)``, with ``rows ≈ codes * scale``.
        The error is at most ``scale / 2`` an element. A row of zeros has scale 0.
    """
    scale = rows.abs().amax(dim=-1) / _INT8_MAX
    codes = (rows / scale.clamp_min(_TINY).unsqueeze(-1)).round_()
    return codes.to(torch.int8), scale


def dequantize_rows(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Undo :func:`quantize_rows`; returns fp32 of the shape of ``codes``."""
    return codes.float() * scale.unsqueeze(-1)


def low_rank_product(left: torch.Tensor, right: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Approximate ``leftᵀ @ right`` of every sample by a product of few rows.

    Args:
        left: Shape ``(B, T, K)``, fp32.
        right: Shape ``(B, T, D)``, fp32.
        start: Shape ``(rank, D)``, fp32: random directions from which the search starts.

    Returns:
        ``(left, right)`` of shapes ``(B, r, K)`` and ``(B, r, D)`` whose ``leftᵀ @ right`` approximates the
        argument's. Exact, and the arguments themselves, when ``T <= rank``; otherwise ``right`` has
        orthonormal rows and the result is the projection onto them, so it never holds more energy than the original.

    Numerics:
        Randomised range finder with one power iteration (Halko, Martinsson and Tropp, "Finding structure with
        randomness", 2011, algorithm 4.4). Deterministic for a given ``start``.
    """
    if left.shape[1] <= start.shape[0]:
        return left, right
    left_columns, right_columns = left.transpose(1, 2), right.transpose(1, 2)
    return _project(
        lambda rows: (rows @ right_columns) @ left,
        lambda rows: (rows @ left_columns) @ right,
        start.expand(left.shape[0], -1, -1),
    )


def low_rank_matrix(matrix: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Approximate every sample's explicit matrix, as :func:`low_rank_product` does for a product.

    Args:
        matrix: Shape ``(B, U, D)``, fp32.
        start: Shape ``(rank, D)``, fp32.

    Returns:
        ``(left, right)`` of shapes ``(B, r, U)`` and ``(B, r, D)`` with ``leftᵀ @ right ≈ matrix``; exact
        when ``U <= rank``.
    """
    samples, height, _ = matrix.shape
    if height <= start.shape[0]:
        return torch.eye(height, device=matrix.device).expand(samples, -1, -1), matrix
    columns = matrix.transpose(1, 2)
    return _project(lambda rows: rows @ columns, lambda rows: rows @ matrix, start.expand(samples, -1, -1))


def _project(
    multiply: Callable[[torch.Tensor], torch.Tensor],
    multiply_transposed: Callable[[torch.Tensor], torch.Tensor],
    start: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Project ``G``, known only through its products with rows, onto ``rank`` directions of its row space."""
    right = _orthonormal_rows(multiply_transposed(_normalised(multiply(start))))
    return multiply(right), right


def _orthonormal_rows(rows: torch.Tensor) -> torch.Tensor:
    """Batched Gram-Schmidt over each sample's few rows; LAPACK would loop over samples."""
    basis: list[torch.Tensor] = []
    for index in range(rows.shape[1]):
        row = _normalised(rows[:, index : index + 1])
        if basis:
            found = torch.cat(basis, dim=1)
            # Twice: once leaves a nearly dependent row far from orthogonal.
            for _ in range(2):
                row = _normalised(row - (row @ found.transpose(1, 2)) @ found)
        basis.append(row)
    return torch.cat(basis, dim=1)


def _normalised(row: torch.Tensor) -> torch.Tensor:
    """Scale rows to length 1; rows of zeros stay zero.

    By the largest entry first: the rows are products of several factors, whose squares under- or overflow long before
    they do themselves.
    """
    row = row / row.abs().amax(dim=-1, keepdim=True).clamp_min(_TINY)
    length: torch.Tensor = torch.linalg.vector_norm(row, dim=-1, keepdim=True)
    return row / length.clamp_min(_TINY)
