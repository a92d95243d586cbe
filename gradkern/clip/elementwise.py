"""Policies that treat elements or units of a gradient by themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradkern import functional
from gradkern.clip.policy import ClipPolicy, Units
from gradkern.ops._chunks import kernel_can_read
from gradkern.ops._step.codecs import GradTransform

__all__ = ["AGC", "Value"]


class Value(ClipPolicy):
    """Cut every element of every gradient to ``[-clip_value, clip_value]``, like ``torch.nn.utils.clip_grad_value_``.

    Args:
        clip_value: Largest absolute value, at least 0.

    Raises:
        ValueError: ``clip_value`` is negative or NaN.
    """

    norm_type = None
    transform = GradTransform.LIMIT

    def __init__(self, clip_value: float) -> None:
        if not clip_value >= 0.0:
            raise ValueError(f"Value: clip_value must be at least 0, got {clip_value}")
        self.clip_value = float(clip_value)

    def __repr__(self) -> str:
        return f"Value({self.clip_value})"

    def limit(self) -> float:
        """The same for all."""
        return self.clip_value


class AGC(ClipPolicy):
    """Adaptive gradient clipping: no unit's gradient is longer than ``clipping`` times the unit.

    A unit is what one output of a layer owns: a row of the parameter, or all of it below two dimensions.
    ``g *= min(1, clipping * max(|w|, eps) / max(|g|, 1e-6))`` for every unit.

    Args:
        clipping: Largest ratio of gradient to parameter. Default 0.01.
        eps: Smallest length that a unit is taken to have, so that zeros can grow. Default 1e-3.

    Raises:
        ValueError: ``clipping`` or ``eps`` is negative or NaN.

    Note:
        Reads the gradients once for the norms of units, where other policies find theirs in what accumulation left
        behind, and the parameters once more.

    Source:
        Brock, De, Smith & Simonyan, arXiv 2102.06171, equation 3.
    """

    norm_type = None
    transform = GradTransform.UNITS

    def __init__(self, clipping: float = 0.01, eps: float = 1e-3) -> None:
        if not clipping >= 0.0 or not eps >= 0.0:
            raise ValueError(f"AGC: clipping and eps must be at least 0, got {clipping} and {eps}")
        self.clipping = float(clipping)
        self.eps = float(eps)

    def __repr__(self) -> str:
        return f"AGC({self.clipping}, eps={self.eps})"

    def units(
        self, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], scale: torch.Tensor | float
    ) -> Units:
        """Multipliers of every parameter's units: fp64 on the device, rounded once to fp32."""
        sizes = [_unit_size(p) for p in params]
        lengths = _unit_norms(params, sizes)
        grad_lengths = _unit_norms(grads, sizes) / scale
        largest = lengths.clamp(min=self.eps) * self.clipping
        multipliers = torch.where(grad_lengths < largest, 1.0, largest / grad_lengths.clamp(min=1e-6)).float()
        counts = [p.numel() // size for p, size in zip(params, sizes, strict=True)]
        return list(multipliers.split(counts)), sizes


def _unit_size(param: torch.Tensor) -> int:
    if param.dim() < 2 or param.numel() == 0:
        return max(1, param.numel())
    size = param.numel() // param.shape[0]
    if param.shape[0] > 1 and param.stride(0) != size:
        raise ValueError(
            f"AGC: the units of a parameter of shape {tuple(param.shape)} and stride {param.stride()} are not rows of "
            "memory, expected stride(0) == numel / shape[0]; make it contiguous"
        )
    return size


def _unit_norms(tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    """L2 norms of all units of all tensors, fp64, in order."""
    if all(map(kernel_can_read, tensors)) and len({t.dtype for t in tensors}) == 1 and all(t.numel() for t in tensors):
        return functional.sumsq_units(tensors, sizes).sqrt()
    return torch.cat([_norms_of(tensor, size) for tensor, size in zip(tensors, sizes, strict=True)])


def _norms_of(tensor: torch.Tensor, size: int) -> torch.Tensor:
    if tensor.numel() == 0:
        return torch.zeros(0, dtype=torch.float64, device=tensor.device)
    if kernel_can_read(tensor):
        return functional.sumsq_units([tensor], [size]).sqrt()
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    norms: torch.Tensor = torch.linalg.vector_norm(tensor.reshape(-1, size), dim=1, dtype=wide)
    return norms.double()
