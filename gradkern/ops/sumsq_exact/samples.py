"""Inputs of ``sumsq_exact`` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gradkern.ops._chunks import DTYPE_CODES
from gradkern.ops._spec import Sample
from gradkern.ops._values import SIZES, edge_values, random_values

__all__ = ["samples"]


def _spread(numel: int, exponents: int, highest: int) -> torch.Tensor:
    """Values of random significands over so many exponents below ``2**highest``, fp32, shape ``(numel,)``."""
    exponent = torch.randint(highest - exponents, highest, (numel,), generator=torch.Generator().manual_seed(exponents))
    return torch.ldexp(1.0 + random_values(numel, torch.float32).abs().clamp(max=0.99), exponent)


def samples() -> Iterator[Sample]:
    """Ordinary and edge values, ranges of exponents from one to all, full chunks of the largest and smallest values."""
    for dtype in DTYPE_CODES:
        yield Sample(f"{dtype}", ([random_values(n, dtype, seed=n) for n in SIZES],), {})
        yield Sample(f"{dtype} edges", ([edge_values(n, dtype) for n in SIZES],), {})
    # Around the widths at which a native loop takes one bin more, of fp32 (17 to 22, 38 to 44, 58 to 67, by instruction
    # set) and of bf16 (16 more, and 13 to 15); and beyond all of them.
    for exponents in (1, 17, 18, 19, 20, 21, 22, 38, 39, 42, 43, 44, 58, 59, 64, 66, 68, 250):
        tensors = [_spread(4096, exponents, 127), _spread(77, exponents, exponents - 126)]
        yield Sample(f"{exponents} exponents", (tensors,), {})
    for exponents in (1, 13, 14, 15, 16, 33, 34, 36, 37, 54, 55, 58, 59, 74, 75, 80, 81, 83):
        yield Sample(f"bf16 {exponents} exponents", ([_spread(4096, exponents, 127).bfloat16()],), {})
    info = torch.finfo(torch.float32)
    for name, value in {"largest": info.max, "smallest": 2.0**-149, "normal": info.tiny, "one": 1 - 2.0**-24}.items():
        yield Sample(f"{name} values", ([torch.full((8192,), value), torch.full((3,), -value)],), {})
    yield Sample("empty list", ([],), {})
