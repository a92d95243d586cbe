"""Optimizers that clip and update in one pass over memory."""

from __future__ import annotations

from gradkern.optim._engine import EngineOptions
from gradkern.optim.adam import Adam, AdamW
from gradkern.optim.lion import Lion
from gradkern.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "EngineOptions", "Lion"]
