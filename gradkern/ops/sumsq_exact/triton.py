"""Triton kernels of ``sumsq_exact``: one program a chunk, integers only; then one program for the carries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gradkern.ops._table import Operands
from gradkern.ops._triton.kernels import CHUNK, find_row, load_f32, typed_pointer
from gradkern.ops._triton.launch import Variant, fold_warps, launch, warp_size

__all__ = ["VARIANTS", "sumsq_exact"]

_LIMBS = tl.constexpr(22)
_WORDS = tl.constexpr(32)  # limbs, infinities and NaNs, padded to a power of two
_ROWS = tl.constexpr(64)  # rows of words that programs spread their atomic additions over
_WINDOW = tl.constexpr(24)  # exponents that one pair of sums covers: 2 * 24 bits below a square of 48
_PART = tl.constexpr(1024)  # elements in registers at once: all 4,096 as integers of 64 bits would spill
# Four elements to a thread, whatever they are: eight of them as integers of 64 bits leave too few threads resident.
_ITEM_BYTES = 4
_INF = tl.constexpr(0x7F800000)


@triton.jit
def _magnitudes(pointer, start, size, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    """Bits of the elements without their signs; integers may be added in any order, so rows do not matter here."""
    offsets = start + tl.arange(0, _PART)
    return load_f32(pointer, offsets, size, DTYPE, MASKED).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _window_sums(bits, top):
    """Sums of the squares of the 24 exponents up to ``top``, in units of 2^(2 top - 300) and of 2^-48 times that."""
    depth = top - tl.maximum(bits >> 23, 1)
    inside = (depth >= 0) & (depth < _WINDOW) & (bits < _INF)
    significand = tl.where(bits >= 0x800000, (bits & 0x7FFFFF) | 0x800000, bits)
    square = tl.where(inside, significand, 0).to(tl.int64)
    square = square * square
    shift = tl.where(inside, 2 * depth, 0).to(tl.int64)
    return tl.sum(square >> shift), tl.sum((square << (48 - shift)) & 0xFFFFFFFFFFFF)


@triton.jit
def _place(limbs, words, value, position):
    """Add ``value * 2**(position - 352)`` to the limbs; ``value`` below 2^62."""
    limb = position >> 5
    shift = (position & 31).to(tl.int64)
    low = (value & 0xFFFFFFFF) << shift
    high = (value >> 32) << shift
    limbs += tl.where(words == limb, low & 0xFFFFFFFF, 0)
    limbs += tl.where(words == limb + 1, (low >> 32) + (high & 0xFFFFFFFF), 0)
    return limbs + tl.where(words == limb + 2, high >> 32, 0)


@triton.jit
def _sum_chunk(pointer, size, words, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    limbs = tl.zeros([_WORDS], tl.int64)
    for start in range(0, CHUNK, _PART):
        bits = _magnitudes(pointer, start, size, DTYPE, MASKED)
        exponent = tl.maximum(bits >> 23, 1)
        counts = (bits > 0) & (bits < _INF)
        top = tl.max(tl.where(counts, exponent, 0))
        bottom = tl.min(tl.where(counts, exponent, 255))
        limbs += tl.where(words == _LIMBS, tl.sum((bits == _INF).to(tl.int32)), 0)
        limbs += tl.where(words == _LIMBS + 1, tl.sum((bits > _INF).to(tl.int32)), 0)
        while top >= bottom:
            high, low = _window_sums(bits, top)
            limbs = _place(limbs, words, high, 2 * top + 52)  # 352 - 300
            limbs = _place(limbs, words, low, 2 * top + 4)
            top -= _WINDOW
    return limbs


@triton.jit
def _sumsq_exact_kernel(
    table_ptr,
    rows_ptr,
    rows,
    COLUMNS: tl.constexpr,
    OPERAND: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    row = find_row(table_ptr, rows, chunk, COLUMNS)
    offset = (chunk - tl.load(table_ptr + row * COLUMNS + 1)) * CHUNK
    size = tl.load(table_ptr + row * COLUMNS) - offset
    pointer = typed_pointer(tl.load(table_ptr + row * COLUMNS + 2 + OPERAND), DTYPE, ALIGNED) + offset
    words = tl.arange(0, _WORDS)
    if size >= CHUNK:
        limbs = _sum_chunk(pointer, size, words, DTYPE, False)
    else:
        limbs = _sum_chunk(pointer, size, words, DTYPE, True)
    # Integers: the order in which programs add does not matter.
    tl.atomic_add(rows_ptr + (chunk % _ROWS) * _WORDS + words, limbs, mask=limbs != 0, sem="relaxed")


@triton.jit
def _carry_kernel(rows_ptr, limbs_ptr):
    words = tl.arange(0, _WORDS)
    sums = tl.zeros([_WORDS], tl.int64)
    for row in range(_ROWS):
        sums += tl.load(rows_ptr + row * _WORDS + words)
    limbs = tl.where(words >= _LIMBS, sums, 0)
    carry = tl.zeros([], tl.int64)
    for k in range(_LIMBS):
        word = tl.sum(tl.where(words == k, sums, 0)) + carry
        limbs += tl.where(words == k, word & 0xFFFFFFFF, 0)
        carry = word >> 32
    tl.store(limbs_ptr + words, limbs, mask=words < _LIMBS + 2)


def sumsq_exact(operands: Operands, limbs: torch.Tensor, *, column: str = "tensors") -> None:
    """Launch one program per chunk, then one for the carries; same contract as the reference."""
    cache = operands.cache
    rows = torch.zeros(_ROWS.value, _WORDS.value, dtype=torch.int64, device=limbs.device)
    if cache.chunks > 0:
        table = cache.on_device(limbs.device)
        launch(
            _sumsq_exact_kernel,
            cache.chunks,
            table,
            rows,
            len(operands[column]),
            COLUMNS=table.shape[1],
            OPERAND=list(operands.columns).index(column),
            DTYPE=cache.dtype_code(column),
            ALIGNED=cache.aligned(),
            num_warps=fold_warps(_ITEM_BYTES, warp_size()),
        )
    launch(_carry_kernel, 1, rows, limbs, num_warps=1)


VARIANTS = [
    Variant(
        _sumsq_exact_kernel,
        {"table_ptr": "*i64", "rows_ptr": "*i64", "rows": "i32"},
        {"COLUMNS": 3, "OPERAND": 0, "DTYPE": code, "ALIGNED": True},
        item_bytes=_ITEM_BYTES,
        hot_bytes=4096 * item_bytes,
        hot_bits=128 * item_bytes // _ITEM_BYTES,
    )
    for code, item_bytes in ((0, 4), (1, 2), (2, 2))
]
VARIANTS.append(Variant(_carry_kernel, {"rows_ptr": "*i64", "limbs_ptr": "*i64"}, {}, item_bytes=0, hot_bytes=0))
