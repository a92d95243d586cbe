"""Inputs of ``unstash_`` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gradkern.ops._chunks import DTYPE_CODES
from gradkern.ops._spec import Sample
from gradkern.ops._step.codecs import state_blocks
from gradkern.ops._values import SIZES

__all__ = ["samples"]


def samples() -> Iterator[Sample]:
    """Every dtype, multipliers that round, that keep and that spoil; every code under every exponent that fits."""
    generator = torch.Generator().manual_seed(5)
    codes = [torch.randint(0, 256, (n,), generator=generator).to(torch.uint8) for n in SIZES]
    exponents = [torch.randint(0, 256, (state_blocks(n),), generator=generator).to(torch.uint8) for n in SIZES]
    for dtype in DTYPE_CODES:
        for multiplier in (1.0, 0.3, float("nan")):
            grads = [torch.zeros(n, dtype=dtype) for n in SIZES]
            yield Sample(f"{dtype} times {multiplier}", (grads, codes, exponents, torch.tensor(multiplier)), {})
    yield Sample("empty lists", ([], [], [], torch.tensor(1.0)), {})
