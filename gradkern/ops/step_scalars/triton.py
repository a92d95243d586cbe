"""Triton kernel of ``step_scalars_``: sums of squares, their exact sum, scalars and step counters in one launch.

A program sums the squares of one chunk, or reads up to 128 partials that are known, and adds its limbs by integer
atomics, which commute: no order of programs changes a bit. The program that arrives last takes the limbs out, finishes
the scalars, counts the step, and leaves the workspace zeroed for the next launch on its stream.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gradkern.ops._table import Operands
from gradkern.ops._triton.kernels import find_row, sum_chunk
from gradkern.ops._triton.launch import Variant, fold_warps, launch, warp_size
from gradkern.ops.step_scalars.reference import Unsummed

__all__ = ["VARIANTS", "step_scalars_"]

_LIMBS = tl.constexpr(22)
_NANS = tl.constexpr(22)  # the words behind the limbs count what is not finite
_LARGE = tl.constexpr(23)
_WORDS = tl.constexpr(32)  # padded to a power of two
_COPIES = tl.constexpr(16)  # of the limbs, so that programs seldom meet at one address
_ARRIVED = tl.constexpr(512)  # position of the counter of programs, behind the copies
_BLOCK = tl.constexpr(16)
_CELLS = tl.constexpr(64)
_PIECE = tl.constexpr(128)  # known partials that one program takes
_WORKSPACE = 528
_BYTES = (4, 2, 2)  # of the dtype codes
_COUNTS = ["rows", "chunks", "blocks", "step_blocks", "max_norm_bits"]


@triton.jit
def _limbs_of(bits):
    """Limbs of a block of non-negative fp64 values given as their bits, added; shape (32,)."""
    words = tl.arange(0, _WORDS)[None, :]
    exponent = (bits >> 52) & 0x7FF
    fraction = bits & 0xFFFFFFFFFFFFF
    position = exponent - 723  # 1075 - 352: the lowest bit of 2^-300 stands at 0
    nan = ((exponent == 0x7FF) & (fraction != 0)).to(tl.int64)[:, None]
    large = (position > 607).to(tl.int64)[:, None]  # 607: the largest that three of 22 limbs hold
    counted = (position >= 0) & (position <= 607)
    mantissa = tl.where(counted, fraction | 0x10000000000000, 0)
    position = tl.where(counted, position, 0)
    limb = (position >> 5)[:, None]
    shift = position & 31
    low = (mantissa & 0xFFFFFFFF) << shift
    high = (mantissa >> 32) << shift
    spread = tl.where(limb == words, (low & 0xFFFFFFFF)[:, None], 0)
    spread += tl.where(limb + 1 == words, ((low >> 32) + (high & 0xFFFFFFFF))[:, None], 0)
    spread += tl.where(limb + 2 == words, (high >> 32)[:, None], 0)
    spread += tl.where(words == _NANS, nan, 0) + tl.where(words == _LARGE, large, 0)
    return tl.sum(spread, axis=0)


@triton.jit
def _word(limbs, k):
    return tl.sum(tl.where(tl.arange(0, _WORDS) == k, limbs, 0))


@triton.jit
def _value_of(limbs):
    """The sum as fp64: limbs from the lowest to the highest, each addition rounded; those that are 0 change nothing."""
    words = tl.arange(0, _WORDS)
    used = (limbs != 0) & (words < _LIMBS)
    low = tl.min(tl.where(used, words, _WORDS))
    high = tl.max(tl.where(used, words, -2))
    total = tl.full([], 0.0, tl.float64)
    carry = tl.full([], 0, tl.int64)
    for k in range(low, high + 2):
        word = _word(limbs, k) + carry
        weight = ((tl.full([], 671, tl.int64) + k * 32) << 52).to(tl.float64, bitcast=True)  # 2^(32 k - 352)
        total = total + (word & 0xFFFFFFFF).to(tl.float64) * weight
        carry = word >> 32
    total = tl.where(_word(limbs, _LARGE) != 0, float("inf"), total)
    return tl.where(_word(limbs, _NANS) != 0, float("nan"), total)


@triton.jit
def _finish(
    total,
    scalars_ptr,
    blocks_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    blocks,
    step_blocks,
    max_norm_bits,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
):
    """Write the scalars and count the step."""
    infinity = tl.full([], float("inf"), tl.float64)
    norm = tl.sqrt(total)
    scale = tl.full([], 1.0, tl.float64)
    if HAS_SCALE:
        scale = tl.load(grad_scale_ptr).to(tl.float64)
        norm = norm / scale
    max_norm = max_norm_bits.to(tl.int64).to(tl.float64, bitcast=True)
    clip = max_norm / (norm + tl.full([], 1e-6, tl.float64))
    clip = tl.where(clip > 1.0, 1.0, clip)
    clip = tl.where(max_norm == infinity, 1.0, clip)
    skip = tl.full([], 0, tl.int32)
    if HAS_FOUND_INF:
        skip = (tl.load(found_inf_ptr) != 0).to(tl.int32)
    if SKIP_NONFINITE:
        skip = tl.where(tl.abs(norm) < infinity, skip, 1)
    tl.store(scalars_ptr, norm)
    tl.store(scalars_ptr + 1, (clip / scale).to(tl.float32).to(tl.float64))
    tl.store(scalars_ptr + 2, skip.to(tl.float64))
    tl.store(scalars_ptr + 3, clip)
    tl.store(scalars_ptr + 4, tl.load(scalars_ptr + 4) + skip.to(tl.float64))
    if skip == 0:
        for block in range(blocks, blocks + step_blocks):
            steps_ptr = tl.load(blocks_ptr + block * 3 + 2).to(tl.pointer_type(tl.float32))
            size = tl.load(blocks_ptr + block * 3)
            for start in range(0, size, _CELLS):
                offsets = start + tl.arange(0, _CELLS)
                step = tl.load(steps_ptr + offsets, mask=offsets < size, other=0.0)
                tl.store(steps_ptr + offsets, step + 1.0, mask=offsets < size)


@triton.jit(do_not_specialize=_COUNTS)
def _step_scalars_kernel(
    table_ptr,
    sums_ptr,
    scalars_ptr,
    blocks_ptr,
    workspace_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    rows,
    chunks,
    blocks,
    step_blocks,
    max_norm_bits,
    COLUMNS: tl.constexpr,
    OPERAND: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    LAST: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
):
    program = tl.program_id(0)
    words = tl.arange(0, _WORDS)
    if program < chunks:
        total = sum_chunk(table_ptr, rows, program.to(tl.int64), COLUMNS, OPERAND, DTYPE, ALIGNED)
        tl.store(sums_ptr + program, total)
        limbs = _limbs_of(total.to(tl.int64, bitcast=True) + tl.zeros([1], tl.int64))
    else:
        limbs = tl.zeros([_WORDS], tl.int64)
        piece = (program - chunks).to(tl.int64)
        row = find_row(blocks_ptr, blocks, piece, 3)
        offset = (piece - tl.load(blocks_ptr + row * 3 + 1)) * _PIECE
        size = tl.load(blocks_ptr + row * 3) - offset
        values_ptr = tl.load(blocks_ptr + row * 3 + 2).to(tl.pointer_type(tl.int64)) + offset
        for start in range(0, _PIECE, _BLOCK):
            offsets = start + tl.arange(0, _BLOCK)
            limbs += _limbs_of(tl.load(values_ptr + offsets, mask=offsets < size, other=0))
    copy_ptr = workspace_ptr + (program % _COPIES) * _WORDS
    tl.atomic_add(copy_ptr + words, limbs, mask=limbs != 0, sem="relaxed")
    if LAST:
        # All limbs of this program are out before it counts itself, and the last one to count sees those of all others.
        tl.debug_barrier()
        arrived = tl.atomic_add(workspace_ptr + _ARRIVED, 1, sem="acq_rel")
        if arrived == tl.num_programs(0) - 1:
            everything = tl.arange(0, _COPIES)[:, None] * _WORDS + words[None, :]
            # Reads and zeroes; an exchange would say so more plainly, but does not compile for AMD.
            copies = tl.atomic_and(workspace_ptr + everything, tl.zeros([_COPIES, _WORDS], tl.int64), sem="relaxed")
            tl.store(workspace_ptr + _ARRIVED, 0)
            _finish(
                _value_of(tl.sum(copies, axis=0)), scalars_ptr, blocks_ptr, grad_scale_ptr, found_inf_ptr, blocks,
                step_blocks, max_norm_bits, HAS_SCALE, HAS_FOUND_INF, SKIP_NONFINITE,
            )  # fmt: skip


_KEPT: dict[tuple[torch.device, int], torch.Tensor] = {}


def _workspace(device: torch.device) -> torch.Tensor:
    """Zeroed limbs and counter, kept per stream: launches on one stream follow one another."""
    if device.type == "cpu":
        key = (device, 0)
    else:
        if torch.cuda.is_current_stream_capturing():  # zeros are filled when the graph runs: nothing to keep
            return torch.zeros(_WORKSPACE, dtype=torch.int64, device=device)
        key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _KEPT:
        _KEPT[key] = torch.zeros(_WORKSPACE, dtype=torch.int64, device=device)
    return _KEPT[key]


@functools.lru_cache(maxsize=64)
def _on_device(rows: tuple[tuple[int, int, int], ...], device: torch.device) -> torch.Tensor:
    """Size, first piece and address of every block; copied only where they are not those of an earlier call."""
    table = torch.tensor(rows, dtype=torch.int64)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def step_scalars_(
    scalars: torch.Tensor,
    steps: Sequence[torch.Tensor],
    partials: Sequence[torch.Tensor],
    unsummed: Sequence[Unsummed],
    *,
    max_norm: float,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    skip_nonfinite: bool,
) -> None:
    """Launch one program per chunk and per 128 known partials; same contract as the reference."""
    device = scalars.device
    workspace = _workspace(device)
    tables = [table for table in unsummed if table.operands.cache.chunks > 0]
    rows, pieces = [], 0
    for block in partials:
        if block.numel() > 0:
            rows.append((block.numel(), pieces, block.data_ptr()))
            pieces += -(-block.numel() // _PIECE.value)
    if not tables:
        tables = [Unsummed(Operands("step_scalars_", {"grads": []}), "grads", scalars)]
        if not rows:  # one program must finish
            rows, pieces = [(0, 0, 0)], 1
    blocks = len(rows)
    rows += [(block.numel(), 0, block.data_ptr()) for block in steps]
    block_table = _on_device(tuple(rows or [(0, 0, 0)]), device)
    # As an integer, because Triton narrows Python floats to fp32.
    (max_norm_bits,) = struct.unpack("<q", struct.pack("<d", max_norm))
    for position, (operands, column, sums) in enumerate(tables):
        last = position == len(tables) - 1
        cache = operands.cache
        dtype = cache.dtype_code(column)
        launch(
            _step_scalars_kernel,
            cache.chunks + (pieces if last else 0),
            cache.on_device(device),
            sums,
            scalars,
            block_table,
            workspace,
            scalars if grad_scale is None else grad_scale,
            scalars if found_inf is None else found_inf,
            len(operands[column]),
            cache.chunks,
            blocks,
            len(steps),
            max_norm_bits,
            COLUMNS=2 + len(operands.columns),
            OPERAND=list(operands.columns).index(column),
            DTYPE=dtype,
            ALIGNED=cache.aligned(),
            LAST=last,
            HAS_SCALE=grad_scale is not None,
            HAS_FOUND_INF=found_inf is not None,
            SKIP_NONFINITE=skip_nonfinite,
            num_warps=fold_warps(_BYTES[dtype], warp_size()),
        )


VARIANTS = [
    Variant(
        _step_scalars_kernel,
        {
            "table_ptr": "*i64",
            "sums_ptr": "*fp64",
            "scalars_ptr": "*fp64",
            "blocks_ptr": "*i64",
            "workspace_ptr": "*i64",
            "grad_scale_ptr": "*fp32",
            "found_inf_ptr": "*fp32",
            "rows": "i32",
            "chunks": "i32",
            "blocks": "i32",
            "step_blocks": "i32",
            "max_norm_bits": "i64",
        },
        {
            "COLUMNS": 8,
            "OPERAND": 1,
            "DTYPE": code,
            "ALIGNED": True,
            "LAST": last,
            "HAS_SCALE": last,
            "HAS_FOUND_INF": last,
            "SKIP_NONFINITE": last,
        },
        item_bytes=item_bytes,
        hot_bytes=4096 * item_bytes,
    )
    for code, item_bytes in enumerate(_BYTES)
    for last in (True, False)
]
