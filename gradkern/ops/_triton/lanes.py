"""Sums in the fixed order of recording (``csrc/cpu/lanes-inl.h``, ``gradkern.rollback._lanes``), and its roundings.

Inner products run in 64 lanes that are folded in halves, sums over rows in four that are added in pairs. Absent
elements count as zeros; sums start from zero, so that they are never ``-0``.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANES = tl.constexpr(64)
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal fp32
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def fold_lanes(sums):
    """Sums of shape (rows, 64), of each row in halves: 32 + 32, 16 + 16, and so on; shape (rows,)."""
    sums = tl.reshape(sums, [sums.shape[0], 2, 2, 2, 2, 2, 2])
    sums = tl.sum(tl.sum(tl.sum(sums, axis=1), axis=1), axis=1)
    return tl.sum(tl.sum(tl.sum(sums, axis=1), axis=1), axis=1)


@triton.jit
def fold_four(sums):
    """Sums of shape (4, columns) to one row: ``(s0 + s1) + (s2 + s3)``."""
    return tl.sum(tl.sum(tl.reshape(sums, [2, 2, sums.shape[1]]), axis=1), axis=0)


@triton.jit
def magnitude_bits(x):
    """Bits without the sign: maxima of them are those of the magnitudes, a NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest_magnitude(pointer, size, BLOCK: tl.constexpr):
    """The largest magnitude of a row; NaN if there is one, 0 of nothing."""
    columns = tl.arange(0, BLOCK)
    whole = size // BLOCK * BLOCK
    largest = tl.zeros([BLOCK], tl.int32)
    for at in range(0, whole, BLOCK):
        largest = tl.maximum(largest, magnitude_bits(tl.load(pointer + at + columns)))
    rest = tl.load(pointer + whole + columns, mask=whole + columns < size, other=0.0)
    largest = tl.maximum(largest, magnitude_bits(rest))
    return tl.max(largest, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def at_least_tiny(x):
    """``max(x, TINY)``, NaN where x is."""
    return tl.where(x < TINY, TINY, x)


@triton.jit
def round_even(x):
    """The nearest integer, ties to even, as int32; for magnitudes below 2^22."""
    # Adding 1.5 * 2^23 leaves no bits behind the point. Nothing may be reassociated here.
    return ((x + 12582912.0) - 12582912.0).to(tl.int32)
