"""Inputs of ``step_scalars_`` for tests and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from gradkern.ops._spec import Sample

__all__ = ["samples"]


def samples() -> Iterator[Sample]:
    """Clipping, not clipping, scaled, skipped; partials of every size, zero, tiny, huge and non-finite."""
    generator = torch.Generator().manual_seed(7)
    ordinary = torch.rand(300, dtype=torch.float64, generator=generator) * 1e3
    # Sums of squares of fp32 values lie between 2^-298 and 2^268; what lies outside must not pass for something else.
    spread = torch.ldexp(torch.ones(640, dtype=torch.float64), torch.arange(-320, 320)) * 1.7
    cases = {
        "clips": ([ordinary], 1.0, None, None),
        "does not clip": ([ordinary], 1e9, None, None),
        "no threshold": ([ordinary], math.inf, None, None),
        "scaled": ([ordinary], 0.5, 1024.0, 0.0),
        "skipped": ([ordinary], 0.5, 1024.0, 1.0),
        "every exponent": ([spread[20:-32], spread[20:-32].flip(0)], 1.0, None, None),
        "too small": ([spread[:40]], 1.0, None, None),
        "too large": ([spread[-40:]], 1.0, None, None),
        "zero": ([torch.zeros(5, dtype=torch.float64)], 1.0, None, None),
        "nothing": ([], 1.0, None, None),
        "inf": ([torch.tensor([1.0, math.inf], dtype=torch.float64)], 1.0, None, None),
        "nan": ([torch.tensor([math.nan, math.inf], dtype=torch.float64)], 1.0, None, None),
        "inf without threshold": ([torch.tensor([math.inf], dtype=torch.float64)], math.inf, None, None),
    }
    for name, (partials, max_norm, scale, found_inf) in cases.items():
        yield Sample(
            name,
            (torch.zeros(8, dtype=torch.float64), [torch.arange(3.0), torch.tensor(41.0)], partials),
            {
                "max_norm": max_norm,
                "grad_scale": None if scale is None else torch.tensor(scale),
                "found_inf": None if found_inf is None else torch.tensor(found_inf),
            },
        )
