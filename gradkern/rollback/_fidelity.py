"""How much of a sample's gradient the compressed record holds, measured without forming the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradkern.rollback._records import EmbeddingRecord, MatrixRecord, Record, VectorRecord
from gradkern.rollback._reduce import dequantize_rows

__all__ = ["Comparison", "Fidelity"]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """One comparison of a gradient ``G`` with its record ``R``.

    Attributes:
        exact_sq: ``‖G‖²``.
        inner: ``⟨G, R⟩``.
        record_sq: ``‖R‖²``.
    """

    exact_sq: float
    inner: float
    record_sq: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """A sample's gradient as it was, kept until there is time to compare it with its record.

    Attributes:
        record: Its entries, which add up; there may be none.
        exact: Of a matrix its two factors, shapes ``(T, K)`` and ``(T, D)``; of an embedding the gradients of its
            rows, shape ``(u, columns)``; of a vector rows that add up to it, shape ``(T, K)``. Copies in host memory.
    """

    record: Record
    exact: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, record: Record, *batches: torch.Tensor) -> Comparison:
        """Of the first sample of each of ``batches``, shape ``(B, ...)``."""
        return cls(record.take(slice(1)), tuple(batch[0].detach().to("cpu", copy=True) for batch in batches))

    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(tensor.nbytes for tensor in self.exact)

    def measure(self) -> Fidelity:
        """Compare, in host memory."""
        record, exact = self.record.cpu(), self.exact
        if isinstance(record, VectorRecord):
            gradient, recorded = exact[0].sum(dim=0), record.gradients().sum(dim=0)
            products = gradient @ gradient, gradient @ recorded, recorded @ recorded
            return Fidelity(*(float(product) for product in products))
        if not isinstance(record, (MatrixRecord, EmbeddingRecord)):
            raise TypeError(f"records of {type(record).__name__} are compared nowhere")
        left = dequantize_rows(record.left, record.left_scale).flatten(0, 1)
        right = dequantize_rows(record.right, record.right_scale).flatten(0, 1)
        record_sq = float(((left @ left.t()) * (right @ right.t())).sum())
        if len(exact) == 1:
            inner = ((left[:, : len(exact[0])] @ exact[0]) * right).sum()  # the rest is padding
            return Fidelity(float(exact[0].square().sum()), float(inner), record_sq)
        rows, columns = exact
        return Fidelity(
            exact_sq=float(((rows @ rows.t()) * (columns @ columns.t())).sum()),
            inner=float(((left @ rows.t()) * (right @ columns.t())).sum()),
            record_sq=record_sq,
        )
