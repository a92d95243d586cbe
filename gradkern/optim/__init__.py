"""Optimizers that clip and update in one pass over memory."""

from __future__ import annotations

from gradkern.optim.adamw import AdamW

__all__ = ["AdamW"]
