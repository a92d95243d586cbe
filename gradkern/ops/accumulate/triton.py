"""Triton kernel of ``accumulate_``: one program a chunk, the norm from the same registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gradkern.ops._table import Operands
from gradkern.ops._triton.kernels import (
    CHUNK,
    FLOAT32,
    find_row,
    fold_sums,
    load_f32,
    row_offsets,
    square,
    store_f32,
    store_first,
    typed_pointer,
)
from gradkern.ops._triton.launch import Variant, fold_warps, warp_size

__all__ = ["VARIANTS", "accumulate_"]


@triton.jit
def _accumulate_row(
    main_ptr,
    grad_ptr,
    row: tl.constexpr,
    size,
    DTYPE: tl.constexpr,
    OVERWRITE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold one row of every group; returns the squares of the result."""
    offsets = row_offsets(row)
    x = load_f32(grad_ptr, offsets, size, DTYPE, MASKED)
    if not OVERWRITE:
        x = load_f32(main_ptr, offsets, size, FLOAT32, MASKED) + x
    store_f32(main_ptr, offsets, x, size, FLOAT32, MASKED)
    return square(x)


@triton.jit
def _accumulate_chunk(main_ptr, grad_ptr, size, DTYPE: tl.constexpr, OVERWRITE: tl.constexpr, MASKED: tl.constexpr):
    s0 = _accumulate_row(main_ptr, grad_ptr, 0, size, DTYPE, OVERWRITE, MASKED)
    s1 = _accumulate_row(main_ptr, grad_ptr, 1, size, DTYPE, OVERWRITE, MASKED)
    s2 = _accumulate_row(main_ptr, grad_ptr, 2, size, DTYPE, OVERWRITE, MASKED)
    s3 = _accumulate_row(main_ptr, grad_ptr, 3, size, DTYPE, OVERWRITE, MASKED)
    s0 += _accumulate_row(main_ptr, grad_ptr, 4, size, DTYPE, OVERWRITE, MASKED)
    s1 += _accumulate_row(main_ptr, grad_ptr, 5, size, DTYPE, OVERWRITE, MASKED)
    s2 += _accumulate_row(main_ptr, grad_ptr, 6, size, DTYPE, OVERWRITE, MASKED)
    s3 += _accumulate_row(main_ptr, grad_ptr, 7, size, DTYPE, OVERWRITE, MASKED)
    return (s0 + s2) + (s1 + s3)


@triton.jit
def _accumulate_kernel(
    table_ptr,
    partials_ptr,
    rows,
    DTYPE: tl.constexpr,
    OVERWRITE: tl.constexpr,
    WITH_PARTIALS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    row = find_row(table_ptr, rows, chunk, 4)
    offset = (chunk - tl.load(table_ptr + row * 4 + 1)) * CHUNK
    size = tl.load(table_ptr + row * 4) - offset
    main_ptr = typed_pointer(tl.load(table_ptr + row * 4 + 2), FLOAT32, ALIGNED) + offset
    grad_ptr = typed_pointer(tl.load(table_ptr + row * 4 + 3), DTYPE, ALIGNED) + offset
    if size >= CHUNK:
        sums = _accumulate_chunk(main_ptr, grad_ptr, size, DTYPE, OVERWRITE, False)
    else:
        sums = _accumulate_chunk(main_ptr, grad_ptr, size, DTYPE, OVERWRITE, True)
    if WITH_PARTIALS:
        store_first(partials_ptr + chunk, fold_sums(sums))


def accumulate_(operands: Operands, partials: torch.Tensor | None, *, overwrite: bool) -> None:
    """Launch one program per chunk; same contract as the reference."""
    cache = operands.cache
    if cache.chunks == 0:
        return
    table = cache.on_device(operands.device())
    grads = operands["grads"]
    _accumulate_kernel[(cache.chunks,)](
        table,
        table if partials is None else partials,
        len(grads),
        DTYPE=cache.dtype_code("grads"),
        OVERWRITE=overwrite,
        WITH_PARTIALS=partials is not None,
        ALIGNED=cache.aligned(),
        enable_fp_fusion=False,
        num_warps=fold_warps(grads[0].itemsize, warp_size()),
    )


VARIANTS = [
    Variant(
        _accumulate_kernel,
        {"table_ptr": "*i64", "partials_ptr": "*fp64", "rows": "i32"},
        {"DTYPE": code, "OVERWRITE": overwrite, "WITH_PARTIALS": True, "ALIGNED": True},
        item_bytes=item_bytes,
        hot_bytes=4096 * (item_bytes + (4 if overwrite else 8)),
    )
    for code, item_bytes in ((0, 4), (1, 2), (2, 2))
    for overwrite in (False, True)
]
