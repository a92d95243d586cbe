"""Values that kernels get wrong first."""

from __future__ import annotations

import torch

__all__ = ["SIZES", "edge_values", "random_values"]

SIZES = (1, 5, 0, 16, 63, 64, 511, 512, 513, 4095, 4096, 4097, 9001)
"""Element counts around the lane, row, group and chunk of the kernels, an empty tensor among them."""


def random_values(numel: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal values, shape ``(numel,)``, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=generator).to(dtype)


def edge_values(numel: int, dtype: torch.dtype, *, finite: bool = False) -> torch.Tensor:
    """Normal values with signed zeros, subnormals and the largest numbers in between; unless finite, inf and NaN.

    Non-finite values stand only behind element 600, so that short tensors and first rows stay finite.
    """
    values = random_values(numel, dtype, seed=numel)
    info = torch.finfo(dtype)
    edges = [
        0.0,
        -0.0,
        info.tiny,
        -info.tiny / 2,
        info.smallest_normal / 4,
        info.eps,
        info.max,
        info.min,
        1.0,
    ]
    for i, edge in enumerate(edges):
        values[i * 7 : i * 7 + 1] = edge
    if not finite:
        for i, edge in enumerate((float("inf"), float("-inf"), float("nan"))):
            values[600 + i * 700 : 601 + i * 700] = edge
    return values
