"""Random functions of the parameters whose gradients stand in for all others.

Of functions with the gradients ``z_1 .. z_d`` (of all parameters, one below the other), and of any ``v`` and ``q``,

    ⟨v, q⟩ ≈ Σ_k ⟨v, z_k⟩ ⟨z_k, q⟩,

where the elements of every ``z_k`` are ±1 / √d at random. In a parameter's matrix (all but the first dimension of a
larger one count as one)

    z_k = S ⊙ (u_k w_kᵀ) / √d,

with random signs in ``S``, which all ``k`` share, and in ``u_k`` and ``w_k``. Each ``z_k`` alone then has independent
signs, and the estimates by different ``k`` are uncorrelated, so that mean and variance are those of signs that are all
independent: ``⟨v, q⟩``, and at most ``(‖v‖² ‖q‖² + ⟨v, q⟩²) / d``. But there are only
``rows columns + d (rows + columns)`` of them, and a gradient is projected by one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

__all__ = ["directions", "project"]

_SHARED, _OF_ROWS, _OF_COLUMNS = range(3)


def directions(shapes: Mapping[int, tuple[int, ...]], width: int, seed: int, first: int, end: int) -> dict[int, Tensor]:
    """Some of the random gradients.

    Args:
        shapes: Of the parameters, by index.
        width: ``d``.
        seed: Of all signs.
        first: The first ``k``, from 0.
        end: One past the last.

    Returns:
        By parameter, fp32, shape ``(end - first, *parameter)``.
    """
    found = {}
    for index, shape in shapes.items():
        shared, of_rows, of_columns = _all_signs(shape, width, seed, index)
        made = of_rows[first:end, :, None] * of_columns[first:end, None, :] * (shared / math.sqrt(width))
        found[index] = made.reshape(-1, *shape)
    return found


def project(gradients: Mapping[int, Tensor], width: int, seed: int) -> Tensor:
    """Inner products of a gradient with all ``z_k``.

    Args:
        gradients: By parameter, fp32.
        width: ``d``.
        seed: Of all signs.

    Returns:
        fp32, shape ``(width,)``.
    """
    total = torch.zeros(width)
    for index, gradient in gradients.items():
        shared, of_rows, of_columns = _all_signs(tuple(gradient.shape), width, seed, index)
        total += (of_rows.t() * ((shared * gradient.reshape(shared.shape)) @ of_columns.t())).sum(dim=0)
    return total / math.sqrt(width)


def _all_signs(shape: tuple[int, ...], width: int, seed: int, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """``S``, all ``u`` and all ``w`` of a parameter, fp32."""
    rows = shape[0] if len(shape) > 1 else 1
    columns = math.prod(shape) // max(1, rows)
    return (
        _signs(seed, 3 * index + _SHARED, rows, columns),
        _signs(seed, 3 * index + _OF_ROWS, width, rows),
        _signs(seed, 3 * index + _OF_COLUMNS, width, columns),
    )


def _signs(seed: int, stream: int, rows: int, columns: int) -> Tensor:
    """Random ±1: the bits of Philox, whose words numpy promises to keep, so that a file can be read anywhere."""
    count = rows * columns
    words = np.random.Philox(key=seed | stream << 64).random_raw(-(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=count, bitorder="little")
    return torch.from_numpy(bits).view(rows, columns).float().mul_(2.0).sub_(1.0)
