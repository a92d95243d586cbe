"""Triton kernel of ``sumsq``: one program a chunk."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gradkern.ops._table import Operands
from gradkern.ops._triton.kernels import CHUNK, find_row, fold_chunk, load_f32, typed_pointer

__all__ = ["sumsq"]


@triton.jit
def _sumsq_kernel(table_ptr, partials_ptr, rows, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    row = find_row(table_ptr, rows, chunk, 3)
    offset = (chunk - tl.load(table_ptr + row * 3 + 1)) * CHUNK
    size = tl.load(table_ptr + row * 3) - offset
    pointer = typed_pointer(tl.load(table_ptr + row * 3 + 2), DTYPE, ALIGNED) + offset
    offsets = tl.arange(0, CHUNK)
    if size >= CHUNK:
        total = fold_chunk(load_f32(pointer, offsets, size, DTYPE, False))
    else:
        total = fold_chunk(load_f32(pointer, offsets, size, DTYPE, True))
    tl.store(partials_ptr + chunk + tl.arange(0, 1), total)


def sumsq(operands: Operands, partials: torch.Tensor) -> None:
    """Launch one program per chunk; same contract as the reference."""
    operands.table()
    cache = operands.cache
    if cache.chunks == 0:
        return
    table = cache.on_device(partials.device)
    _sumsq_kernel[(cache.chunks,)](
        table,
        partials,
        len(operands["tensors"]),
        DTYPE=cache.dtype_code("tensors"),
        ALIGNED=cache.aligned(),
        enable_fp_fusion=False,
        num_warps=4,
    )
