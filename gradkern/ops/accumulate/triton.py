"""Triton kernel of ``accumulate_``: one program a chunk, the norm from the same registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gradkern.ops._table import Operands
from gradkern.ops._triton.kernels import CHUNK, FLOAT32, find_row, fold_chunk, load_f32, store_f32, typed_pointer

__all__ = ["accumulate_"]


@triton.jit
def _accumulate_chunk(main_ptr, grad_ptr, size, DTYPE: tl.constexpr, OVERWRITE: tl.constexpr, MASKED: tl.constexpr):
    offsets = tl.arange(0, CHUNK)
    x = load_f32(grad_ptr, offsets, size, DTYPE, MASKED)
    if not OVERWRITE:
        x = load_f32(main_ptr, offsets, size, FLOAT32, MASKED) + x
    store_f32(main_ptr, offsets, x, size, FLOAT32, MASKED)
    return x


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
        x = _accumulate_chunk(main_ptr, grad_ptr, size, DTYPE, OVERWRITE, False)
    else:
        x = _accumulate_chunk(main_ptr, grad_ptr, size, DTYPE, OVERWRITE, True)
    if WITH_PARTIALS:
        tl.store(partials_ptr + chunk + tl.arange(0, 1), fold_chunk(x))


def accumulate_(operands: Operands, partials: torch.Tensor | None, *, overwrite: bool) -> None:
    """Launch one program per chunk; same contract as the reference."""
    operands.table()
    cache = operands.cache
    if cache.chunks == 0:
        return
    table = cache.on_device(operands.device())
    _accumulate_kernel[(cache.chunks,)](
        table,
        table if partials is None else partials,
        len(operands["main_grads"]),
        DTYPE=cache.dtype_code("grads"),
        OVERWRITE=overwrite,
        WITH_PARTIALS=partials is not None,
        ALIGNED=cache.aligned(),
        enable_fp_fusion=False,
        num_warps=4,
    )
