"""Triton kernel of ``abs_norm``: one program a chunk."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gradkern.ops._table import Operands
from gradkern.ops._triton.kernels import (
    CHUNK,
    find_row,
    fold_sums,
    load_f32,
    tile_offsets,
    typed_pointer,
)
from gradkern.ops._triton.launch import Variant, fold_warps, launch, warp_size

__all__ = ["VARIANTS", "abs_norm"]


@triton.jit
def _magnitudes(pointer, low, size, DTYPE: tl.constexpr, MAXIMUM: tl.constexpr, MASKED: tl.constexpr):
    """Magnitudes of two rows of every group: in fp64 for sums; as bits for maxima, where a NaN is above infinity."""
    x = load_f32(pointer, tile_offsets(low, 2), size, DTYPE, MASKED)
    if MAXIMUM:
        y = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        y = tl.abs(x).to(tl.float64)
    return y


@triton.jit
def _both(x, y, MAXIMUM: tl.constexpr):
    if MAXIMUM:
        z = tl.maximum(x, y)
    else:
        z = x + y
    return z


@triton.jit
def _fold_rows(pointer, size, DTYPE: tl.constexpr, MAXIMUM: tl.constexpr, MASKED: tl.constexpr):
    x0 = _magnitudes(pointer, 0, size, DTYPE, MAXIMUM, MASKED)
    x0 = _both(x0, _magnitudes(pointer, 4, size, DTYPE, MAXIMUM, MASKED), MAXIMUM)
    x2 = _magnitudes(pointer, 2, size, DTYPE, MAXIMUM, MASKED)
    x2 = _both(x2, _magnitudes(pointer, 6, size, DTYPE, MAXIMUM, MASKED), MAXIMUM)
    return _both(x0, x2, MAXIMUM)


@triton.jit
def _abs_norm_kernel(
    table_ptr,
    partials_ptr,
    rows,
    DTYPE: tl.constexpr,
    MAXIMUM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    row = find_row(table_ptr, rows, chunk, 3)
    offset = (chunk - tl.load(table_ptr + row * 3 + 1)) * CHUNK
    size = tl.load(table_ptr + row * 3) - offset
    pointer = typed_pointer(tl.load(table_ptr + row * 3 + 2), DTYPE, ALIGNED) + offset
    if size >= CHUNK:
        folded = _fold_rows(pointer, size, DTYPE, MAXIMUM, False)
    else:
        folded = _fold_rows(pointer, size, DTYPE, MAXIMUM, True)
    if MAXIMUM:
        tl.store(partials_ptr + chunk, tl.max(folded).to(tl.float32, bitcast=True).to(tl.float64))
    else:
        tl.store(partials_ptr + chunk, fold_sums(folded))


def abs_norm(operands: Operands, partials: torch.Tensor, *, maximum: bool) -> None:
    """Launch one program per chunk; same contract as the reference."""
    cache = operands.cache
    if cache.chunks == 0:
        return
    tensors = operands["tensors"]
    launch(
        _abs_norm_kernel,
        cache.chunks,
        cache.on_device(partials.device),
        partials,
        len(tensors),
        DTYPE=cache.dtype_code("tensors"),
        MAXIMUM=maximum,
        ALIGNED=cache.aligned(),
        num_warps=fold_warps(tensors[0].itemsize, warp_size()),
    )


VARIANTS = [
    Variant(
        _abs_norm_kernel,
        {"table_ptr": "*i64", "partials_ptr": "*fp64", "rows": "i32"},
        {"DTYPE": code, "MAXIMUM": maximum, "ALIGNED": True},
        item_bytes=item_bytes,
        hot_bytes=4096 * item_bytes,
    )
    for code, item_bytes in ((0, 4), (1, 2), (2, 2))
    for maximum in (False, True)
]
