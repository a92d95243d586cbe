"""Device functions shared by every kernel: codecs, the fold tree, the search for a chunk's tensor.

The arithmetic contract: no fused multiply-add (kernels are compiled with ``enable_fp_fusion=False``), division and root
rounded to nearest, no floating ``tl.sum`` of more than two values (the order is the compiler's), minima and maxima that
propagate NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(4096)

# Dtype codes, as in gradkern.ops._chunks.DTYPE_CODES.
FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)


@triton.jit
def typed_pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to elements at an address read from the table; all but fp32 and fp16 are handled as 16 bits."""
    if DTYPE == FLOAT32:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif DTYPE == FLOAT16:
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        pointer = address.to(tl.pointer_type(tl.int16))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_f32(pointer, offsets, size, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    """Elements widened to fp32, exactly; zeros beyond ``size`` when masked."""
    x = tl.load(pointer + offsets, mask=offsets < size, other=0) if MASKED else tl.load(pointer + offsets)
    if DTYPE == BFLOAT16:
        y = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def store_f32(pointer, offsets, x, size, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    """Store fp32 values rounded to nearest even; bf16 on the bits, because the interpreter's cast truncates."""
    if DTYPE == BFLOAT16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.int16, bitcast=True)
    elif DTYPE == FLOAT16:
        y = x.to(tl.float16)
    else:
        y = x
    if MASKED:
        tl.store(pointer + offsets, y, mask=offsets < size)
    else:
        tl.store(pointer + offsets, y)


@triton.jit
def tile_offsets(row, ROWS: tl.constexpr):
    """Offsets of some rows, from ``row`` on, of every group of a chunk, shape (8, ROWS, 64).

    More rows to a tile are fewer sums to a thread, which leave room for more threads on a processor.
    """
    group = tl.arange(0, 8)[:, None, None] * 512
    return group + (row + tl.arange(0, ROWS)[None, :, None]) * 64 + tl.arange(0, 64)[None, None, :]


@triton.jit
def square(x):
    """Squares in fp64, exact for values that fp32 holds."""
    wide = x.to(tl.float64)
    return wide * wide


@triton.jit
def _tile_pair(pointer, low, size, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    """Squares of two rows and of those 4 behind them, added: the first level of the fold."""
    x = load_f32(pointer, tile_offsets(low, 2), size, DTYPE, MASKED)
    y = load_f32(pointer, tile_offsets(low + 4, 2), size, DTYPE, MASKED)
    return square(x) + square(y)


@triton.jit
def fold_sums(y):
    """Sums of shape (8, 2, 64) folded to one: the two rows, then the 512 sums in halves.

    Every ``tl.sum`` adds two values, ``x + y`` and ``y + x`` being the same bits. All axes are split at once: folding
    a shape of one axis in halves would send all values through shared memory each time.
    """
    y = tl.reshape(tl.sum(y, axis=1), [2, 2, 2, 2, 2, 2, 2, 2, 2])
    y = tl.sum(tl.sum(tl.sum(y, axis=0), axis=0), axis=0)
    y = tl.sum(tl.sum(tl.sum(y, axis=0), axis=0), axis=0)
    return tl.sum(tl.sum(tl.sum(y, axis=0), axis=0), axis=0)


@triton.jit
def find_row(table_ptr, rows, chunk, COLUMNS: tl.constexpr):
    """Row of the tensor that ``chunk`` lies in: the last whose first chunk is not beyond it."""
    low = tl.zeros([], tl.int64)
    high = rows.to(tl.int64) - 1
    while low < high:
        middle = (low + high + 1) // 2
        first = tl.load(table_ptr + middle * COLUMNS + 1)
        low = tl.where(first <= chunk, middle, low)
        high = tl.where(first <= chunk, high, middle - 1)
    return low


@triton.jit
def sum_chunk(
    table_ptr, rows, chunk, COLUMNS: tl.constexpr, OPERAND: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
):
    """Sum of squares of a chunk of one operand of any table."""
    row = find_row(table_ptr, rows, chunk, COLUMNS)
    offset = (chunk - tl.load(table_ptr + row * COLUMNS + 1)) * CHUNK
    size = tl.minimum(tl.load(table_ptr + row * COLUMNS) - offset, CHUNK).to(tl.int32)
    pointer = typed_pointer(tl.load(table_ptr + row * COLUMNS + 2 + OPERAND), DTYPE, ALIGNED) + offset
    if size >= CHUNK:
        sums = _tile_pair(pointer, 0, size, DTYPE, False) + _tile_pair(pointer, 2, size, DTYPE, False)
    else:
        sums = tl.zeros([8, 2, 64], tl.float64)
        for low in range(0, 4, 2):  # adds to zero first, which rounds nothing
            sums += _tile_pair(pointer, low, size, DTYPE, True)
    return fold_sums(sums)


@triton.jit
def power(base, n):
    """``base**n`` in fp64 by binary exponentiation from the lowest bit; n below 2^24, as counted in fp32."""
    result = base * 0.0 + 1.0
    for _ in range(24):
        result = tl.where((n & 1) != 0, result * base, result)
        base = base * base
        n = n >> 1
    return result
