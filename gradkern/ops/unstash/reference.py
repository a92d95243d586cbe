"""Reference of ``unstash_``: codes widened to fp32, multiplied, rounded once."""

from __future__ import annotations

import torch

from gradkern.ops._chunks import flat_view
from gradkern.ops._step.codecs import StateCodec, decode_state
from gradkern.ops._table import Operands

__all__ = ["unstash_"]


def unstash_(operands: Operands, multiplier: torch.Tensor) -> None:
    """``grads`` from their ``codes`` and ``exponents``, times ``multiplier``."""
    columns = (operands[name] for name in ("grads", "codes", "exponents"))
    for grad, codes, exponents in zip(*columns, strict=True):
        values = decode_state(StateCodec.BLOCK8, flat_view(codes), exponents, signed=True)
        flat_view(grad).copy_(values * multiplier)
