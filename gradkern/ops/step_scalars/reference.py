"""Reference of ``step_scalars_``: the squares not summed yet, an exact sum of all partials, the scalars in fp64.

The exact sum is a Kulisch accumulator cut to the range of sums of squares of fp32 values: 32-bit limbs in 64-bit
integers, so that additions commute (order independence after Demmel, Ahrens & Nguyen, ReproBLAS; exactness after
Kulisch). The norm has the same bits for every order of tensors, thread count and chunk-aligned split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from gradkern.ops._table import Operands
from gradkern.ops.sumsq import reference as sumsq_reference

__all__ = [
    "CLIP_COEF",
    "GRAD_MULTIPLIER",
    "LIMIT",
    "NORM",
    "SIZE",
    "SKIP",
    "SKIPPED",
    "Unsummed",
    "exact_sum",
    "power",
    "round_fp32",
    "step_scalars_",
]

NORM, GRAD_MULTIPLIER, SKIP, CLIP_COEF, SKIPPED, LIMIT = range(6)
SIZE = 6
LIMBS = 22
BIAS = 352
_LARGEST = 32 * (LIMBS - 3) - 1
_MASK = 0xFFFFFFFF


class Unsummed(NamedTuple):
    """Gradients whose squares are still to be summed.

    Attributes:
        operands: A table that has them, of any op.
        column: Their name in it.
        partials: fp64, shape ``(chunks,)``; receives the sum of every chunk.
    """

    operands: Operands
    column: str
    partials: torch.Tensor


def exact_sum(blocks: Sequence[torch.Tensor]) -> float:
    """Sum non-negative fp64 values between ``2^-300`` and ``2^308`` without rounding on the way.

    Larger values count as infinite, smaller ones as zero; sums of squares of fp32 values are neither.

    Returns:
        The sum, rounded while its limbs are added from the lowest to the highest; NaN or inf if any value is.
    """
    limbs = [0] * LIMBS
    infinite = False
    for block in blocks:
        values = block.detach().reshape(-1).cpu()
        if bool(values.isnan().any()):
            return math.nan
        bits = values.view(torch.int64)
        position = ((bits >> 52) & 0x7FF) - 1075 + BIAS
        if bool((position > _LARGEST).any()):
            infinite = True
            continue
        counted = position >= 0
        mantissa = torch.where(counted, (bits & 0xFFFFFFFFFFFFF) | (1 << 52), 0)
        position = torch.where(counted, position, 0)
        limb, shift = position >> 5, position & 31
        low = (mantissa & _MASK) << shift
        high = (mantissa >> 32) << shift
        sums = torch.zeros(LIMBS, dtype=torch.int64)
        sums.index_add_(0, limb, low & _MASK)
        sums.index_add_(0, limb + 1, (low >> 32) + (high & _MASK))
        sums.index_add_(0, limb + 2, high >> 32)
        limbs = [limb + int(extra) for limb, extra in zip(limbs, sums.tolist(), strict=True)]
    if infinite:
        return math.inf
    total, carry, weight = 0.0, 0, 2.0**-BIAS
    for limb_value in limbs:
        word = limb_value + carry
        total += float(word & _MASK) * weight
        carry = word >> 32
        weight *= 2.0**32
    return total


def power(base: float, n: int) -> float:
    """``base**n`` by binary exponentiation from the lowest bit, in fp64: the order every backend keeps."""
    result = 1.0
    while n > 0:
        if n & 1:
            result *= base
        base *= base
        n >>= 1
    return result


def round_fp32(value: float) -> float:
    """``value`` rounded once to fp32, inf beyond its range."""
    return torch.tensor(value, dtype=torch.float64).float().item()


def step_scalars_(
    scalars: torch.Tensor,
    steps: Sequence[torch.Tensor],
    partials: Sequence[torch.Tensor],
    unsummed: Sequence[Unsummed],
    *,
    max_norm: float,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    skip_nonfinite: bool,
) -> None:
    """Sum what is not summed yet, write the scalars of the step to ``scalars``, count it unless skipped.

    ``norm = sqrt(sum) / grad_scale``; ``clip = min(1, max_norm / (norm + 1e-6))``, NaN staying NaN as in
    ``torch.nn.utils.clip_grad_norm_``, and 1 without a threshold (``max_norm`` inf); the multiplier is
    ``clip / grad_scale`` rounded to fp32. The step is skipped where ``found_inf`` is not 0 and, if asked for, where the
    norm is not finite; ``scalars[SKIPPED]`` counts the steps skipped.
    """
    for operands, column, sums in unsummed:
        sumsq_reference.sumsq(operands, sums, column=column)
    scale = 1.0 if grad_scale is None else float(grad_scale)
    norm = math.sqrt(exact_sum([*partials, *(sums for _, _, sums in unsummed)])) / scale
    skip = found_inf is not None and float(found_inf) != 0.0
    skip = skip or (skip_nonfinite and not math.isfinite(norm))
    clip = 1.0
    if max_norm != math.inf:
        clip = max_norm / (norm + 1e-6)
        clip = 1.0 if clip > 1.0 else clip  # NaN stays
    scalars[:SKIPPED] = torch.tensor(
        [norm, round_fp32(clip / scale), 1.0 if skip else 0.0, clip],
        dtype=torch.float64,
        device=scalars.device,
    )
    if skip:
        scalars[SKIPPED] += 1.0
        return
    for block in steps:
        block.add_(1.0)
