"""Running operators on tensors without values, on the meta device, and noticing where values are asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["META", "NotSimulatedError", "needs_values", "tensors_in", "without_values"]

META = torch.device("meta")

_LIFT, _VALUE = torch.ops.aten.lift_fresh.default, torch.ops.aten._local_scalar_dense.default

# What torch says where a tensor without values is asked for some.
# "autocast": it knows no such device.
_NO_VALUES = "meta tensor", "meta device", "register_meta", "unallocated storage", "autocast", "unsupported scalartype"


class NotSimulatedError(Exception):
    """What runs cannot be simulated with tensors that have no values."""


def needs_values(error: Exception) -> bool:
    """Whether an error says that a tensor without values was asked for some."""
    return isinstance(error, NotSimulatedError) or any(text in str(error).lower() for text in _NO_VALUES)


def without_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with which everything stays on the meta device but numbers on their own.

    Raises:
        NotSimulatedError: The operator asks for values, or takes a tensor that has some and is not the model's:
            backward would leave gradients without values on it.
    """
    if func is _LIFT and args[0].dim() > 0 and args[0].device.type == "cpu":
        # Made from numbers in the model's own code.
        return (torch.empty_like(args[0], device=META),), kwargs
    for tensor in tensors_in((args, tuple(kwargs.values()))):
        if tensor.device.type == "cpu":
            if tensor.dim() > 0 or tensor.requires_grad:
                raise NotSimulatedError(f"{func} takes a tensor that is neither the model's nor the batch's")
        elif func is _VALUE:
            raise NotSimulatedError(f"{func} asks for a value")
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": META}
    return args, kwargs


def tensors_in(values: Any) -> list[Tensor]:
    """Tensors and lists of tensors among the arguments of an operator: it takes nothing deeper."""
    if isinstance(values, Tensor):
        return [values]
    if not isinstance(values, (tuple, list)):
        return []
    found = [value for value in values if isinstance(value, Tensor)]
    for value in values:
        if isinstance(value, (tuple, list)):
            found += tensors_in(value)
    return found
