"""Triton kernel of ``unstash_``: one program a chunk."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gradkern.ops._step.triton_codecs import load_state
from gradkern.ops._table import Operands
from gradkern.ops._triton.kernels import CHUNK, find_row, store_f32, typed_pointer
from gradkern.ops._triton.launch import FIXED_THREADS, Variant, launch, warp_size

__all__ = ["VARIANTS", "unstash_"]

_BLOCK8 = tl.constexpr(8)
_BLOCK = tl.constexpr(64)


@triton.jit
def _unstash_chunk(
    grad_ptr, codes_ptr, exponents_ptr, multiplier, size, DTYPE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    for start in tl.range(0, CHUNK, BLOCK, loop_unroll_factor=1):
        offsets = start + tl.arange(0, BLOCK)
        x = load_state(codes_ptr, exponents_ptr, start, offsets, size, _BLOCK8, True, BLOCK, MASKED)
        store_f32(grad_ptr, offsets, x * multiplier, size, DTYPE, MASKED)


@triton.jit
def _unstash_kernel(table_ptr, multiplier_ptr, rows, DTYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
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
        _unstash_chunk(grad_ptr, codes_ptr, exponents_ptr, multiplier, size, DTYPE, BLOCK, False)
    else:
        _unstash_chunk(grad_ptr, codes_ptr, exponents_ptr, multiplier, size, DTYPE, BLOCK, True)


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
        BLOCK=4096,
        ALIGNED=cache.aligned(),
        num_warps=FIXED_THREADS // warp_size(),
    )


VARIANTS = [
    Variant(
        _unstash_kernel,
        {"table_ptr": "*i64", "multiplier_ptr": "*fp32", "rows": "i32"},
        {"DTYPE": code, "BLOCK": 4096, "ALIGNED": True},
        item_bytes=0,
        hot_bytes=4096 * (item_bytes + 1),
    )
    for code, item_bytes in ((0, 4), (1, 2), (2, 2))
]
