"""Sums in the fixed order of the native loops (``csrc/cpu/lanes-inl.h``), so that every backend has the same bits.

Each works on the last dimension or two and batches over the others.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["combine", "dot", "pairs_sum"]

_LANES = 64


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner products along the last dimension: 64 lanes, each in order, folded in halves; others broadcast."""
    size = left.shape[-1]
    lanes = left.new_zeros(_LANES)
    for at in range(0, size, _LANES):
        products = left[..., at : at + _LANES] * right[..., at : at + _LANES]
        lanes = lanes + F.pad(products, (0, _LANES - products.shape[-1]))
    half = _LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes[..., 0]


def combine(weights: Tensor, rows: Tensor) -> Tensor:
    """Weighted sums of rows, ``(..., r, T) @ (..., T, n)``: four sums of every fourth row, added in pairs."""
    missing = -rows.shape[-2] % 4
    all_weights = F.pad(weights, (0, missing)).unflatten(-1, (-1, 4))
    all_rows = F.pad(rows, (0, 0, 0, missing)).unflatten(-2, (-1, 4))
    sums = rows.new_zeros(*weights.shape[:-1], 4, rows.shape[-1])
    for four_weights, four_rows in zip(all_weights.unbind(-2), all_rows.unbind(-3), strict=True):
        sums = sums + four_weights.unsqueeze(-1) * four_rows.unsqueeze(-3)
    first, second, third, fourth = sums.unbind(-2)
    return (first + second) + (third + fourth)


def pairs_sum(rows: Tensor) -> Tensor:
    """The sum over dimension 0, added in pairs, pairs in pairs, and so on."""
    while len(rows) > 1:
        rows = F.pad(rows, [*[0, 0] * (rows.dim() - 1), 0, len(rows) % 2])
        rows = rows[0::2] + rows[1::2]
    return rows[0]
