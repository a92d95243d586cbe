"""Reference of ``stash_``: the signed 8-bit blocks of optimizer state, rounded by the words of the counter."""

from __future__ import annotations

import torch

from gradkern.ops._chunks import flat_view
from gradkern.ops._step.codecs import StateCodec, encode_state
from gradkern.ops._step.random import random_words
from gradkern.ops._table import Operands
from gradkern.ops.sumsq import reference as sumsq_reference

__all__ = ["stash_"]

_MOST_NEGATIVE, _CUT = 0x80, 0x81


def stash_(operands: Operands, partials: torch.Tensor) -> None:
    """``codes`` and ``exponents`` of ``grads``, rounded stochastically; ``partials`` of the ``grads`` themselves.

    Magnitudes are cut to code 127, so that nothing finite is rounded to infinity.
    """
    columns = (operands[name] for name in ("grads", "codes", "exponents"))
    for grad, codes, exponents, key in zip(*columns, operands.integers("keys"), strict=True):
        wide, flat = flat_view(grad).float(), flat_view(codes)
        words = random_words(key & 0xFFFFFFFF, wide.numel())
        infinity = 143 if grad.dtype == torch.float16 else 255  # 2^16 is beyond fp16
        encode_state(
            StateCodec.BLOCK8, wide, flat, exponents, key, signed=True, half=0, stirred=words, infinity=infinity
        )
        flat[flat == _MOST_NEGATIVE] = _CUT
    sumsq_reference.sumsq(Operands(operands.op, {"tensors": operands["grads"]}), partials)
