"""Whether tensors are of the kind that they were, asked once for thousands of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._C._dynamo.guards import TensorGuards

__all__ = ["Kinds"]


class Kinds:
    """Remembers the type, dtype, device, shape and strides of tensors, not the tensors.

    Asked tensor by tensor from Python, that takes longer than the update of a small one. What ``torch.compile`` guards
    its graphs with answers for a whole list in one call.
    """

    __slots__ = ("_count", "_guards")

    def __init__(self) -> None:
        self._guards: TensorGuards | None = None
        self._count = 0

    def are_those_of(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether each is of the kind of its predecessor; False also where only dispatch differs, as under autocast."""
        return self._guards is not None and len(tensors) == self._count and self._guards.check(*tensors)

    def remember(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take these as they are; nothing is remembered where one has no strides, nor while a compiler traces."""
        self._guards = None
        if torch.compiler.is_compiling() or not all(t.layout == torch.strided for t in tensors):
            return
        shapes: list[Any] = [list(t.shape) for t in tensors]
        strides: list[Any] = [list(t.stride()) for t in tensors]
        self._guards = TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)
        self._count = len(tensors)
