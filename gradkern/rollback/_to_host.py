"""Copies from a GPU to host memory that wait once, not once a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_host"]


def to_host(*tensors: Tensor) -> list[Tensor]:
    """The tensors in host memory, those that are there as they are.

    Synchronises with the current stream if any of them was elsewhere. The copies of a GPU are in pinned memory.
    """
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
        torch.accelerator.current_stream(device).synchronize()
    return copies
