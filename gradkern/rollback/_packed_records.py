"""Records of single directions, with codes of 4 or 8 bits: what a ledger with a budget of bytes keeps.

In memory they are records like all others, one entry for each direction of each visit; the classes here only know how
such a record lies in a file. Codes of a narrow entry are from -7 to 7 and lie two in a byte; of an embedding only the
rows whose code is not 0 are there, so that no visit pays for the rows that another used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkern.rollback._records import RECORD_TYPES, EmbeddingRecord, MatrixRecord, Record, VectorRecord

__all__ = [
    "NARROW",
    "PackedEmbedding",
    "PackedMatrix",
    "PackedVector",
    "embedding_bytes",
    "matrix_bytes",
    "read_record",
    "vector_bytes",
]

# The largest code of 4 bits.
NARROW = 7

# Of an entry: the visit, the scale, and whether its codes are narrow.
_ENTRY_BYTES = 4 + 4 + 1


def matrix_bytes(rows: int, columns: int, *, is_narrow: bool) -> int:
    """Bytes in a file of one direction of a matrix."""
    return _ENTRY_BYTES + _code_bytes(rows, is_narrow) + _code_bytes(columns, is_narrow)


def vector_bytes(numel: int, *, is_narrow: bool) -> int:
    """Bytes in a file of the gradient of a vector."""
    return _ENTRY_BYTES + _code_bytes(numel, is_narrow)


def embedding_bytes(used: Tensor, columns: int, *, is_narrow: bool) -> Tensor:
    """Bytes in a file of directions of an embedding that have ``used`` rows: how many, and index and code of each."""
    return _ENTRY_BYTES + 4 + 5 * used + _code_bytes(columns, is_narrow)


def _code_bytes(codes: int, is_narrow: bool) -> int:
    return (codes + 1) // 2 if is_narrow else codes


@dataclass(frozen=True, slots=True)
class PackedMatrix(MatrixRecord):
    """A :class:`MatrixRecord` of entries of one direction each, with a scale of 1 on the right."""

    def stored(self) -> dict[str, Tensor]:
        """See :meth:`Record.stored`."""
        codes = torch.maximum(_largest(self.left), _largest(self.right))
        narrow = codes <= NARROW
        return {
            "visit": self.visit,
            "scale": self.left_scale[:, 0],
            "is_narrow": narrow.to(torch.uint8),
            **_split("left", self.left[:, 0], narrow),
            **_split("right", self.right[:, 0], narrow),
        }

    @classmethod
    def from_stored(cls, stored: Mapping[str, Tensor]) -> Record:
        """Read what :meth:`stored` gave."""
        narrow = stored["is_narrow"].bool()
        scale = stored["scale"].unsqueeze(1)
        left, right = _merge("left", stored, narrow), _merge("right", stored, narrow)
        return cls(stored["visit"], left.unsqueeze(1), scale, right.unsqueeze(1), torch.ones_like(scale))


@dataclass(frozen=True, slots=True)
class PackedEmbedding(EmbeddingRecord):
    """An :class:`EmbeddingRecord` of entries of one direction each, with a scale of 1 on the right."""

    def stored(self) -> dict[str, Tensor]:
        """See :meth:`Record.stored`."""
        narrow = _largest(self.right) <= NARROW
        is_used = self.left[:, 0] != 0
        return {
            "visit": self.visit,
            "scale": self.left_scale[:, 0],
            "is_narrow": narrow.to(torch.uint8),
            "used": is_used.sum(dim=1, dtype=torch.int32),
            "index": self.index[is_used],
            "left": self.left[:, 0][is_used],
            **_split("right", self.right[:, 0], narrow),
        }

    @classmethod
    def from_stored(cls, stored: Mapping[str, Tensor]) -> Record:
        """Read what :meth:`stored` gave."""
        narrow = stored["is_narrow"].bool()
        scale, used = stored["scale"].unsqueeze(1), stored["used"]
        is_used = torch.arange(int(used.max()) if len(used) else 0) < used.unsqueeze(1)
        index = torch.zeros(is_used.shape, dtype=torch.int32).masked_scatter_(is_used, stored["index"])
        left = torch.zeros(is_used.shape, dtype=torch.int8).masked_scatter_(is_used, stored["left"])
        right = _merge("right", stored, narrow)
        return cls(stored["visit"], index, left.unsqueeze(1), scale, right.unsqueeze(1), torch.ones_like(scale))


@dataclass(frozen=True, slots=True)
class PackedVector(VectorRecord):
    """A :class:`VectorRecord`."""

    def stored(self) -> dict[str, Tensor]:
        """See :meth:`Record.stored`."""
        narrow = _largest(self.value) <= NARROW
        return {
            "visit": self.visit,
            "scale": self.scale,
            "is_narrow": narrow.to(torch.uint8),
            **_split("value", self.value, narrow),
        }

    @classmethod
    def from_stored(cls, stored: Mapping[str, Tensor]) -> Record:
        """Read what :meth:`stored` gave."""
        narrow = stored["is_narrow"].bool()
        return cls(stored["visit"], _merge("value", stored, narrow), stored["scale"])


_READERS: Mapping[str, Callable[[Mapping[str, Tensor]], Record]] = {
    each.kind: each.from_stored for each in (PackedMatrix, PackedEmbedding, PackedVector)
}


def read_record(kind: str, stored: Mapping[str, Tensor]) -> Record:
    """Read what ``stored`` of a record of any class gave, packed or not."""
    return _READERS[kind](stored) if "is_narrow" in stored else RECORD_TYPES[kind].from_tensors(stored)


def _largest(codes: Tensor) -> Tensor:
    """Magnitude of the largest code of every entry."""
    return codes.flatten(1).abs().amax(dim=1)


def _split(name: str, codes: Tensor, narrow: Tensor) -> dict[str, Tensor]:
    """Codes of shape ``(n, width)`` in two parts: of narrow entries two in a byte, the first in the lower half."""
    few = codes[narrow]
    if few.shape[1] % 2:
        few = torch.nn.functional.pad(few, (0, 1))
    halves = (few.to(torch.int16) & 15).to(torch.uint8).unflatten(1, (-1, 2))
    return {f"{name}_4": halves[..., 0] | (halves[..., 1] << 4), f"{name}_8": codes[~narrow]}


def _merge(name: str, stored: Mapping[str, Tensor], narrow: Tensor) -> Tensor:
    """Undo :func:`_split`."""
    packed, wide = stored[f"{name}_4"], stored[f"{name}_8"]
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, : wide.shape[1]].to(torch.int8)
    codes = wide.new_empty(len(narrow), wide.shape[1])
    codes[~narrow] = wide
    codes[narrow] = torch.where(halves > NARROW, halves - 16, halves)
    return codes
