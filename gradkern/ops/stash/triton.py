"""Triton kernel of ``stash_``: one program a chunk: its blocks, then its squares out of the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gradkern.ops._step.triton_codecs import block_exponents, random_words
from gradkern.ops._table import Operands
from gradkern.ops._triton.kernels import CHUNK, find_row, load_f32, sum_chunk, tile_offsets, typed_pointer
from gradkern.ops._triton.launch import Variant, fold_warps, launch, warp_size

__all__ = ["VARIANTS", "stash_"]

_BLOCK = tl.constexpr(64)
_FLOAT16 = tl.constexpr(2)

# Codes take one byte, and a tile is two of those that this counts in.
_ITEM_BYTES = 2


@triton.jit
def _stash_tile(
    grad_ptr,
    codes_ptr,
    exponents_ptr,
    row,
    offset,
    size,
    key,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Put some rows of every group away, a row being a block."""
    offsets = tile_offsets(row, ROWS)
    x = load_f32(grad_ptr, offsets, size, DTYPE, MASKED)
    bits = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
    magnitude = (bits & 0x7FFFFFFF).to(tl.int32)
    infinity: tl.constexpr = 143 if DTYPE == _FLOAT16 else 255  # 2^16 is beyond fp16
    exponents = block_exponents(tl.max(magnitude, axis=2), 20, infinity)
    random = (random_words(key, offset.to(tl.uint32) + offsets.to(tl.uint32)) >> 12).to(tl.int32)
    base = tl.where(exponents < 15, 0, exponents - 15) << 3
    code = ((magnitude + random) >> 20) - base[:, :, None]
    code = tl.minimum(tl.maximum(code, 0), 127)
    code = (tl.where(bits >= 0x80000000, -code, code) & 0xFF).to(tl.uint8)
    blocks = tl.arange(0, 8)[:, None] * 8 + row + tl.arange(0, ROWS)[None, :]
    if MASKED:
        tl.store(codes_ptr + offsets, code, mask=offsets < size)
    else:
        tl.store(codes_ptr + offsets, code)
    tl.store(exponents_ptr + blocks, exponents.to(tl.uint8), mask=blocks * _BLOCK < size)


@triton.jit
def _stash_chunk(grad_ptr, codes_ptr, exponents_ptr, offset, size, key, DTYPE: tl.constexpr, MASKED: tl.constexpr):
    # Masked accesses are never wide: fewer elements at once leave their addresses and masks less room.
    ROWS: tl.constexpr = 1 if MASKED else 4
    for row in tl.range(0, 8, ROWS, loop_unroll_factor=1):
        _stash_tile(grad_ptr, codes_ptr, exponents_ptr, row, offset, size, key, ROWS, DTYPE, MASKED)


@triton.jit
def _stash_kernel(table_ptr, partials_ptr, rows, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    row = find_row(table_ptr, rows, chunk, 6)
    offset = (chunk - tl.load(table_ptr + row * 6 + 1)) * CHUNK
    size = tl.minimum(tl.load(table_ptr + row * 6) - offset, CHUNK).to(tl.int32)
    grad_ptr = typed_pointer(tl.load(table_ptr + row * 6 + 2), DTYPE, ALIGNED) + offset
    codes_ptr = tl.load(table_ptr + row * 6 + 3).to(tl.pointer_type(tl.uint8))
    if ALIGNED:
        codes_ptr = tl.multiple_of(codes_ptr, 16)
    codes_ptr += offset
    exponents_ptr = tl.load(table_ptr + row * 6 + 4).to(tl.pointer_type(tl.uint8)) + offset // _BLOCK
    key = tl.load(table_ptr + row * 6 + 5).to(tl.uint32)
    if size >= CHUNK:
        _stash_chunk(grad_ptr, codes_ptr, exponents_ptr, offset, size, key, DTYPE, False)
    else:
        _stash_chunk(grad_ptr, codes_ptr, exponents_ptr, offset, size, key, DTYPE, True)
    # Codes want 16 elements to a thread, whose squares would take more registers than leave room for other programs; so
    # the chunk, in the cache by now, is read once more.
    tl.store(partials_ptr + chunk, sum_chunk(table_ptr, rows, chunk, 6, 0, DTYPE, ALIGNED))


def stash_(operands: Operands, partials: torch.Tensor) -> None:
    """Launch one program per chunk; same contract as the reference."""
    cache = operands.cache
    if cache.chunks == 0:
        return
    launch(
        _stash_kernel,
        cache.chunks,
        cache.on_device(operands.device()),
        partials,
        len(operands["grads"]),
        DTYPE=cache.dtype_code("grads"),
        ALIGNED=cache.aligned(),
        num_warps=fold_warps(_ITEM_BYTES, warp_size()),
    )


VARIANTS = [
    Variant(
        _stash_kernel,
        {"table_ptr": "*i64", "partials_ptr": "*fp64", "rows": "i32"},
        {"DTYPE": code, "ALIGNED": True},
        item_bytes=_ITEM_BYTES,
        hot_bytes=4096 * (2 * item_bytes + 1),
    )
    for code, item_bytes in ((0, 4), (1, 2), (2, 2))
]
