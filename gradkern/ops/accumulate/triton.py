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
    square,
    store_f32,
    tile_offsets,
    typed_pointer,
)
from gradkern.ops._triton.launch import FIXED_THREADS, Variant, launch, warp_size

__all__ = ["VARIANTS", "accumulate_"]


@triton.jit
def _accumulate_tile(
    main_ptr,
    grad_ptr,
    row,
    size,
    DTYPE: tl.constexpr,
    OVERWRITE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold four rows of every group; returns the squares of the result."""
    offsets = tile_offsets(row, 4)
    x = load_f32(grad_ptr, offsets, size, DTYPE, MASKED)
    if not OVERWRITE:
        x = load_f32(main_ptr, offsets, size, FLOAT32, MASKED) + x
    store_f32(main_ptr, offsets, x, size, FLOAT32, MASKED)
    return square(x)


@triton.jit
def _accumulate_chunk(main_ptr, grad_ptr, size, DTYPE: tl.constexpr, OVERWRITE: tl.constexpr, MASKED: tl.constexpr):
    # A loop, because both halves of a chunk at once would take more registers than leave room for other programs. The
    # first addition is to zero and rounds nothing.
    sums = tl.zeros([8, 4, 64], tl.float64)
    for row in tl.range(0, 8, 4, loop_unroll_factor=1):
        sums += _accumulate_tile(main_ptr, grad_ptr, row, size, DTYPE, OVERWRITE, MASKED)
    return tl.sum(tl.reshape(sums, [8, 2, 2, 64]), axis=1)


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
    size = tl.minimum(tl.load(table_ptr + row * 4) - offset, CHUNK).to(tl.int32)
    main_ptr = typed_pointer(tl.load(table_ptr + row * 4 + 2), FLOAT32, ALIGNED) + offset
    grad_ptr = typed_pointer(tl.load(table_ptr + row * 4 + 3), DTYPE, ALIGNED) + offset
    if size >= CHUNK:
        sums = _accumulate_chunk(main_ptr, grad_ptr, size, DTYPE, OVERWRITE, False)
    else:
        sums = _accumulate_chunk(main_ptr, grad_ptr, size, DTYPE, OVERWRITE, True)
    if WITH_PARTIALS:
        tl.store(partials_ptr + chunk, fold_sums(sums))


def accumulate_(operands: Operands, partials: torch.Tensor | None, *, overwrite: bool) -> None:
    """Launch one program per chunk; same contract as the reference."""
    cache = operands.cache
    if cache.chunks == 0:
        return
    table = cache.on_device(operands.device())
    grads = operands["grads"]
    launch(
        _accumulate_kernel,
        cache.chunks,
        table,
        table if partials is None else partials,
        len(grads),
        DTYPE=cache.dtype_code("grads"),
        OVERWRITE=overwrite,
        WITH_PARTIALS=partials is not None,
        ALIGNED=cache.aligned(),
        num_warps=FIXED_THREADS // warp_size(),
    )


VARIANTS = [
    Variant(
        _accumulate_kernel,
        {"table_ptr": "*i64", "partials_ptr": "*fp64", "rows": "i32"},
        {"DTYPE": code, "OVERWRITE": overwrite, "WITH_PARTIALS": True, "ALIGNED": True},
        item_bytes=0,
        hot_bytes=4096 * (item_bytes + (4 if overwrite else 8)),
    )
    for code, item_bytes in ((0, 4), (1, 2), (2, 2))
    for overwrite in (False, True)
]
