"""Reference of ``abs_norm``: magnitudes in the fold tree of ``sumsq``, or the largest of them."""

from __future__ import annotations

import torch

from gradkern.ops._table import Operands
from gradkern.ops.sumsq.reference import fold_chunks, padded_chunks

__all__ = ["abs_norm"]


def abs_norm(operands: Operands, partials: torch.Tensor, *, maximum: bool) -> None:
    """Write the sum of magnitudes of every chunk of ``tensors``, or the ``maximum`` one, to ``partials``.

    Magnitudes are exact in fp64; each addition of the tree rounds once, a maximum not at all. NaN makes a chunk NaN.
    """
    position = 0
    for tensor in operands["tensors"]:
        if tensor.numel() == 0:
            continue
        for chunks in padded_chunks(tensor):
            wide = chunks.double().abs()
            partials[position : position + len(chunks)] = wide.amax(1) if maximum else fold_chunks(wide)
            position += len(chunks)
