"""What the ledger keeps of per-sample gradients: three compressed forms of one parameter's gradients.

Each form holds the gradients of many visits (a visit is one row of one micro-batch) and can be joined with
more, written to and read from named tensors, and multiplied with a weight of the parameter's shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import ClassVar

import torch

from gradkern.rollback._reduce import dequantize_rows

__all__ = [
    "RECORD_TYPES",
    "EmbeddingRecord",
    "MatrixRecord",
    "Record",
    "VectorRecord",
    "add_outer",
    "times_weights",
]


@dataclass(frozen=True, slots=True)
class Record:
    """Compressed gradients of one stream.

    Attributes:
        visit: Shape ``(n,)``, int32: which visit each entry belongs to; grouped by step, ascending from step to step.
    """

    kind: ClassVar[str]

    visit: torch.Tensor

    def inner(self, weights: torch.Tensor) -> torch.Tensor:
        """Inner product of every entry's gradient with each of ``weights``, shape ``(m, *parameter)``: ``(m, n)``."""
        raise NotImplementedError

    def add_to(self, sums: torch.Tensor, coefficients: torch.Tensor) -> None:
        """Add all gradients, times ``coefficients`` of shape ``(m, n)``, to ``sums`` of shape ``(m, *parameter)``."""
        raise NotImplementedError

    def gradients(self) -> torch.Tensor:
        """Every entry's gradient, fp32, one row for each: of a matrix as one, of an embedding only the rows it used."""
        raise NotImplementedError

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields by name."""
        return {name: getattr(self, name) for name in _names(self.kind)}

    def stored(self) -> dict[str, torch.Tensor]:
        """What a file holds of it, by name."""
        return self.tensors()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Record:
        """Build from what :meth:`tensors` gave."""
        return cls(**tensors)

    @classmethod
    def join(cls, parts: Sequence[Record]) -> Record:
        """Concatenate along visits; shorter ranks and row lists are padded with zeros, which add nothing."""
        columns = [part.tensors() for part in parts]
        return cls(**{name: _concatenate([column[name] for column in columns]) for name in columns[0]})

    def between(self, first_visit: int, end_visit: int) -> Record:
        """The entries with ``first_visit <= visit < end_visit``, as views."""
        bounds = torch.tensor([first_visit, end_visit], dtype=self.visit.dtype)
        low, high = torch.searchsorted(self.visit, bounds).tolist()
        return type(self)(**{name: tensor[low:high] for name, tensor in self.tensors().items()})

    def take(self, entries: torch.Tensor | slice) -> Record:
        """Some entries: their numbers, a mask, or a slice."""
        return type(self)(**{name: tensor[entries] for name, tensor in self.tensors().items()})

    def narrowed(self) -> Record:
        """Without columns that are padding in all entries, where that shows."""
        return self

    def cpu(self) -> Record:
        """The same record in host memory; itself if it is there."""
        if all(tensor.device.type == "cpu" for tensor in self.tensors().values()):
            return self
        return type(self)(**{name: tensor.cpu() for name, tensor in self.tensors().items()})

    def scales(self) -> list[torch.Tensor]:
        """The fp32 scales, first dimension visits: where a non-finite gradient shows."""
        return [tensor for tensor in self.tensors().values() if tensor.is_floating_point()]

    def nbytes(self) -> int:
        """Bytes of all fields."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


@dataclass(frozen=True, slots=True)
class MatrixRecord(Record):
    """Gradients of a matrix as ``leftᵀ @ right``; of a convolution's weight all but the first dimension count as one.

    Attributes:
        left: Shape ``(n, r, rows)``, int8 codes.
        left_scale: Shape ``(n, r)``, fp32.
        right: Shape ``(n, r, columns)``, int8 codes.
        right_scale: Shape ``(n, r)``, fp32.
    """

    kind: ClassVar[str] = "matrix"

    left: torch.Tensor
    left_scale: torch.Tensor
    right: torch.Tensor
    right_scale: torch.Tensor

    def inner(self, weights: torch.Tensor) -> torch.Tensor:
        """See :meth:`Record.inner`."""
        left, right = self._rows()
        found = (times_weights(right, weights) * left.unsqueeze(1)).sum(dim=2).t()
        return found.reshape(len(weights), *self.left_scale.shape).sum(dim=-1)

    def add_to(self, sums: torch.Tensor, coefficients: torch.Tensor) -> None:
        """See :meth:`Record.add_to`."""
        left, right = self._rows()
        own = coefficients.repeat_interleave(self.left.shape[1], dim=1).t().contiguous()
        add_outer(sums, own.unsqueeze(2) * left.unsqueeze(1), right)

    def gradients(self) -> torch.Tensor:
        """Shape ``(n, rows, columns)``."""
        return _product(self.left, self.left_scale, self.right, self.right_scale)

    def _rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both factors, one row for each direction of each entry."""
        left, right = dequantize_rows(self.left, self.left_scale), dequantize_rows(self.right, self.right_scale)
        return left.flatten(0, 1), right.flatten(0, 1)


@dataclass(frozen=True, slots=True)
class EmbeddingRecord(Record):
    """Gradients of an embedding: few rows of it per visit, together ``leftᵀ @ right``.

    Attributes:
        index: Shape ``(n, u)``, int32: the rows of the embedding that a visit used. Padding is row 0 with
            zeros in ``left``.
        left: Shape ``(n, r, u)``, int8 codes.
        left_scale: Shape ``(n, r)``, fp32.
        right: Shape ``(n, r, columns)``, int8 codes.
        right_scale: Shape ``(n, r)``, fp32.
    """

    kind: ClassVar[str] = "embedding"

    index: torch.Tensor
    left: torch.Tensor
    left_scale: torch.Tensor
    right: torch.Tensor
    right_scale: torch.Tensor

    def narrowed(self) -> Record:
        """See :meth:`Record.narrowed`: rows ascend, so that only the first can be row 0 without being padding."""
        used = 1 + int(self.index.any(dim=0).nonzero().max()) if bool(self.index.any()) else 1
        return replace(self, index=self.index[:, :used], left=self.left[..., :used])

    def inner(self, weights: torch.Tensor) -> torch.Tensor:
        """See :meth:`Record.inner`."""
        left, right = dequantize_rows(self.left, self.left_scale), dequantize_rows(self.right, self.right_scale)
        # One after the other: the rows of all would be as large as several embeddings.
        return torch.stack([((left @ weight[self.index]) * right).sum(dim=(1, 2)) for weight in weights])

    def add_to(self, sums: torch.Tensor, coefficients: torch.Tensor) -> None:
        """See :meth:`Record.add_to`."""
        rows = self.gradients()
        for each, scale in zip(sums, coefficients, strict=True):
            each.index_add_(0, self.index.flatten(), (rows * scale[:, None, None]).flatten(0, 1))

    def gradients(self) -> torch.Tensor:
        """Shape ``(n, u, columns)``: of the rows in ``index``."""
        return _product(self.left, self.left_scale, self.right, self.right_scale)


@dataclass(frozen=True, slots=True)
class VectorRecord(Record):
    """Gradients of a bias or a norm's weight, element by element.

    Attributes:
        value: Shape ``(n, numel)``, int8 codes.
        scale: Shape ``(n,)``, fp32.
    """

    kind: ClassVar[str] = "vector"

    value: torch.Tensor
    scale: torch.Tensor

    def inner(self, weights: torch.Tensor) -> torch.Tensor:
        """See :meth:`Record.inner`."""
        return (weights.flatten(1) @ self.value.float().t()) * self.scale

    def add_to(self, sums: torch.Tensor, coefficients: torch.Tensor) -> None:
        """See :meth:`Record.add_to`."""
        sums.view(len(sums), -1).addmm_(coefficients * self.scale, self.value.float())

    def gradients(self) -> torch.Tensor:
        """Shape ``(n, numel)``."""
        return dequantize_rows(self.value, self.scale)


RECORD_TYPES: Mapping[str, type[Record]] = {
    record.kind: record for record in (MatrixRecord, EmbeddingRecord, VectorRecord)
}


def times_weights(right: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows of shape ``(n, columns)`` times many matrices, ``(m, rows, ...)``, as one product: ``(n, m, rows)``."""
    return torch.nn.functional.linear(right, weights.flatten(2).flatten(0, 1)).view(len(right), *weights.shape[:2])


def add_outer(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add to ``sums``, ``(m, rows, ...)``, the outer products of ``left``, ``(n, m, rows)``, with rows of ``right``."""
    sums.view(sums.shape[0] * sums.shape[1], -1).addmm_(left.flatten(1).t(), right)


def _product(
    left: torch.Tensor, left_scale: torch.Tensor, right: torch.Tensor, right_scale: torch.Tensor
) -> torch.Tensor:
    """``leftᵀ @ right`` of every entry."""
    return dequantize_rows(left, left_scale).transpose(1, 2) @ dequantize_rows(right, right_scale)


@cache
def _names(kind: str) -> tuple[str, ...]:
    return tuple(field.name for field in fields(RECORD_TYPES[kind]))


def _concatenate(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate along dimension 0, padding every other dimension with zeros to the longest."""
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(list(tensors))
    longest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    joined = tensors[0].new_zeros((sum(tensor.shape[0] for tensor in tensors), *longest))
    start = 0
    for tensor in tensors:
        end = start + tensor.shape[0]
        corner = (slice(start, end), *(slice(size) for size in tensor.shape[1:]))
        joined[corner] = tensor
        start = end
    return joined
