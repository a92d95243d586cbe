"""How much the loss of a sample bends along its own gradient: one number a visit, taken where the logits are.

Of a cross-entropy of logits ``z``, ``r = softmax(z) - e_y`` and ``H = diag(p) - p pᵀ`` say all that is needed: a
sample's gradient is ``g = Jᵀ r``, its Gauss-Newton matrix ``Jᵀ H J``, and of all multiples of ``g gᵀ`` the one that is
closest to that along ``r`` is ``w g gᵀ`` with

    w = rᵀ H r / ‖r‖⁴.

What backward hands over is ``s r``, with a scale that the reduction of the loss chose. Losses that are not a
cross-entropy of these logits, but for instance of a multiple of them or one with smoothed labels, hand over something
else, or a scale that changes from row to row with how well it is fitted. So the scale is found by comparison with the
logits, and one must do for all rows of a micro-batch. Of several rows (tokens) of a sample ``r`` and ``H`` are those of
all of them, one below the other.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gradkern.ops._registry import backend_for
from gradkern.rollback._lanes import dot, pairs_sum

__all__ = ["curvature_weights", "measure_bends"]

# What a gradient may differ from that of a cross-entropy: relative to it, and by the rounding of probabilities.
_MISFIT, _ROUNDING = 1e-2, 1e-5

# The least residual that a scale is read from.
_TELLS = 1e-3

# How near to twice or half of the scale of before, as gradient scalers change it, those of smaller residuals must be.
_FOLLOWS = 2e-2

# Elements of logits that are looked at together; a few copies of them exist meanwhile.
_CHUNK = 1 << 20


class _Rows(NamedTuple):
    """Of rows of logits, each of shape ``(B, T)``: ``g·r``, ``‖r‖²``, ``‖g‖²`` and ``rᵀ H r``."""

    inner: Tensor
    squares: Tensor
    grad_squares: Tensor
    along: Tensor


def measure_bends(
    logits: Tensor, grad: Tensor, *, scale: float | None, is_declared: bool
) -> tuple[Tensor, float | None]:
    """What the rows of each sample add to ``rᵀ H r`` and to ``‖r‖²``, scales included.

    Args:
        logits: Shape ``(B, T, K)``, fp32.
        grad: Gradient of the loss, of the same shape.
        scale: That of an earlier micro-batch, for one in which every row is fitted, where it may have become twice or
            half of that; None if there was none.
        is_declared: The loss is known to be a cross-entropy, whose rows may have weights of their own.

    Returns:
        Shape ``(B, 2)``, fp64: ``Σ s³ rᵀ H r`` and ``Σ s² ‖r‖²``, NaN for a sample with a row whose gradient is not
        that of a cross-entropy with one right class; and the scale.
    """
    if backend_for("record", logits.device) == "native":
        sums = torch.empty(len(logits), 2, dtype=torch.float64)
        known = math.nan if scale is None else scale
        found = torch.ops.gradkern._measure_bends_(
            logits.contiguous(), grad.contiguous(), len(logits), known, is_declared, sums
        )
        return sums, None if math.isnan(found) else found
    return _measure_by_torch(logits, grad, scale=scale, is_declared=is_declared)


def _measure_by_torch(
    logits: Tensor, grad: Tensor, *, scale: float | None, is_declared: bool
) -> tuple[Tensor, float | None]:
    size = max(1, _CHUNK // max(1, logits[:1].numel()))
    parts = [_rows(*pair) for pair in zip(logits.split(size), grad.split(size), strict=True)]
    rows = _Rows(*(torch.cat(column) for column in zip(*parts, strict=True)))
    own = rows.inner / rows.squares
    tells = (rows.squares >= _TELLS**2) & (rows.grad_squares > 0)
    is_fitted = rows.squares < _ROUNDING**2
    if is_declared:
        s = torch.where(is_fitted, 0.0, own)
    else:
        # Of two classes every gradient that sums to zero is a multiple of r: only a second row says whether it is ours.
        if int(tells.sum()) >= (2 if logits.shape[-1] == 2 else 1):
            scale = float(own[tells].median())
        elif scale is not None:
            scale = _follow(scale, own[~is_fitted & (rows.grad_squares > 0)])
        s = torch.full_like(own, torch.nan if scale is None else scale)
    s = torch.where(rows.grad_squares == 0, 0.0, s)
    # ‖g - s r‖², which rounding may make a little less than 0.
    misfit = (rows.grad_squares - 2 * s * rows.inner + s**2 * rows.squares).clamp(min=0).sqrt()
    fits = misfit <= _MISFIT * rows.grad_squares.sqrt() + _ROUNDING * s
    if is_declared:
        fits |= is_fitted
    s = torch.where(fits & (logits.shape[-1] > 1), s, torch.nan)
    sums = [pairs_sum(each.t()) for each in (s**3 * rows.along, s**2 * rows.squares)]
    return torch.stack(sums, dim=-1), scale


def _follow(scale: float, own: Tensor) -> float:
    """An earlier scale, or twice or half of it where rows that are nearly fitted have that."""
    if len(own) and scale != 0.0:
        ratio = float(own.median()) / scale
        for factor in (2.0, 0.5):
            if abs(ratio - factor) <= _FOLLOWS * factor:
                return scale * factor
    return scale


def _rows(logits: Tensor, grad: Tensor) -> _Rows:
    """One operation a rounding, in the order of ``csrc/cpu/bends-inl.h``."""
    largest = grad.abs().amax(dim=-1, keepdim=True)
    top = logits.amax(dim=-1, keepdim=True)
    exponentials = _exp_nonpositive(logits - top)
    p = exponentials / dot(exponentials, torch.ones_like(logits)).unsqueeze(-1)
    # The right class alone has a gradient below 0, or of exactly 0 where its probability has been rounded to 1.
    value = grad - (largest.clamp(min=torch.finfo(torch.float32).tiny) * 1e-6) * p
    numbers = torch.arange(logits.shape[-1], device=logits.device)
    is_least = value == value.amin(dim=-1, keepdim=True)
    right = torch.where(is_least, numbers, logits.shape[-1] - 1).amin(dim=-1, keepdim=True)
    r = torch.where(numbers == right, p - 1.0, p)
    g, wide, pr = grad.double(), r.double(), (r * p).double()
    mean = dot(pr, torch.ones_like(pr))
    sums = torch.stack([dot(g, wide), dot(wide, wide), dot(g, g), dot(pr, wide) - mean * mean])
    # A logit or a gradient that is not finite says nothing.
    is_finite = (torch.isfinite(largest) & torch.isfinite(top)).squeeze(-1)
    return _Rows(*torch.where(is_finite, sums, torch.nan))


def _exp_nonpositive(x: Tensor) -> Tensor:
    """``exp(x)`` for ``x <= 0`` by arithmetic alone, the same bits everywhere; 0 below the normal numbers."""
    clamped = x.clamp(min=-87.0)
    n = (clamped * 1.44269504).round()
    r = (clamped - n * 0.693359375) - n * -2.12194440e-4
    p = torch.full_like(x, 1.9841270e-4)
    for coefficient in (1.3888889e-3, 8.3333333e-3, 4.1666667e-2, 1.6666667e-1, 0.5, 1.0, 1.0):
        p = p * r + coefficient
    power = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(x < -87.0, 0.0, p * power)


def curvature_weights(bends: Tensor) -> Tensor:
    """The weight ``w`` of every visit, fp32: that of its gradient as recorded, scales included.

    Args:
        bends: Shape ``(visits, 2)``: sums of what :func:`measure_bends` gave.
    """
    along, squares = bends.unbind(-1)
    return torch.where(squares == 0.0, 0.0, along / squares.square()).float()
