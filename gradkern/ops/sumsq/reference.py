"""Reference of ``sumsq``: the fold tree written out in eager PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gradkern.ops._chunks import CHUNK, chunk_count, flat_view
from gradkern.ops._table import Operands

__all__ = ["fold_chunks", "padded_chunks", "sumsq"]

_GROUPS, _ROWS, _LANES = 8, 8, 64
_BATCH = 2048  # chunks folded at once: 64 MiB of fp64


def fold_chunks(squares: torch.Tensor) -> torch.Tensor:
    """Fold fp64 ``squares`` of shape ``(chunks, 4096)`` to sums of shape ``(chunks,)``, in the fixed order.

    Inside each of 8 groups, 8 rows of 64 are folded in halves to 64 sums; the 512 sums are folded in halves to one.
    """
    sums = squares.view(-1, _GROUPS, _ROWS, _LANES)
    for half in (4, 2, 1):
        sums = sums[:, :, :half] + sums[:, :, half : 2 * half]
    sums = sums.reshape(-1, _GROUPS * _LANES)
    half = sums.shape[1] // 2
    while half >= 1:
        sums = sums[:, :half] + sums[:, half : 2 * half]
        half //= 2
    return sums[:, 0]


def padded_chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The elements in memory order as blocks of shape ``(chunks, 4096)``, the last chunk padded with zeros."""
    flat = flat_view(tensor)
    for part in flat.split(_BATCH * CHUNK):
        chunks = part.new_zeros(chunk_count(part.numel()) * CHUNK)
        chunks[: part.numel()] = part
        yield chunks.view(-1, CHUNK)


def sumsq(operands: Operands, partials: torch.Tensor, *, column: str = "tensors") -> None:
    """Write the sum of squares of every chunk of the operand named ``column`` to ``partials``.

    Squares of fp32, bf16 and fp16 values are exact in fp64; each addition of the tree rounds once.
    """
    position = 0
    for tensor in operands[column]:
        if tensor.numel() == 0:
            continue
        for chunks in padded_chunks(tensor):
            wide = chunks.double()
            partials[position : position + len(chunks)] = fold_chunks(wide * wide)
            position += len(chunks)
