"""How much of a sample's gradient the compressed record holds, measured without forming the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradkern.rollback._records import EmbeddingRecord, MatrixRecord, VectorRecord
from gradkern.rollback._reduce import dequantize_rows

__all__ = ["Fidelity", "embedding_fidelity", "matrix_fidelity", "vector_fidelity"]


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


def matrix_fidelity(rows: torch.Tensor, columns: torch.Tensor, record: MatrixRecord) -> Fidelity:
    """Compare one sample's ``rowsᵀ @ columns``, shapes ``(T, K)`` and ``(T, D)``, with the first entry."""
    left = dequantize_rows(record.left[0], record.left_scale[0])
    right = dequantize_rows(record.right[0], record.right_scale[0])
    return Fidelity(
        exact_sq=float(((rows @ rows.t()) * (columns @ columns.t())).sum()),
        inner=float(((left @ rows.t()) * (right @ columns.t())).sum()),
        record_sq=float(((left @ left.t()) * (right @ right.t())).sum()),
    )


def embedding_fidelity(merged: torch.Tensor, record: EmbeddingRecord) -> Fidelity:
    """Compare the gradients of one sample's rows, shape ``(u, columns)``, with the record's first entry."""
    left = dequantize_rows(record.left[0], record.left_scale[0])
    right = dequantize_rows(record.right[0], record.right_scale[0])
    return Fidelity(
        exact_sq=float(merged.square().sum()),
        inner=float(((left @ merged) * right).sum()),
        record_sq=float(((left @ left.t()) * (right @ right.t())).sum()),
    )


def vector_fidelity(gradient: torch.Tensor, record: VectorRecord) -> Fidelity:
    """Compare one sample's gradient, shape ``(numel,)``, with the record's first entry."""
    recorded = dequantize_rows(record.value[0], record.scale[0])
    return Fidelity(
        exact_sq=float(gradient.square().sum()),
        inner=float(gradient @ recorded),
        record_sq=float(recorded.square().sum()),
    )
