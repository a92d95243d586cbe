"""The records of all matrices of a backward pass in one block of bytes.

A small model has its factors reduced faster than Python can hold ten tensors a layer. So one call of the native library
writes the records of all layers that wait into one block, and the block is taken apart when its segment is built,
together with those of the other steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from gradkern.rollback._records import MatrixRecord, Record, VectorRecord

__all__ = ["Block", "Packing", "Shape", "packing_of", "unpack"]


class Shape(NamedTuple):
    """What the record of one matrix depends on.

    Attributes:
        stream: Of the matrix.
        bias_stream: Of the bias whose gradient is the sum of the left factor's rows; -1 where there is none.
        tokens: Rows of each sample's factors.
        rank: Most directions that are kept.
        height: Columns of the left factor.
        width: Columns of the right factor.
    """

    stream: int
    bias_stream: int
    tokens: int
    rank: int
    height: int
    width: int


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """Where in a block the fields of records are.

    Attributes:
        samples: Visits of each record.
        shapes: Of the matrices.
        offsets: Six of each, in bytes: left scale, right scale, scale of the bias, left codes, right codes, codes of
            the bias; -1 for those of a bias that is the left factor, or where there is none.
        nbytes: Bytes of a block.
        record_bytes: Bytes of the records taken apart, for counting alike what is packed and what is not.
    """

    samples: int
    shapes: tuple[Shape, ...]
    offsets: tuple[int, ...]
    nbytes: int
    record_bytes: int

    @property
    def repeats(self) -> bool:
        """Whether a stream comes twice: a layer that was called twice."""
        return len({shape.stream for shape in self.shapes}) < len(self.shapes)


class Block(NamedTuple):
    """The records of one backward pass.

    Attributes:
        packing: How it is to be read.
        visit: Of its visits, as in :class:`~gradkern.rollback._records.Record`.
        content: uint8, in host memory.
    """

    packing: Packing
    visit: Tensor
    content: Tensor


@lru_cache(maxsize=256)
def packing_of(samples: int, shapes: tuple[Shape, ...]) -> Packing:
    """How the records of these matrices lie in a block: fp32 scales first, which keeps them aligned."""
    scales, codes, record_bytes = 0, 0, 0
    sizes: list[tuple[int, int, int]] = []
    for shape in shapes:
        kept = min(shape.tokens, shape.rank)
        own_bias = shape.height if _has_own_bias(shape) else 0
        sizes.append((kept, own_bias, 4 * samples * (2 * kept + (1 if own_bias else 0))))
        scales += sizes[-1][2]
        record_bytes += samples * (4 + kept * (8 + shape.height + shape.width))
        record_bytes += samples * (8 + shape.height) if shape.bias_stream >= 0 else 0
    offsets: list[int] = []
    at, codes = 0, scales
    for shape, (kept, own_bias, scale_bytes) in zip(shapes, sizes, strict=True):
        left, right = codes, codes + samples * kept * shape.height
        end = right + samples * kept * shape.width
        bias = (at + 8 * samples * kept, end) if own_bias else (-1, -1)
        offsets += (at, at + 4 * samples * kept, bias[0], left, right, bias[1])
        at, codes = at + scale_bytes, end + samples * own_bias
    return Packing(samples, shapes, tuple(offsets), codes, record_bytes)


def _has_own_bias(shape: Shape) -> bool:
    """Whether the gradient of the bias is another than the left factor."""
    return shape.bias_stream >= 0 and shape.tokens > 1


def unpack(blocks: Sequence[Block]) -> list[tuple[int, Record]]:
    """The records of blocks of one packing, in the order of its shapes: of all blocks in one.

    A stream that the packing has twice comes twice; blocks of such are to be taken apart one by one, or visits would
    not ascend from step to step.
    """
    packing = blocks[0].packing
    content = torch.stack([block.content for block in blocks])
    visit = torch.cat([block.visit for block in blocks])
    entries = len(visit)

    def field(offset: int, *shape: int, is_scale: bool) -> Tensor:
        dtype = torch.float32 if is_scale else torch.int8
        nbytes = packing.samples * dtype.itemsize
        for size in shape:
            nbytes *= size
        return content[:, offset : offset + nbytes].flatten().view(dtype).reshape(entries, *shape)

    records: list[tuple[int, Record]] = []
    for at, shape in enumerate(packing.shapes):
        left_scale, right_scale, bias_scale, left, right, bias = packing.offsets[6 * at : 6 * at + 6]
        kept = min(shape.tokens, shape.rank)
        matrix = MatrixRecord(
            visit,
            field(left, kept, shape.height, is_scale=False),
            field(left_scale, kept, is_scale=True),
            field(right, kept, shape.width, is_scale=False),
            field(right_scale, kept, is_scale=True),
        )
        records.append((shape.stream, matrix))
        if _has_own_bias(shape):
            codes, scale = field(bias, shape.height, is_scale=False), field(bias_scale, is_scale=True)
            records.append((shape.bias_stream, VectorRecord(visit, codes, scale)))
        elif shape.bias_stream >= 0:
            vector = VectorRecord(visit, matrix.left.squeeze(1), matrix.left_scale.squeeze(1))
            records.append((shape.bias_stream, vector))
    return records
