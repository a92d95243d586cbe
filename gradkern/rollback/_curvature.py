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

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["curvature_weights", "measure_bends"]

# What a gradient may differ from that of a cross-entropy: relative to it, and by the rounding of probabilities.
_MISFIT, _ROUNDING = 1e-2, 1e-5

# The least residual that a scale is read from.
_TELLS = 1e-3

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
        scale: That of an earlier micro-batch, for one in which every row is fitted; None if there was none.
        is_declared: The loss is known to be a cross-entropy, whose rows may have weights of their own.

    Returns:
        Shape ``(B, 2)``, fp64: ``Σ s³ rᵀ H r`` and ``Σ s² ‖r‖²``, NaN for a sample with a row whose gradient is not
        that of a cross-entropy with one right class; and the scale.
    """
    size = max(1, _CHUNK // max(1, logits[:1].numel()))
    parts = [_rows(*pair) for pair in zip(logits.split(size), grad.split(size), strict=True)]
    rows = _Rows(*(torch.cat(column).double() for column in zip(*parts, strict=True)))
    own = rows.inner / rows.squares
    tells = (rows.squares >= _TELLS**2) & (rows.grad_squares > 0)
    is_fitted = rows.squares < _ROUNDING**2
    if is_declared:
        s = torch.where(is_fitted, 0.0, own)
    else:
        # Of two classes every gradient that sums to zero is a multiple of r: only a second row says whether it is ours.
        if int(tells.sum()) >= (2 if logits.shape[-1] == 2 else 1):
            scale = float(own[tells].median())
        s = torch.full_like(own, torch.nan if scale is None else scale)
    s = torch.where(rows.grad_squares == 0, 0.0, s)
    # ‖g - s r‖², which rounding may make a little less than 0.
    misfit = (rows.grad_squares - 2 * s * rows.inner + s**2 * rows.squares).clamp(min=0).sqrt()
    fits = misfit <= _MISFIT * rows.grad_squares.sqrt() + _ROUNDING * s
    if is_declared:
        fits |= is_fitted
    s = torch.where(fits & (logits.shape[-1] > 1), s, torch.nan)
    return torch.stack([(s**3 * rows.along).sum(-1), (s**2 * rows.squares).sum(-1)], dim=-1), scale


def _rows(logits: Tensor, grad: Tensor) -> _Rows:
    p = torch.softmax(logits, dim=-1)
    # The right class alone has a gradient below 0, or of exactly 0 where its probability has been rounded to 1.
    tie_break = 1e-6 * grad.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    right = (grad - tie_break * p).argmin(dim=-1, keepdim=True)
    r = p.scatter_add(-1, right, -torch.ones_like(p[..., :1]))
    pr = p * r
    return _Rows((grad * r).sum(-1), r.square().sum(-1), grad.square().sum(-1), (pr * r).sum(-1) - pr.sum(-1).square())


def curvature_weights(bends: Tensor) -> Tensor:
    """The weight ``w`` of every visit, fp32: that of its gradient as recorded, scales included.

    Args:
        bends: Shape ``(visits, 2)``: sums of what :func:`measure_bends` gave.
    """
    along, squares = bends.unbind(-1)
    return torch.where(squares == 0.0, 0.0, along / squares.square()).float()
