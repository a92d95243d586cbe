"""Triton kernels that reduce the factors of all samples of several matrices to few rows of int8.

Each pass over the factors is a launch of its own, over all matrices at once: programs of one launch never read what
another of them writes, so no barrier has to be trusted. A row of the table is a matrix; every sample of it has its own
programs, one for 16 tokens or 64 columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gradkern.ops._triton.lanes import (
    LANES,
    LARGEST,
    at_least_tiny,
    fold_four,
    fold_lanes,
    largest_magnitude,
    magnitude_bits,
    round_even,
)
from gradkern.ops._triton.launch import FIXED_THREADS, Variant, launch, warp_size

__all__ = ["VARIANTS", "Reduction", "record_matrices", "reduce_samples"]

# Columns of the table; what has a left and a right side takes two, the right one behind the left one.
_FACTOR = tl.constexpr(0)
_LOW = tl.constexpr(2)  # the few rows; behind those of the right side, the sum of the left factor's rows
_SCALE = tl.constexpr(5)
_CODES = tl.constexpr(8)
_SIZE = tl.constexpr(11)
_START = tl.constexpr(14)
_ALONG = tl.constexpr(15)
_TOKENS = tl.constexpr(16)
_DIRECTIONS = tl.constexpr(17)  # 0 where the factors themselves are quantised
_KEPT = tl.constexpr(18)
_COLUMNS = tl.constexpr(19)

_LEFT, _RIGHT, _SUM = 0, 1, 2

_TOKENS_AT_ONCE = tl.constexpr(16)
_COLUMNS_AT_ONCE = tl.constexpr(64)
_BLOCK = tl.constexpr(256)

# Four elements of a tile to a thread.
_COMBINING_THREADS = 64
# One warp: it writes where it has read, and nothing else is there to read it late.
_ROW_THREADS = 32


@triton.jit
def _find(table_ptr, samples, TILES):
    """Row of the table, sample, and tile of this program."""
    program = tl.program_id(0).to(tl.int64)
    item = program // TILES
    return table_ptr + item // samples * _COLUMNS, item % samples, (program % TILES).to(tl.int32)


@triton.jit
def _floats(entry, COLUMN: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer that a column of the table holds."""
    pointer = tl.load(entry + COLUMN).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _width(entry, SIDE: tl.constexpr, ALIGNED: tl.constexpr):
    """Columns of the rows of a side: 32 bits do in a row."""
    size = tl.load(entry + _SIZE + SIDE).to(tl.int32)
    if ALIGNED:
        size = tl.multiple_of(size, 4)
    return size


@triton.jit
def _dots_kernel(table_ptr, samples, tiles, SIDE: tl.constexpr, START: tl.constexpr, ALIGNED: tl.constexpr):
    """Inner products of the tokens of one side with its start, or with its few rows."""
    entry, sample, tile = _find(table_ptr, samples, tiles)
    directions = tl.load(entry + _DIRECTIONS)
    tokens = tl.load(entry + _TOKENS).to(tl.int32)
    first = tile * _TOKENS_AT_ONCE
    if (directions == 0) | (first >= tokens) | (tl.load(entry + _FACTOR + SIDE) == 0):
        return
    size = _width(entry, SIDE, ALIGNED)
    numbers = first + tl.arange(0, _TOKENS_AT_ONCE)
    # Beyond the last token stands the last again, whose products are not stored: no load needs a mask for it.
    rows_ptr = _floats(entry, _FACTOR + SIDE, ALIGNED) + sample * tokens * size
    row_ptrs = rows_ptr + tl.minimum(numbers, tokens - 1).to(tl.int64)[:, None] * size
    if START:
        directions_ptr = _floats(entry, _START, ALIGNED)
    else:
        directions_ptr = _floats(entry, _LOW + SIDE, ALIGNED) + sample * directions * size
    along_ptr = _floats(entry, _ALONG, ALIGNED) + sample * directions * tokens
    lanes = tl.arange(0, LANES)
    whole = size // LANES * LANES
    rest = whole + lanes
    for k in range(0, directions, 2):
        other = tl.minimum(k + 1, directions - 1)  # of an odd number the last twice
        k_ptr = directions_ptr + k * size
        other_ptr = directions_ptr + other * size
        sums = tl.zeros([_TOKENS_AT_ONCE, LANES], tl.float32)
        other_sums = tl.zeros([_TOKENS_AT_ONCE, LANES], tl.float32)
        for at in range(0, whole, LANES):
            x = tl.load(row_ptrs + (at + lanes)[None, :])
            sums += x * tl.load(k_ptr + (at + lanes)[None, :])
            other_sums += x * tl.load(other_ptr + (at + lanes)[None, :])
        if whole < size:
            inside = (rest < size)[None, :]
            x = tl.load(row_ptrs + rest[None, :], mask=inside, other=0.0)
            sums += x * tl.load(k_ptr + rest[None, :], mask=inside, other=0.0)
            other_sums += x * tl.load(other_ptr + rest[None, :], mask=inside, other=0.0)
        tl.store(along_ptr + k * tokens + numbers, fold_lanes(sums), mask=numbers < tokens)
        tl.store(along_ptr + other * tokens + numbers, fold_lanes(other_sums), mask=numbers < tokens)


@triton.jit
def _weights(pointer, token, tokens, ONES: tl.constexpr):
    """Weights of four tokens, shape (4, 1)."""
    numbers = token + tl.arange(0, 4)
    if ONES:
        weights = tl.where(numbers < tokens, 1.0, 0.0)
    else:
        weights = tl.load(pointer + numbers, mask=numbers < tokens, other=0.0)
    return weights[:, None]


@triton.jit
def _combine_pair(
    rows_ptr, weights_ptr, other_ptr, to_ptr, other_to_ptr, tokens, size, first,
    ONES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Two weighted sums of some columns of all tokens; with ONES one, of weights 1."""
    columns = first + tl.arange(0, _COLUMNS_AT_ONCE)
    inside = (columns < size)[None, :]
    four = tl.arange(0, 4)[:, None]
    offsets = four * size + columns[None, :]
    sums = tl.zeros([4, _COLUMNS_AT_ONCE], tl.float32)
    other_sums = tl.zeros([4, _COLUMNS_AT_ONCE], tl.float32)
    whole = tokens // 4 * 4
    for token in tl.range(0, whole, 4, loop_unroll_factor=2):
        x = tl.load(rows_ptr + offsets, mask=inside, other=0.0) if MASKED else tl.load(rows_ptr + offsets)
        rows_ptr += 4 * size
        sums += x * _weights(weights_ptr, token, tokens, ONES)
        if not ONES:
            other_sums += x * _weights(other_ptr, token, tokens, ONES)
    if whole < tokens:
        x = tl.load(rows_ptr + offsets, mask=inside & (whole + four < tokens), other=0.0)
        sums += x * _weights(weights_ptr, whole, tokens, ONES)
        if not ONES:
            other_sums += x * _weights(other_ptr, whole, tokens, ONES)
    tl.store(to_ptr + columns, fold_four(sums), mask=columns < size)
    if not ONES:
        tl.store(other_to_ptr + columns, fold_four(other_sums), mask=columns < size)


@triton.jit
def _combine_kernel(table_ptr, samples, tiles, SIDE: tl.constexpr, ONES: tl.constexpr, ALIGNED: tl.constexpr):
    """The tokens of one side summed by their weights, to its few rows; with ONES by weights 1, to the sum."""
    entry, sample, tile = _find(table_ptr, samples, tiles)
    size = _width(entry, SIDE, ALIGNED)
    TO: tl.constexpr = _LOW + 2 if ONES else _LOW + SIDE
    directions = tl.where(tl.load(entry + _CODES + 2) != 0, 1, 0) if ONES else tl.load(entry + _DIRECTIONS)
    tokens = tl.load(entry + _TOKENS).to(tl.int32)
    first = tile * _COLUMNS_AT_ONCE
    if (directions == 0) | (first >= size) | (tl.load(entry + _FACTOR + SIDE) == 0):
        return
    rows_ptr = _floats(entry, _FACTOR + SIDE, ALIGNED) + sample * tokens * size
    along_ptr = _floats(entry, _ALONG, ALIGNED) + sample * directions * tokens
    to_ptr = _floats(entry, TO, ALIGNED) + sample * directions * size
    for k in range(0, directions, 2):
        other = tl.minimum(k + 1, directions - 1)
        weights_ptr = along_ptr + k * tokens
        other_ptr = along_ptr + other * tokens
        k_ptr = to_ptr + k * size
        other_to_ptr = to_ptr + other * size
        if first + _COLUMNS_AT_ONCE <= size:
            _combine_pair(rows_ptr, weights_ptr, other_ptr, k_ptr, other_to_ptr, tokens, size, first, ONES, False)
        else:
            _combine_pair(rows_ptr, weights_ptr, other_ptr, k_ptr, other_to_ptr, tokens, size, first, ONES, True)


@triton.jit
def _normalise_kernel(table_ptr, samples, most, SIDE: tl.constexpr, ALIGNED: tl.constexpr):
    """Scale each of the few rows of a side to length 1, first by its largest entry."""
    entry, sample, k = _find(table_ptr, samples, most)
    directions = tl.load(entry + _DIRECTIONS)
    if k >= directions:
        return
    size = _width(entry, SIDE, ALIGNED)
    row_ptr = _floats(entry, _LOW + SIDE, ALIGNED) + (sample * directions + k) * size
    divisor = at_least_tiny(largest_magnitude(row_ptr, size, _BLOCK))
    lanes = tl.arange(0, LANES)
    sums = tl.zeros([LANES], tl.float32)
    for at in range(0, size, LANES):
        x = tl.div_rn(tl.load(row_ptr + at + lanes, mask=at + lanes < size, other=0.0), divisor)
        sums += x * x
    length = at_least_tiny(tl.sqrt_rn(tl.sum(fold_lanes(sums[None, :]), axis=0)))
    columns = tl.arange(0, _BLOCK)
    for at in range(0, size, _BLOCK):
        inside = at + columns < size
        x = tl.div_rn(tl.load(row_ptr + at + columns, mask=inside, other=0.0), divisor)
        tl.store(row_ptr + at + columns, tl.div_rn(x, length), mask=inside)


@triton.jit
def _add_fours(products, numbers, FOUND: tl.constexpr):
    """Products of shape (FOUND, 64) added over rows: four sums of every fourth, added in pairs."""
    fours = tl.reshape(products, [FOUND // 4, 4, LANES])
    groups = tl.reshape(numbers, [FOUND // 4, 4, 1])
    sums = tl.zeros([4, LANES], tl.float32)
    for group in tl.static_range(FOUND // 4):
        # Of all groups but one, zeros: what tl.sum adds is exact in any order.
        sums += tl.sum(tl.where(groups // 4 == group, fours, 0.0), axis=0)
    return fold_four(sums)


@triton.jit
def _remainder(row_ptr, found_ptr, along, numbers, row, size, at, FOUND: tl.constexpr):
    """What 64 elements of the row have beside the rows before it."""
    columns = at + tl.arange(0, LANES)
    inside = columns < size
    mask = (numbers < row)[:, None] & inside[None, :]
    found = tl.load(found_ptr + numbers[:, None].to(tl.int64) * size + columns[None, :], mask=mask, other=0.0)
    x = tl.load(row_ptr + columns, mask=inside, other=0.0)
    return x - _add_fours(along[:, None] * found, numbers, FOUND)


@triton.jit
def _orthogonalise_kernel(table_ptr, samples, row, FOUND: tl.constexpr, ALIGNED: tl.constexpr):
    """Take out of one row of the right side what the rows before it have of it, and scale it to length 1."""
    entry, sample, _ = _find(table_ptr, samples, 1)
    directions = tl.load(entry + _DIRECTIONS)
    if row >= directions:
        return
    size = _width(entry, 1, ALIGNED)
    found_ptr = _floats(entry, _LOW + 1, ALIGNED) + sample * directions * size
    row_ptr = found_ptr + row * size
    numbers = tl.arange(0, FOUND)
    lanes = tl.arange(0, LANES)
    dots = tl.zeros([FOUND, LANES], tl.float32)
    for at in range(0, size, LANES):
        inside = at + lanes < size
        mask = (numbers < row)[:, None] & inside[None, :]
        offsets = numbers[:, None].to(tl.int64) * size + (at + lanes)[None, :]
        x = tl.load(row_ptr + at + lanes, mask=inside, other=0.0)
        dots += tl.where(numbers[:, None] < row, x[None, :], 0.0) * tl.load(found_ptr + offsets, mask=mask, other=0.0)
    along = fold_lanes(dots)
    largest = tl.zeros([LANES], tl.int32)
    for at in range(0, size, LANES):
        x = _remainder(row_ptr, found_ptr, along, numbers, row, size, at, FOUND)
        largest = tl.maximum(largest, magnitude_bits(x))
    divisor = at_least_tiny(tl.max(largest, axis=0).to(tl.float32, bitcast=True))
    sums = tl.zeros([LANES], tl.float32)
    for at in range(0, size, LANES):
        x = _remainder(row_ptr, found_ptr, along, numbers, row, size, at, FOUND)
        x = tl.div_rn(x, divisor)
        sums += x * x
    length = at_least_tiny(tl.sqrt_rn(tl.sum(fold_lanes(sums[None, :]), axis=0)))
    for at in range(0, size, LANES):
        x = _remainder(row_ptr, found_ptr, along, numbers, row, size, at, FOUND)
        tl.store(row_ptr + at + lanes, tl.div_rn(tl.div_rn(x, divisor), length), mask=at + lanes < size)


@triton.jit
def _quantise_block(x, scale, divisor):
    # What is not finite is refused by whoever reads the scales; of a NaN no code would be the same everywhere.
    return round_even(tl.where(scale <= LARGEST, tl.div_rn(x, divisor), 0.0)).to(tl.int8)


@triton.jit
def _quantise_kernel(table_ptr, samples, most, ALIGNED: tl.constexpr):
    """One row of few, or a sum of rows: int8 codes and their scale."""
    entry, sample, number = _find(table_ptr, samples, most)
    kept = tl.load(entry + _KEPT)
    side = tl.where(number >= 2 * kept, 2, tl.where(number >= kept, 1, 0))
    rows = tl.where(side == 2, 1, kept)
    k = number - side * kept
    codes = tl.load(entry + _CODES + side)
    if (k >= rows) | (codes == 0):
        return
    row = sample * rows + k
    size = tl.load(entry + _SIZE + side).to(tl.int32)
    codes_ptr = codes.to(tl.pointer_type(tl.int8))
    low_ptr = tl.load(entry + _LOW + side).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        size = tl.multiple_of(size, 4)
        codes_ptr = tl.multiple_of(codes_ptr, 4)
        low_ptr = tl.multiple_of(low_ptr, 16)
    codes_ptr += row * size
    low_ptr += row * size
    scale = tl.div_rn(largest_magnitude(low_ptr, size, _BLOCK), 127.0)
    divisor = at_least_tiny(scale)
    tl.store(tl.load(entry + _SCALE + side).to(tl.pointer_type(tl.float32)) + row, scale)
    columns = tl.arange(0, _BLOCK)
    whole = size // _BLOCK * _BLOCK
    for at in range(0, whole, _BLOCK):
        tl.store(codes_ptr + at + columns, _quantise_block(tl.load(low_ptr + at + columns), scale, divisor))
    inside = whole + columns < size
    rest = tl.load(low_ptr + whole + columns, mask=inside, other=0.0)
    tl.store(codes_ptr + whole + columns, _quantise_block(rest, scale, divisor), mask=inside)


class Reduction(NamedTuple):
    """One matrix to reduce.

    Attributes:
        left: Shape ``(B, T, K)``, fp32, contiguous. None for a matrix that is given as ``right`` alone.
        right: Shape ``(B, T, D)``, likewise. None where only the sum of the left rows is wanted.
        start: Shape ``(rank, D)``, likewise; None as ``right``.
        places: Six addresses in device memory, 0 for what is not wanted: fp32 scales of the left rows, the right rows
            and the sum, shapes ``(B, r)``, ``(B, r)`` and ``(B,)``; their int8 codes, ``(B, r, K)``, ``(B, r, D)`` and
            ``(B, K)``.
    """

    left: torch.Tensor | None
    right: torch.Tensor | None
    start: torch.Tensor | None
    places: tuple[int, ...]


class _Scratch:
    """The fp32 rows between launches: one allocation, and what else must live until they are queued."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._size = 0
        self._held: list[torch.Tensor] = []

    def take(self, elements: int) -> int:
        """A place of so many elements at a multiple of 16 bytes, as a negative number until :meth:`addresses`."""
        place, self._size = -1 - 4 * self._size, self._size + -(-elements // 4) * 4
        return place

    def hold(self, tensor: torch.Tensor) -> int:
        """The address of a tensor, which is kept."""
        self._held.append(tensor)
        return tensor.data_ptr()

    def addresses(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """The rows with addresses for places."""
        begin = self.hold(torch.empty(self._size, dtype=torch.float32, device=self._device))
        return [[value if value >= 0 else begin - 1 - value for value in row] for row in rows]


def _row(each: Reduction, scratch: _Scratch) -> list[int]:
    """One row of the table."""
    row = [0] * _COLUMNS.value
    row[_SCALE.value : _SIZE.value] = each.places
    for side, factor in ((_LEFT, each.left), (_RIGHT, each.right)):
        if factor is not None:
            samples, row[_TOKENS.value], row[_SIZE.value + side] = factor.shape
            # Where the tokens are few, they are the rows that are kept; so is a single one the sum.
            row[_FACTOR.value + side] = row[_LOW.value + side] = factor.data_ptr()
    tokens, height, width = row[_TOKENS.value], row[_SIZE.value + _LEFT], row[_SIZE.value + _RIGHT]
    row[_SIZE.value + _SUM] = height
    if row[_CODES.value + _SUM] != 0:
        row[_LOW.value + _SUM] = row[_FACTOR.value] if tokens == 1 else scratch.take(samples * height)
    if each.right is None or each.start is None:
        return row
    rank = len(each.start)
    row[_KEPT.value] = min(tokens, rank)
    if tokens > rank:
        row[_DIRECTIONS.value], row[_START.value] = rank, each.start.data_ptr()
        row[_ALONG.value] = row[_LOW.value] = scratch.take(samples * rank * tokens)
        row[_LOW.value + _RIGHT] = scratch.take(samples * rank * width)
    if each.left is None:
        row[_SIZE.value] = tokens
        if tokens <= rank:
            row[_LOW.value] = scratch.hold(torch.eye(tokens, device=each.right.device).repeat(samples, 1, 1))
    elif tokens > rank:
        row[_LOW.value] = scratch.take(samples * rank * height)
    return row


def _is_aligned(row: list[int]) -> bool:
    """Whether every access may take four elements at once."""
    wide = [row[at] % 16 == 0 for at in (*range(_SCALE.value), _START.value, _ALONG.value)]
    narrow = [row[at] % 4 == 0 for at in range(_CODES.value, _START.value)]  # codes, and columns of rows
    return all(wide) and all(narrow)


def record_matrices(
    rows: Sequence[torch.Tensor],
    columns: Sequence[torch.Tensor],
    starts: Sequence[torch.Tensor],
    offsets: Sequence[int],
    samples: int,
    block: torch.Tensor,
) -> None:
    """As ``_record_matrices_`` of the native library.

    Args:
        rows: Left factors, in any shape of the order ``(B, T, K)``, fp32, contiguous.
        columns: Right factors, likewise.
        starts: Shape ``(rank, D)``.
        offsets: Six of each matrix in the block, as :class:`Reduction` has places; negative for what is not wanted.
        samples: ``B``.
        block: uint8; the records are written to it.
    """
    begin = block.data_ptr()
    places = [0 if offset < 0 else begin + offset for offset in offsets]
    reductions = [
        Reduction(
            left.view(samples, -1, left.shape[-1]),
            right.view(samples, -1, right.shape[-1]),
            start,
            tuple(places[6 * number : 6 * number + 6]),
        )
        for number, (left, right, start) in enumerate(zip(rows, columns, starts, strict=True))
    ]
    reduce_samples(reductions, samples)


def reduce_samples(reductions: Sequence[Reduction], samples: int) -> None:
    """Reduce every sample of every matrix: the bits of the reference, in a dozen launches for any number of matrices.

    Args:
        reductions: At least one; all on one device.
        samples: Of each, at least 1.
    """
    device = next(factor.device for factor in (reductions[0].left, reductions[0].right) if factor is not None)
    scratch = _Scratch(device)
    rows = scratch.addresses([_row(each, scratch) for each in reductions])
    table = torch.tensor(rows, dtype=torch.int64)
    if device.type != "cpu":
        table = table.pin_memory().to(device, non_blocking=True)
    aligned = all(map(_is_aligned, rows))

    def most(column: int) -> int:
        return max(row[column] for row in rows)

    def run(kernel: Any, tiles: int, threads: int, *, capped: bool = False, **constants: Any) -> None:
        programs, warps = len(rows) * samples * tiles, max(1, threads // warp_size())
        launch(kernel, programs, table, samples, tiles, num_warps=warps, capped=capped, ALIGNED=aligned, **constants)

    def dots(side: int, *, start: bool = False) -> None:
        run(_dots_kernel, -(-most(_TOKENS.value) // _TOKENS_AT_ONCE.value), FIXED_THREADS, SIDE=side, START=start)

    def combine(side: int, *, ones: bool = False) -> None:
        tiles = -(-most(_SIZE.value + side) // _COLUMNS_AT_ONCE.value)
        run(_combine_kernel, tiles, _COMBINING_THREADS, capped=True, SIDE=side, ONES=ones)

    def orthogonalise(row: int) -> None:
        found = max(4, 1 << (directions - 1).bit_length())
        programs = len(rows) * samples
        warps = max(1, _ROW_THREADS * found // 4 // warp_size())
        launch(_orthogonalise_kernel, programs, table, samples, row, num_warps=warps, FOUND=found, ALIGNED=aligned)

    directions = most(_DIRECTIONS.value)
    if directions > 0:
        has_left = any(row[_FACTOR.value] for row in rows)
        dots(_RIGHT, start=True)
        if has_left:
            combine(_LEFT)
        run(_normalise_kernel, directions, _ROW_THREADS, SIDE=_LEFT)
        if has_left:
            dots(_LEFT)
        combine(_RIGHT)
        run(_normalise_kernel, directions, _ROW_THREADS, SIDE=_RIGHT)
        for row in range(1, directions):
            for _ in range(2):  # once leaves a nearly dependent row far from orthogonal
                orthogonalise(row)
        dots(_RIGHT)
        if has_left:
            combine(_LEFT)
    if any(row[_CODES.value + _SUM] and row[_TOKENS.value] > 1 for row in rows):
        combine(_LEFT, ones=True)
    run(_quantise_kernel, 2 * most(_KEPT.value) + 1, _ROW_THREADS)


_POINTERS = {"table_ptr": "*i64", "samples": "i32", "tiles": "i32"}
_ROW_POINTERS = {"table_ptr": "*i64", "samples": "i32", "most": "i32"}

VARIANTS = [
    *(
        Variant(
            _dots_kernel,
            _POINTERS,
            {"SIDE": side, "START": start, "ALIGNED": True},
            item_bytes=0,
            hot_bytes=4096,
        )
        for side, start in ((_RIGHT, True), (_LEFT, False))
    ),
    *(
        Variant(
            _combine_kernel,
            _POINTERS,
            {"SIDE": _LEFT, "ONES": ones, "ALIGNED": True},
            item_bytes=0,
            threads=_COMBINING_THREADS,
            hot_bytes=1024,
            capped=True,
        )
        for ones in (False, True)
    ),
    Variant(
        _normalise_kernel,
        _ROW_POINTERS,
        {"SIDE": _LEFT, "ALIGNED": True},
        item_bytes=0,
        threads=_ROW_THREADS,
        hot_bytes=1024,
    ),
    *(
        Variant(
            _orthogonalise_kernel,
            {"table_ptr": "*i64", "samples": "i32", "row": "i32"},
            {"FOUND": found, "ALIGNED": True},
            item_bytes=0,
            threads=_ROW_THREADS * max(1, found // 4),
            hot_bytes=0,
        )
        for found in (4, 8)  # of the default, and of budgets
    ),
    Variant(
        _quantise_kernel,
        _ROW_POINTERS,
        {"ALIGNED": True},
        item_bytes=0,
        threads=_ROW_THREADS,
        hot_bytes=1024,
        hot_bits=32,
    ),
]
