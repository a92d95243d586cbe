"""Shrinks per-sample gradients: low rank without forming them, then int8 rows.

A sample's weight gradient is ``G = leftᵀ @ right`` with one row per token; for a language model it is as
large as the layer while carrying most of its energy in two or three directions. The functions here find those
directions with thin products only. On a CPU the native library does it in one pass over each sample, on a GPU Triton
does it for all layers at once, to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.ops._registry import backend_for
from gradkern.ops._step.reference import sqrt_fp32
from gradkern.rollback._lanes import combine, dot

__all__ = [
    "dequantize_rows",
    "low_rank_matrix",
    "low_rank_product",
    "quantize_rows",
    "reduce_matrix",
    "reduce_vector",
]

_INT8_MAX = 127
# Divides zeros by something; smaller rows are nothing beside any gradient.
_TINY = torch.finfo(torch.float32).tiny


def quantize_rows(rows: torch.Tensor, most: int = _INT8_MAX) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise along the last dimension to int8 with one scale a row.

    Args:
        rows: Shape ``(..., n)``, fp32.
        most: The largest code.

    Returns:
        ``(codes, scale)``: int8 of the same shape and fp32 of shape ``(...)``, with ``rows ≈ codes * scale``.
        The error is at most ``scale / 2`` an element. A row of zeros has scale 0.
    """
    scale = rows.abs().amax(dim=-1) / torch.full((), float(most), device=rows.device)
    codes = (rows / scale.clamp_min(_TINY).unsqueeze(-1)).round_()
    # What is not finite is refused by whoever reads the scales; of a NaN no code would be the same everywhere.
    codes.masked_fill_(~torch.isfinite(scale).unsqueeze(-1), 0.0)
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
    along = dot(start.unsqueeze(-2), right.unsqueeze(1))
    along = dot(_normalised(combine(along, left)).unsqueeze(-2), left.unsqueeze(1))
    directions = _orthonormal_rows(combine(along, right))
    return combine(dot(directions.unsqueeze(-2), right.unsqueeze(1)), left), directions


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
    along = _normalised(dot(start.unsqueeze(-2), matrix.unsqueeze(1)))
    directions = _orthonormal_rows(combine(along, matrix))
    return dot(directions.unsqueeze(-2), matrix.unsqueeze(1)), directions


def reduce_matrix(left: Tensor | None, right: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduce every sample's ``leftᵀ @ right``, or ``right`` itself, to few rows and quantise them.

    Args:
        left: Shape ``(B, T, K)``, fp32, as for :func:`low_rank_product`; None as for :func:`low_rank_matrix`.
        right: Shape ``(B, T, D)``, fp32.
        start: Shape ``(rank, D)``, fp32.

    Returns:
        ``(left codes, left scale, right codes, right scale)`` as :func:`quantize_rows` gives them, of ``r`` rows a
        sample, ``r = min(T, rank)``.
    """
    backend = backend_for("record", right.device)
    if backend == "reference":
        low_left, low_right = low_rank_matrix(right, start) if left is None else low_rank_product(left, right, start)
        return (*quantize_rows(low_left), *quantize_rows(low_right))
    samples, tokens, width = right.shape
    height = tokens if left is None else left.shape[2]
    kept = min(tokens, start.shape[0])
    left_codes = right.new_empty(samples, kept, height, dtype=torch.int8)
    right_codes = right.new_empty(samples, kept, width, dtype=torch.int8)
    left_scale, right_scale = right.new_empty(samples, kept), right.new_empty(samples, kept)
    if backend == "triton":
        places = [left_scale, right_scale, None, left_codes, right_codes, None]
        _reduce_by_triton(left, right, start, places)
        return left_codes, left_scale, right_codes, right_scale
    torch.ops.gradkern._reduce_matrix_(
        None if left is None else left.contiguous(),
        right.contiguous(),
        samples,
        start,
        left_codes,
        left_scale,
        right_codes,
        right_scale,
    )
    return left_codes, left_scale, right_codes, right_scale


def reduce_vector(rows: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Add up every sample's rows and quantise the sums.

    Args:
        rows: Shape ``(B, T, K)``, fp32.
        factors: Of every element, of the same shape; None for 1.

    Returns:
        As :func:`quantize_rows`, shapes ``(B, K)`` and ``(B,)``.
    """
    samples, tokens, width = rows.shape
    backend = backend_for("record", rows.device)
    if factors is not None and backend != "native":
        rows, factors = rows * factors, None
    if backend == "reference":
        ones = rows.new_ones(samples, 1, tokens)
        return quantize_rows(rows[:, 0] if tokens == 1 else combine(ones, rows)[:, 0])
    codes, scale = rows.new_empty(samples, width, dtype=torch.int8), rows.new_empty(samples)
    if backend == "triton":
        _reduce_by_triton(rows, None, None, [None, None, scale, None, None, codes])
        return codes, scale
    factors = None if factors is None else factors.contiguous()
    torch.ops.gradkern._reduce_vector_(rows.contiguous(), factors, samples, codes, scale)
    return codes, scale


def _reduce_by_triton(
    left: Tensor | None, right: Tensor | None, start: Tensor | None, places: Sequence[Tensor | None]
) -> None:
    """To six places: scales of left, right and sum, then codes."""
    from gradkern.ops._record.reduce.triton import Reduction, reduce_samples  # Triton may not be installed

    left, right = (None if factor is None else factor.contiguous() for factor in (left, right))
    addresses = [0 if place is None else place.data_ptr() for place in places]
    samples = len(next(factor for factor in (left, right) if factor is not None))
    reduce_samples([Reduction(left, right, start, tuple(addresses))], samples)


def _orthonormal_rows(rows: torch.Tensor) -> torch.Tensor:
    """Batched Gram-Schmidt over each sample's few rows; LAPACK would loop over samples."""
    found = _normalised(rows[:, :1])
    for index in range(1, rows.shape[1]):
        row = _normalised(rows[:, index : index + 1])
        # Twice: once leaves a nearly dependent row far from orthogonal.
        for _ in range(2):
            row = _normalised(row - combine(dot(row.unsqueeze(-2), found.unsqueeze(1)), found))
        found = torch.cat([found, row], dim=1)
    return found


def _normalised(row: torch.Tensor) -> torch.Tensor:
    """Scale rows to length 1; rows of zeros stay zero.

    By the largest entry first: the rows are products of several factors, whose squares under- or overflow long before
    they do themselves.
    """
    row = row / row.abs().amax(dim=-1, keepdim=True).clamp_min(_TINY)
    length = sqrt_fp32(dot(row, row)).unsqueeze(-1)
    return row / length.clamp_min(_TINY)
