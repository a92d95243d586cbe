"""Triton kernels that follow momentum and change of every parameter and smooth its preconditioner, in one pass.

One program has 16 rows of a matrix: it sums each row in lanes and leaves the sums of its columns, which programs of
another launch add in pairs. A vector, a bias say, has one program.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gradkern.ops._triton.kernels import BFLOAT16, find_row, square, store_f32
from gradkern.ops._triton.lanes import LANES, fold_lanes
from gradkern.ops._triton.launch import FIXED_THREADS, Variant, launch, warp_size

__all__ = ["VARIANTS", "Followed", "shadow_step"]

# Columns of the table; the second is what find_row looks for.
_ROWS = tl.constexpr(0)
_FIRST = tl.constexpr(1)
_SIZE = tl.constexpr(2)
_GRADIENT = tl.constexpr(3)
_MOMENT = tl.constexpr(4)
_MOMENTUM = tl.constexpr(5)
_DELTA = tl.constexpr(6)
_SMOOTHED = tl.constexpr(7)
_PARTIALS = tl.constexpr(8)  # of a vector, its two sums of squares
_OTHER_PARTIALS = tl.constexpr(9)
_LEVELS = tl.constexpr(10)  # from here on, the first program of every level of the tree of column sums
_COLUMNS = tl.constexpr(18)

# fp32 factors of a parameter.
_NUMBERS = tl.constexpr(6)

_HEIGHT = tl.constexpr(16)
_COLUMNS_AT_ONCE = tl.constexpr(256)
_BLOCK = tl.constexpr(1024)


# Of programs with a row of lanes.
_LANE_THREADS = 32


@triton.jit
def _entry_pointer(entry, COLUMN: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(entry + COLUMN).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _finite_kernel(table_ptr, bad_ptr, count, ALIGNED: tl.constexpr):
    """Write 1 where a gradient is not finite: every program that does writes the same."""
    program = tl.program_id(0).to(tl.int64)
    entry = table_ptr + find_row(table_ptr, count, program, _COLUMNS) * _COLUMNS
    size = tl.load(entry + _SIZE)
    rows = tl.load(entry + _ROWS)
    first = (program - tl.load(entry + _FIRST)) * _HEIGHT
    if rows > 0:
        size *= tl.minimum(rows - first, _HEIGHT)
    gradient_ptr = _entry_pointer(entry, _GRADIENT, ALIGNED) + first * tl.load(entry + _SIZE)
    if ALIGNED:
        gradient_ptr = tl.multiple_of(gradient_ptr, 16)
    elements = tl.arange(0, _BLOCK)
    whole = size // _BLOCK * _BLOCK
    largest = tl.zeros([_BLOCK], tl.int32)
    for at in range(0, whole, _BLOCK):
        x = tl.load(gradient_ptr + at + elements)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    x = tl.load(gradient_ptr + whole + elements, mask=whole + elements < size, other=0.0)
    largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    if tl.max(largest, axis=0) >= 0x7F800000:
        tl.store(bad_ptr, 1)


@triton.jit
def _load(pointer, inside, MASKED: tl.constexpr):
    return tl.load(pointer, mask=inside, other=0.0) if MASKED else tl.load(pointer)


@triton.jit
def _store(pointer, x, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer, x, mask=inside)
    else:
        tl.store(pointer, x)


@triton.jit
def _follow(
    gradient_ptr, moment_ptr, momentum_ptr, delta_ptr, numbers_ptr, inside,
    HAS_GRADIENT: tl.constexpr, HAS_MOMENT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Momentum and delta of some elements; their preconditioners and momenta."""
    step_size = tl.load(numbers_ptr + 3)
    m = _load(momentum_ptr, inside, MASKED) * tl.load(numbers_ptr)
    if HAS_GRADIENT:
        m += _load(gradient_ptr, inside, MASKED) * tl.load(numbers_ptr + 1)
    if HAS_MOMENT:
        root = tl.sqrt_rn(_load(moment_ptr, inside, MASKED))
        p = tl.div_rn(1.0, root * tl.load(numbers_ptr + 4) + tl.load(numbers_ptr + 5)) * step_size
    else:
        p = tl.zeros(m.shape, tl.float32) + step_size
    _store(momentum_ptr, m, inside, MASKED)
    _store(delta_ptr, _load(delta_ptr, inside, MASKED) * tl.load(numbers_ptr + 2) - p * m, inside, MASKED)
    return p, m


@triton.jit
def _fold_rows(x):
    """16 rows added in pairs, pairs in pairs, and so on: shape (1, 64)."""
    x = tl.reshape(x, [2, 2, 2, 2, LANES])
    return tl.sum(tl.sum(tl.sum(tl.sum(x, axis=3), axis=2), axis=1), axis=0)[None, :]


@triton.jit
def _follow_tile(
    gradient_ptr, moment_ptr, momentum_ptr, delta_ptr, partials_ptr, numbers_ptr, rows, size, at, sums,
    HAS_GRADIENT: tl.constexpr, HAS_MOMENT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """64 columns of 16 rows; the sums of the rows so far, with them."""
    numbers = tl.arange(0, _HEIGHT)[:, None]
    columns = at + tl.arange(0, LANES)[None, :]
    offsets = numbers * size + columns
    inside = (numbers < rows) & (columns < size)
    p, _ = _follow(
        gradient_ptr + offsets, moment_ptr + offsets, momentum_ptr + offsets, delta_ptr + offsets, numbers_ptr, inside,
        HAS_GRADIENT, HAS_MOMENT, MASKED,
    )  # fmt: skip
    inverse = tl.div_rn(1.0, p)
    squares = inverse * inverse
    if MASKED:
        squares = tl.where(inside, squares, 0.0)
    tl.store(partials_ptr + columns, _fold_rows(squares), mask=columns < size)
    return sums + squares


@triton.jit
def _matrix_kernel(
    table_ptr, numbers_ptr, bad_ptr, count,
    HAS_GRADIENT: tl.constexpr, HAS_MOMENT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """16 rows of a matrix: the means of 1 / P squared over their columns, and partial sums over rows."""
    if tl.load(bad_ptr) != 0:
        return
    program = tl.program_id(0).to(tl.int64)
    number = find_row(table_ptr, count, program, _COLUMNS)
    entry = table_ptr + number * _COLUMNS
    numbers_ptr += number * _NUMBERS
    size = tl.load(entry + _SIZE).to(tl.int32)
    if ALIGNED:
        size = tl.multiple_of(size, 4)
    tile = program - tl.load(entry + _FIRST)
    first = tile * _HEIGHT
    rows = tl.minimum(tl.load(entry + _ROWS) - first, _HEIGHT).to(tl.int32)
    momentum_ptr = _entry_pointer(entry, _MOMENTUM, ALIGNED) + first * size
    delta_ptr = _entry_pointer(entry, _DELTA, ALIGNED) + first * size
    gradient_ptr = _entry_pointer(entry, _GRADIENT, ALIGNED) + first * size
    moment_ptr = _entry_pointer(entry, _MOMENT, ALIGNED) + first * size
    partials_ptr = _entry_pointer(entry, _PARTIALS, ALIGNED) + tile * size
    sums = tl.zeros([_HEIGHT, LANES], tl.float32)
    whole = tl.where(rows == _HEIGHT, size // LANES * LANES, 0)
    for at in range(0, whole, LANES):
        sums = _follow_tile(
            gradient_ptr, moment_ptr, momentum_ptr, delta_ptr, partials_ptr, numbers_ptr, rows, size, at, sums,
            HAS_GRADIENT, HAS_MOMENT, False,
        )  # fmt: skip
    for at in range(whole, size, LANES):
        sums = _follow_tile(
            gradient_ptr, moment_ptr, momentum_ptr, delta_ptr, partials_ptr, numbers_ptr, rows, size, at, sums,
            HAS_GRADIENT, HAS_MOMENT, True,
        )  # fmt: skip
    smoothed_ptr = tl.load(entry + _SMOOTHED).to(tl.pointer_type(tl.int16)) + first
    means = tl.div_rn(fold_lanes(sums), size.to(tl.float32))
    store_f32(smoothed_ptr, tl.arange(0, _HEIGHT), means, rows, BFLOAT16, True)


@triton.jit
def _row(pointer, number, count, size, inside):
    return tl.load(pointer + number.to(tl.int64) * size, mask=inside & (number < count), other=0.0)


@triton.jit
def _two_rows(pointer, number, count, size, inside):
    return _row(pointer, number, count, size, inside) + _row(pointer, number + 1, count, size, inside)


@triton.jit
def _four_rows(pointer, number, count, size, inside):
    return _two_rows(pointer, number, count, size, inside) + _two_rows(pointer, number + 2, count, size, inside)


@triton.jit
def _eight_rows(pointer, number, count, size, inside):
    return _four_rows(pointer, number, count, size, inside) + _four_rows(pointer, number + 4, count, size, inside)


@triton.jit
def _columns_kernel(table_ptr, bad_ptr, count, span, FROM: tl.constexpr, TO: tl.constexpr, LEVEL: tl.constexpr):
    """16 rows of partial sums added in pairs, pairs in pairs, and so on; of the last 16, the means of all.

    ``span`` rows of the matrix are in each of them. Rows beyond the last are zeros, which change nothing.
    """
    if tl.load(bad_ptr) != 0:
        return
    program = tl.program_id(0).to(tl.int64)
    entry = table_ptr + find_row(table_ptr + (_LEVELS + LEVEL - _FIRST), count, program, _COLUMNS) * _COLUMNS
    program -= tl.load(entry + _LEVELS + LEVEL)
    size = tl.load(entry + _SIZE)
    rows = tl.load(entry + _ROWS)
    partials = (rows + span - 1) // span
    tiles = (size + _COLUMNS_AT_ONCE - 1) // _COLUMNS_AT_ONCE
    group = program // tiles
    columns = (program % tiles) * _COLUMNS_AT_ONCE + tl.arange(0, _COLUMNS_AT_ONCE)
    inside = columns < size
    from_ptr = tl.load(entry + FROM).to(tl.pointer_type(tl.float32)) + columns
    first = group * _HEIGHT
    sums = _eight_rows(from_ptr, first, partials, size, inside)
    sums += _eight_rows(from_ptr, first + 8, partials, size, inside)
    if partials <= _HEIGHT:
        smoothed_ptr = tl.load(entry + _SMOOTHED).to(tl.pointer_type(tl.int16)) + rows
        store_f32(smoothed_ptr, columns, tl.div_rn(sums, rows.to(tl.float32)), size, BFLOAT16, True)
    else:
        to_ptr = tl.load(entry + TO).to(tl.pointer_type(tl.float32))
        tl.store(to_ptr + group * size + columns, sums, mask=inside)


@triton.jit
def _vector_kernel(
    table_ptr, numbers_ptr, bad_ptr, HAS_GRADIENT: tl.constexpr, HAS_MOMENT: tl.constexpr, ALIGNED: tl.constexpr
):
    """A vector: its preconditioner, and two sums of squares."""
    if tl.load(bad_ptr) != 0:
        return
    number = tl.program_id(0).to(tl.int64)
    entry = table_ptr + number * _COLUMNS
    numbers_ptr += number * _NUMBERS
    size = tl.load(entry + _SIZE).to(tl.int32)
    gradient_ptr = _entry_pointer(entry, _GRADIENT, ALIGNED)
    moment_ptr = _entry_pointer(entry, _MOMENT, ALIGNED)
    momentum_ptr = _entry_pointer(entry, _MOMENTUM, ALIGNED)
    delta_ptr = _entry_pointer(entry, _DELTA, ALIGNED)
    smoothed_ptr = tl.load(entry + _SMOOTHED).to(tl.pointer_type(tl.int16))
    of_gradient = tl.zeros([LANES], tl.float64)
    of_moving = tl.zeros([LANES], tl.float64)
    for at in range(0, size, LANES):
        elements = at + tl.arange(0, LANES)
        inside = elements < size
        p, m = _follow(
            gradient_ptr + elements, moment_ptr + elements, momentum_ptr + elements, delta_ptr + elements,
            numbers_ptr, inside, HAS_GRADIENT, HAS_MOMENT, True,
        )  # fmt: skip
        store_f32(smoothed_ptr, elements, p, size, BFLOAT16, True)
        if HAS_GRADIENT:
            of_gradient += square(tl.load(gradient_ptr + elements, mask=inside, other=0.0))
        # Sums of nothing but zeros have no rounding, and Adam divides them by eps.
        of_moving += square(tl.where(inside & (m != 0.0), p, 0.0))
    squares_ptr = tl.load(entry + _PARTIALS).to(tl.pointer_type(tl.float64))
    tl.store(squares_ptr, tl.sum(fold_lanes(of_gradient[None, :]), axis=0))
    tl.store(squares_ptr + 1, tl.sum(fold_lanes(of_moving[None, :]), axis=0))


class Followed(NamedTuple):
    """One parameter that took part in a step; all tensors contiguous, of its shape, fp32.

    Attributes:
        gradient: What waits for the step; None where nothing does.
        moment: Second moment; None where there is none.
        momentum: Changed in place.
        delta: Changed in place.
        numbers: Factor of the momentum, of the gradient, of the delta; step size, factor of the root, and eps.
        smoothed: bf16, a view of as many elements as :func:`gradkern.rollback._smoothing.smooth` gives; overwritten.
    """

    gradient: torch.Tensor | None
    moment: torch.Tensor | None
    momentum: torch.Tensor
    delta: torch.Tensor
    numbers: tuple[float, ...]
    smoothed: torch.Tensor


def shadow_step(parameters: Sequence[Followed], squares: torch.Tensor, bad: torch.Tensor) -> None:
    """Follow one step; nothing is changed where a gradient is not finite, which the device decides.

    Args:
        parameters: None without elements, of matrices less than 2^31 rows.
        squares: Shape ``(parameters, 2)``, fp64. Of a vector, the sums of squares of its gradient, and of its
            preconditioner where the momentum is not zero.
        bad: int32, shape ``(1,)``, zero; 1 where a gradient is not finite.
    """
    kinds: dict[tuple[bool, bool, bool], list[int]] = {}
    for number, each in enumerate(parameters):
        kind = (each.momentum.dim() < 2, each.gradient is not None, each.moment is not None)
        kinds.setdefault(kind, []).append(number)
    batches = [_Batch(parameters, numbers, squares, is_vector) for (is_vector, *_), numbers in kinds.items()]
    for (_, has_gradient, _), batch in zip(kinds, batches, strict=True):
        if has_gradient:
            warps = FIXED_THREADS // warp_size()
            constants = {"ALIGNED": batch.aligned}
            launch(_finite_kernel, batch.programs, batch.table, bad, batch.count, num_warps=warps, **constants)
    for (is_vector, has_gradient, has_moment), batch in zip(kinds, batches, strict=True):
        batch.run(bad, is_vector, HAS_GRADIENT=has_gradient, HAS_MOMENT=has_moment, ALIGNED=batch.aligned)


class _Batch:
    """Parameters that are followed by the same kernels."""

    def __init__(
        self, parameters: Sequence[Followed], numbers: Sequence[int], squares: torch.Tensor, is_vector: bool
    ) -> None:
        chosen = [parameters[number] for number in numbers]
        device = chosen[0].momentum.device
        heights = [0 if is_vector else each.momentum.shape[0] for each in chosen]
        widths = [each.momentum.numel() // max(1, height) for each, height in zip(chosen, heights, strict=True)]
        tiles = [-(-height // _HEIGHT.value) or 1 for height in heights]
        *firsts, self.programs = accumulate(tiles, initial=0)
        self.count = len(chosen)
        # Rows of partial sums begin at multiples of 16 bytes where the parameter's do. Every other level goes to the
        # second half of the space: none writes what it reads.
        spaces = [0 if is_vector else -(-tile * width // 4) * 4 for tile, width in zip(tiles, widths, strict=True)]
        *places, total = accumulate(spaces, initial=0)
        self._partials = torch.empty(2 * total, dtype=torch.float32, device=device)
        begin, other = self._partials.data_ptr(), self._partials.data_ptr() + 4 * total
        # Of every level, the programs of each parameter, until one row is left of all.
        self._levels: list[int] = []
        columns = [-(-width // _COLUMNS_AT_ONCE.value) for width in widths]
        level_firsts: list[list[int]] = []
        while not is_vector and (not self._levels or max(tiles) > 1):
            is_done = [bool(self._levels) and tile == 1 for tile in tiles]
            tiles = [-(-tile // _HEIGHT.value) for tile in tiles]
            programs = [0 if done else tile * each for done, tile, each in zip(is_done, tiles, columns, strict=True)]
            *level_first, all_programs = accumulate(programs, initial=0)
            level_firsts.append(level_first)
            self._levels.append(all_programs)
        level_firsts += [[0] * self.count] * (_COLUMNS.value - _LEVELS.value - len(level_firsts))
        rows = [
            [
                height,
                first,
                width,
                0 if each.gradient is None else each.gradient.data_ptr(),
                0 if each.moment is None else each.moment.data_ptr(),
                each.momentum.data_ptr(),
                each.delta.data_ptr(),
                each.smoothed.data_ptr(),
                squares[number].data_ptr() if is_vector else begin + 4 * place,
                other + 4 * place,
                *level_first,
            ]
            for each, number, height, first, width, place, level_first in zip(
                chosen, numbers, heights, firsts, widths, places, zip(*level_firsts, strict=True), strict=True
            )
        ]
        streams = range(_GRADIENT.value, _SMOOTHED.value)
        self.aligned = all(row[_SIZE.value] % 4 == 0 and all(row[at] % 16 == 0 for at in streams) for row in rows)
        self.table = torch.tensor(rows, dtype=torch.int64)
        self._numbers = torch.tensor([each.numbers for each in chosen], dtype=torch.float64).float()
        if device.type != "cpu":
            self.table = self.table.pin_memory().to(device, non_blocking=True)
            self._numbers = self._numbers.pin_memory().to(device, non_blocking=True)

    def run(self, bad: torch.Tensor, is_vector: bool, **constants: Any) -> None:
        if is_vector:
            launch(_vector_kernel, self.count, self.table, self._numbers, bad, num_warps=1, **constants)
            return
        warps = FIXED_THREADS // warp_size()
        step = (self.table, self._numbers, bad, self.count)
        launch(_matrix_kernel, self.programs, *step, num_warps=warps, capped=True, **constants)
        sides = (_PARTIALS.value, _OTHER_PARTIALS.value)
        for level, programs in enumerate(self._levels):
            levels = {"FROM": sides[level % 2], "TO": sides[1 - level % 2], "LEVEL": level}
            span = _HEIGHT.value ** (level + 1)
            launch(_columns_kernel, programs, self.table, bad, self.count, span, num_warps=warps, **levels)


_STEP = {"table_ptr": "*i64", "numbers_ptr": "*fp32", "bad_ptr": "*i32"}

VARIANTS = [
    Variant(
        _finite_kernel,
        {"table_ptr": "*i64", "bad_ptr": "*i32", "count": "i32"},
        {"ALIGNED": True},
        item_bytes=0,
        hot_bytes=4096,
    ),
    *(
        Variant(
            _matrix_kernel,
            {**_STEP, "count": "i32"},
            {"HAS_GRADIENT": True, "HAS_MOMENT": has_moment, "ALIGNED": True},
            item_bytes=0,
            hot_bytes=4096 * (5 + has_moment),
            capped=True,
        )
        for has_moment in (True, False)
    ),
    Variant(
        _columns_kernel,
        {"table_ptr": "*i64", "bad_ptr": "*i32", "count": "i32", "span": "i32"},
        {"FROM": _PARTIALS.value, "TO": _OTHER_PARTIALS.value, "LEVEL": 0},
        item_bytes=0,
        hot_bytes=0,
    ),
    Variant(
        _vector_kernel,
        _STEP,
        {"HAS_GRADIENT": True, "HAS_MOMENT": True, "ALIGNED": True},
        item_bytes=0,
        threads=_LANE_THREADS,
        hot_bytes=0,
    ),
]
