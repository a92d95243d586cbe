"""Parameters that share memory: updated in one launch, they would race."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

__all__ = ["check_overlap"]


def check_overlap(owner: str, params: Sequence[torch.Tensor]) -> None:
    """Refuse parameters whose memory overlaps, their own or another's.

    Raises:
        ValueError: Two elements lie in one place.
    """
    spans: list[tuple[int, int, torch.Tensor]] = []
    for param in params:
        if param.layout != torch.strided or param.numel() == 0 or type(param) not in (torch.Tensor, torch.nn.Parameter):
            continue
        reach = sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True))
        if any(stride == 0 and size > 1 for size, stride in zip(param.shape, param.stride(), strict=True)):
            raise ValueError(
                f"{owner}: a parameter of shape {tuple(param.shape)} and stride {param.stride()} overlaps itself, "
                "expected memory of its own for every element; train a clone() of it"
            )
        if param.device.type != "meta":
            begin = param.data_ptr()
            spans.append((begin, begin + (reach + 1) * param.itemsize, param))
    spans.sort(key=lambda span: span[0])
    for (_, end, first), (begin, _, second) in pairwise(spans):
        if begin < end and first.is_contiguous() and second.is_contiguous() and first.device == second.device:
            raise ValueError(
                f"{owner}: parameters of shapes {tuple(first.shape)} and {tuple(second.shape)} share memory, expected "
                "memory of its own for each; give the optimizer the tensor that both are views of"
            )
