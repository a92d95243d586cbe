"""Hyper-parameters of a group as one fp64 block on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["HyperBlock"]


class HyperBlock:
    """Made anew only where a number changed; numbers that are tensors are copied at every step, without a host read."""

    __slots__ = ("_block", "_numbers")

    def __init__(self) -> None:
        self._numbers: list[float | None] = []
        self._block: torch.Tensor | None = None

    def refresh(self, values: Sequence[float | torch.Tensor], device: torch.device) -> torch.Tensor:
        """The block with these values, fp64 on ``device``."""
        numbers = [None if isinstance(value, torch.Tensor) else float(value) for value in values]
        block = self._block
        if block is None or numbers != self._numbers or block.device != device:
            block = torch.tensor([0.0 if number is None else number for number in numbers], dtype=torch.float64)
            if device.type != "cpu":
                block = block.pin_memory().to(device, non_blocking=True)
            self._block, self._numbers = block, numbers
        for i, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                block[i : i + 1].copy_(value.detach().reshape(1), non_blocking=True)
        return block
