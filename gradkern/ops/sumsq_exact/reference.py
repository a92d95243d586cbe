"""Reference of ``sumsq_exact``: squares of significands summed as integers by exponent, then put in place.

A sum that rounds nowhere depends neither on order nor on how a tensor is cut. Backends are free to add in their own
ways (native: in bins of fp64 that stay exact, after ReproBLAS by Demmel, Ahrens & Nguyen; Triton: in windows of
integers): whatever is exact has the same bits.
"""

from __future__ import annotations

import torch

from gradkern.ops._chunks import flat_view
from gradkern.ops._table import Operands
from gradkern.ops.step_scalars.reference import BIAS, LIMBS

__all__ = ["INFS", "NANS", "WORDS", "exact_partials", "sumsq_exact"]

INFS, NANS = LIMBS, LIMBS + 1
WORDS = LIMBS + 2
"""Limbs of 32 bits, the lowest worth ``2**-352``; then how many values are infinite, and how many are NaN."""

_MASK = 0xFFFFFFFF
_BLOCK = 1 << 24  # elements at once: sums of 32-bit halves stay far below 2^63


def _sums_by_exponent(values: torch.Tensor) -> torch.Tensor:
    """Sums of the low and high 32 bits of squared significands by exponent: int64, shape ``(2, 256)``."""
    bits = values.float().view(torch.int32).long() & 0x7FFFFFFF
    exponent = bits >> 23
    significand = torch.where(exponent == 0, bits, (bits & 0x7FFFFF) | 0x800000)
    square = significand * significand
    sums = torch.zeros(2, 256, dtype=torch.int64, device=values.device)
    sums[0].index_add_(0, exponent, square & _MASK)
    sums[1].index_add_(0, exponent, square >> 32)
    return sums


def sumsq_exact(operands: Operands, limbs: torch.Tensor, *, column: str = "tensors") -> None:
    """Write the sum of squares of the operand named ``column`` to ``limbs``: int64, shape ``(24,)``, carries done.

    Exact: ``sum(limbs[k] * 2**(32 k - 352))`` is the sum of the squares of all finite values.
    """
    total, infs, nans = 0, 0, 0
    for tensor in operands[column]:
        for values in flat_view(tensor).split(_BLOCK):
            nans += int(values.isnan().sum())
            infs += int(values.isinf().sum())
            for exponent, (low, high) in enumerate(_sums_by_exponent(values)[:, :255].t().tolist()):
                # A value is significand * 2^(exponent - 150); subnormals have the unit of exponent 1.
                total += (low + (high << 32)) << (2 * max(exponent, 1) - 300 + BIAS)
    words = [(total >> (32 * k)) & _MASK for k in range(LIMBS)]
    limbs.copy_(torch.tensor([*words, infs, nans], dtype=torch.int64))


def exact_partials(limbs: torch.Tensor) -> torch.Tensor:
    """The same sum as fp64 partials for ``step_scalars_``, which adds them exactly.

    Args:
        limbs: int64, shape ``(24,)``; also the sum of several such tensors, whose carries are not done.

    Returns:
        fp64, shape ``(46,)``: the halves of every limb in place, then inf and NaN where there were such values, else 0.
    """
    weights = torch.ldexp(
        torch.ones(LIMBS, dtype=torch.float64, device=limbs.device),
        torch.arange(-BIAS, 32 * LIMBS - BIAS, 32, device=limbs.device),
    )
    words = limbs[:LIMBS]
    low, high = (words & _MASK).double() * weights, (words >> 32).double() * (weights * 2.0**32)
    found = limbs[LIMBS:] > 0
    special = torch.tensor([torch.inf, torch.nan], dtype=torch.float64, device=limbs.device)
    return torch.cat([low, high, torch.where(found, special, 0.0)])
