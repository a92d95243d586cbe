"""The ids of training samples, as people pass them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["sample_ids"]


def sample_ids(ids: Sequence[int] | Tensor, caller: str) -> Tensor:
    """Sample ids as a one-dimensional int64 tensor in host memory.

    Raises:
        TypeError: They are not integers.
        ValueError: There are none, or not in one dimension.
    """
    if isinstance(ids, Tensor):
        if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            raise TypeError(f"{caller}: ids must be integers, got a tensor of {ids.dtype}")
        numbers = ids.detach().to("cpu", torch.int64, copy=True)
    else:
        numbers = torch.tensor([operator.index(number) for number in ids], dtype=torch.int64)
    if numbers.dim() != 1 or numbers.numel() == 0:
        raise ValueError(
            f"{caller}: ids must be one-dimensional, one entry for each sample, and not empty, got shape "
            f"{tuple(numbers.shape)}"
        )
    return numbers
