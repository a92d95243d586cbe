"""Triton kernel of ``sumsq``: one program a chunk."""

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
    row_offsets,
    square,
    store_first,
    typed_pointer,
)
from gradkern.ops._triton.launch import Variant, fold_warps, warp_size

__all__ = ["VARIANTS", "sumsq"]


@triton.jit
def _row_pair(pointer, low: tl.constexpr, size, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    """Squares of rows ``low`` and ``low + 4``, added: the first level of the fold."""
    x = load_f32(pointer, row_offsets(low), size, DTYPE, MASKED)
    y = load_f32(pointer, row_offsets(low + 4), size, DTYPE, MASKED)
    return square(x) + square(y)


@triton.jit
def _fold_rows(pointer, size, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    even = _row_pair(pointer, 0, size, DTYPE, MASKED) + _row_pair(pointer, 2, size, DTYPE, MASKED)
    odd = _row_pair(pointer, 1, size, DTYPE, MASKED) + _row_pair(pointer, 3, size, DTYPE, MASKED)
    return even + odd


@triton.jit
def _sumsq_kernel(
    table_ptr,
    partials_ptr,
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
    if size >= CHUNK:
        sums = _fold_rows(pointer, size, DTYPE, False)
    else:
        sums = _fold_rows(pointer, size, DTYPE, True)
    store_first(partials_ptr + chunk, fold_sums(sums))


def sumsq(operands: Operands, partials: torch.Tensor, *, column: str = "tensors") -> None:
    """Launch one program per chunk; same contract as the reference."""
    cache = operands.cache
    if cache.chunks == 0:
        return
    table = cache.on_device(partials.device)
    tensors = operands[column]
    _sumsq_kernel[(cache.chunks,)](
        table,
        partials,
        len(tensors),
        COLUMNS=table.shape[1],
        OPERAND=list(operands.columns).index(column),
        DTYPE=cache.dtype_code(column),
        ALIGNED=cache.aligned(),
        enable_fp_fusion=False,
        num_warps=fold_warps(tensors[0].itemsize, warp_size()),
    )


VARIANTS = [
    Variant(
        _sumsq_kernel,
        {"table_ptr": "*i64", "partials_ptr": "*fp64", "rows": "i32"},
        {"COLUMNS": 3, "OPERAND": 0, "DTYPE": code, "ALIGNED": True},
        item_bytes=item_bytes,
        hot_bytes=4096 * item_bytes,
    )
    for code, item_bytes in ((0, 4), (1, 2), (2, 2))
]
