"""Triton kernel of ``sumsq``: one program a chunk."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gradkern.ops._table import Operands
from gradkern.ops._triton.kernels import sum_chunk
from gradkern.ops._triton.launch import Variant, fold_warps, launch, warp_size

__all__ = ["VARIANTS", "sumsq"]


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
    tl.store(partials_ptr + chunk, sum_chunk(table_ptr, rows, chunk, COLUMNS, OPERAND, DTYPE, ALIGNED))


def sumsq(operands: Operands, partials: torch.Tensor, *, column: str = "tensors") -> None:
    """Launch one program per chunk; same contract as the reference."""
    cache = operands.cache
    if cache.chunks == 0:
        return
    table = cache.on_device(partials.device)
    tensors = operands[column]
    launch(
        _sumsq_kernel,
        cache.chunks,
        table,
        partials,
        len(tensors),
        COLUMNS=table.shape[1],
        OPERAND=list(operands.columns).index(column),
        DTYPE=cache.dtype_code(column),
        ALIGNED=cache.aligned(),
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
