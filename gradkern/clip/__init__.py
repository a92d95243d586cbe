"""Gradient norms and clipping."""

from __future__ import annotations

from gradkern.clip.norms import clip_grad_norm_, get_total_norm

__all__ = ["clip_grad_norm_", "get_total_norm"]
