"""JSON as a tensor: what a file of tensors has to say beside them."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

__all__ = ["from_tensor", "to_tensor"]


def to_tensor(value: Any) -> Tensor:
    """UTF-8 of JSON, uint8."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def from_tensor(tensor: Tensor) -> Any:
    """Undo :func:`to_tensor`.

    Raises:
        ValueError: It is no JSON.
    """
    return json.loads(tensor.numpy().tobytes())
