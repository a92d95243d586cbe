"""Reference of ``accumulate_``: one fp32 addition per element, then the partials of the result."""

from __future__ import annotations

import torch

from gradkern.ops._chunks import flat_view
from gradkern.ops._table import Operands
from gradkern.ops.sumsq import reference as sumsq_reference

__all__ = ["accumulate_"]


def accumulate_(operands: Operands, partials: torch.Tensor | None, *, overwrite: bool) -> None:
    """``main_grads = grads`` or ``main_grads += grads``; ``partials`` of the new ``main_grads`` if wanted.

    Gradients are widened to fp32 (exact), then added with one rounding.
    """
    main_grads = operands["main_grads"]
    for main_grad, grad in zip(main_grads, operands["grads"], strict=True):
        target = flat_view(main_grad)
        wide = flat_view(grad).float()
        if overwrite:
            target.copy_(wide)
        else:
            target.copy_(target + wide)
    if partials is not None:
        sumsq_reference.sumsq(Operands(operands.op, {"tensors": main_grads}), partials)
