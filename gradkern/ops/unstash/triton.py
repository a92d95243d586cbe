"""Triton kernel of ``unstash_``: one program a chunk."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gradkern.ops._table import Operands
from gradkern.ops._triton.kernels import CHUNK, find_row, store_f32, tile_offsets, typed_pointer
from gradkern.ops._triton.launch import Variant, fold_warps, launch, warp_size

__all__ = ["VARIANTS", "unstash_"]

_BLOCK = tl.constexpr(64)

# Codes take one byte, and a tile is two of those that this counts in.
_ITEM_BYTES = 2


@triton.jit
def _unstash_chunk(grad_ptr, codes_ptr, exponents_ptr, multiplier, size, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    for row in tl.range(0, 8, 4, loop_unroll_factor=1):
        offsets = tile_offsets(row, 4)
        if MASKED:
            code = tl.load(codes_ptr + offsets, mask=offsets < size, other=0).to(tl.int32)
        else:
            code = tl.load(codes_ptr + offsets).to(tl.int32)
        blocks = tl.arange(0, 8)[:, None] * 8 + row + tl.arange(0, 4)[None, :]
        exponents = tl.load(exponents_ptr + blocks, mask=blocks * _BLOCK < size, other=0).to(tl.int32)
        base = tl.where(exponents < 15, 0, exponents - 15) << 3
        magnitude = tl.where(code >= 128, 256 - code, code)
        bits = tl.where(magnitude == 0, 0, (magnitude + base[:, :, None]) << 20) | ((code & 0x80) << 24)
        store_f32(grad_ptr, offsets, bits.to(tl.float32, bitcast=True) * multiplier, size, DTYPE, MASKED)


@triton.jit
def _unstash_kernel(table_ptr, multiplier_ptr, rows, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    row = find_row(table_ptr, rows, chunk, 5)
    offset = (chunk - tl.load(table_ptr + row * 5 + 1)) * CHUNK
    size = tl.minimum(tl.load(table_ptr + row * 5) - offset, CHUNK).to(tl.int32)
    grad_ptr = typed_pointer(tl.load(table_ptr + row * 5 + 2), DTYPE, ALIGNED) + offset
    codes_ptr = tl.load(table_ptr + row * 5 + 3).to(tl.pointer_type(tl.uint8))
    if ALIGNED:
        codes_ptr = tl.multiple_of(codes_ptr, 16)
    codes_ptr += offset
    exponents_ptr = tl.load(table_ptr + row * 5 + 4).to(tl.pointer_type(tl.uint8)) + offset // _BLOCK
    multiplier = tl.load(multiplier_ptr)
    if size >= CHUNK:
        _unstash_chunk(grad_ptr, codes_ptr, exponents_ptr, multiplier, size, DTYPE, False)
    else:
        _unstash_chunk(grad_ptr, codes_ptr, exponents_ptr, multiplier, size, DTYPE, True)


def unstash_(operands: Operands, multiplier: torch.Tensor) -> None:
    """Launch one program per chunk; same contract as the reference."""
    cache = operands.cache
    if cache.chunks == 0:
        return
    launch(
        _unstash_kernel,
        cache.chunks,
        cache.on_device(operands.device()),
        multiplier,
        len(operands["grads"]),
        DTYPE=cache.dtype_code("grads"),
        ALIGNED=cache.aligned(),
        num_warps=fold_warps(_ITEM_BYTES, warp_size()),
    )


VARIANTS = [
    Variant(
        _unstash_kernel,
        {"table_ptr": "*i64", "multiplier_ptr": "*fp32", "rows": "i32"},
        {"DTYPE": code, "ALIGNED": True},
        item_bytes=_ITEM_BYTES,
        hot_bytes=4096 * (item_bytes + 1),
    )
    for code, item_bytes in ((0, 4), (1, 2), (2, 2))
]
