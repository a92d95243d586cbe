"""The records of all matrices of a backward pass in one block of bytes.

A small model has its factors reduced faster than Python can hold ten tensors a layer. So one call of the native library
writes the records of all layers that wait into one block, and the block is taken apart when its segment is built,
together with those of the other steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
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
            the bias; the last of three of them are not used where the bias is the left factor or there is none.
        nbytes: Bytes of a block.
    """

    samples: int
    shapes: tuple[Shape, ...]
    offsets: tuple[int, ...]
    nbytes: int


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


@cache
def packing_of(samples: int, shapes: tuple[Shape, ...]) -> Packing:
    """How the records of these matrices lie in a block: fp32 scales first, which keeps them aligned."""
    offsets: list[list[int]] = []
    end = 0
    for shape in shapes:
        kept = min(shape.tokens, shape.rank)
        offsets.append([end, end + 4 * samples * kept, end + 8 * samples * kept])
        end += 8 * samples * kept + (4 * samples if _has_own_bias(shape) else 0)
    for each, shape in zip(offsets, shapes, strict=True):
        kept = min(shape.tokens, shape.rank)
        each += [end, end + samples * kept * shape.height, end + samples * kept * (shape.height + shape.width)]
        end = each[-1] + (samples * shape.height if _has_own_bias(shape) else 0)
    return Packing(samples, shapes, tuple(offset for each in offsets for offset in each), end)


def _has_own_bias(shape: Shape) -> bool:
    """Whether the gradient of the bias is another than the left factor."""
    return shape.bias_stream >= 0 and shape.tokens > 1


def unpack(blocks: Sequence[Block]) -> list[tuple[int, Record]]:
    """The records of blocks of one packing, those of a stream in one record."""
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
