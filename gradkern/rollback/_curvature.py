"""How much the loss of a sample bends along its own gradient: one number a visit, taken where the logits are.

Of a cross-entropy of logits ``z``, ``r = softmax(z) - e_y`` and ``H = diag(p) - p pᵀ`` say all that is needed: a
sample's gradient is ``g = Jᵀ r``, its Gauss-Newton matrix ``Jᵀ H J``, and of all multiples of ``g gᵀ`` the one that is
closest to that along ``r`` is ``w g gᵀ`` with

    w = rᵀ H r / ‖r‖⁴.

What backward hands over is ``s r``, with a scale that the reduction of the loss chose. It is found by comparison with
the logits; where the two do not belong together nothing is claimed. Of several rows (tokens) ``r`` and ``H`` are those
of all of them, one below the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["curvature_weights", "measure_bends"]

# What a gradient may differ from that of a cross-entropy: relative to it, and by the rounding of probabilities.
_MISFIT, _ROUNDING = 1e-3, 1e-6

# A residual of a row that is as good as fitted.
_FITTED = 1e-5


def measure_bends(logits: Tensor, grad: Tensor) -> Tensor:
    """What the rows of each sample add to ``rᵀ H r`` and to ``‖r‖²``, scales included.

    Args:
        logits: Shape ``(B, T, K)``, fp32.
        grad: Gradient of the loss, of the same shape.

    Returns:
        Shape ``(B, 2)``, fp64: ``Σ s³ rᵀ H r`` and ``Σ s² ‖r‖²``. NaN for a sample with a row whose gradient is not
        that of a cross-entropy with one right class.
    """
    p = torch.softmax(logits, dim=-1)
    r = p.scatter_add(-1, grad.argmin(dim=-1, keepdim=True), -torch.ones_like(p[..., :1]))
    squares = r.square().sum(-1)
    is_fitted = squares <= _FITTED**2
    s = torch.where(is_fitted, 0.0, (grad * r).sum(-1) / squares)
    misfit = torch.linalg.vector_norm(grad - s.unsqueeze(-1) * r, dim=-1)
    allowed = _MISFIT * torch.linalg.vector_norm(grad, dim=-1) + _ROUNDING * s.abs()
    pr = p * r
    along = (pr * r).sum(-1) - pr.sum(-1).square()
    s = torch.where(is_fitted | (misfit <= allowed), s, torch.nan).double()
    return torch.stack([(s**3 * along).sum(-1), (s**2 * squares).sum(-1)], dim=-1)


def curvature_weights(bends: Tensor) -> Tensor:
    """The weight ``w`` of every visit, fp32: that of its gradient as recorded, scales included.

    Args:
        bends: Shape ``(visits, 2)``: sums of what :func:`measure_bends` gave.
    """
    along, squares = bends.unbind(-1)
    return torch.where(squares == 0.0, 0.0, along / squares.square()).float()
