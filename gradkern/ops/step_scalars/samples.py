"""Inputs of ``step_scalars_`` for tests and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from gradkern.ops._chunks import DTYPE_CODES
from gradkern.ops._spec import Sample
from gradkern.ops._values import edge_values, random_values

__all__ = ["samples"]


def samples() -> Iterator[Sample]:
    """Clipping, not clipping, scaled, skipped; partials of every size, zero, tiny, huge, non-finite; gradients."""
    generator = torch.Generator().manual_seed(7)
    ordinary = torch.rand(300, dtype=torch.float64, generator=generator) * 1e3
    many = torch.rand(3000, dtype=torch.float64, generator=generator)  # more than one program takes
    # Sums of squares of fp32 values lie between 2^-298 and 2^268; what lies outside must not pass for something else.
    spread = torch.ldexp(torch.ones(640, dtype=torch.float64), torch.arange(-320, 320)) * 1.7
    inf = torch.tensor([1.0, math.inf], dtype=torch.float64)
    nan = torch.tensor([math.nan, math.inf], dtype=torch.float64)
    sizes = (1, 0, 513, 4096, 9001)
    by_dtype = {dtype: [random_values(n, dtype, seed=n) for n in sizes] for dtype in DTYPE_CODES}
    fp32 = by_dtype[torch.float32]
    cases = {
        "clips": ([ordinary], fp32[-2:], 1.0, None, None, False),
        "does not clip": ([ordinary], [], 1e9, None, None, False),
        "no threshold": ([ordinary], [], math.inf, None, None, False),
        "scaled": ([ordinary], [], 0.5, 1024.0, 0.0, False),
        "skipped": ([ordinary], fp32[:3], 0.5, 1024.0, 1.0, False),
        "skipped twice over": ([inf], [], 0.5, None, 1.0, True),
        "many": ([many, ordinary, many.flip(0)], [], 1.0, None, None, False),
        "every exponent": ([spread[20:-32], spread[20:-32].flip(0)], [], 1.0, None, None, False),
        "too small": ([spread[:40]], [], 1.0, None, None, False),
        "too large": ([spread[-40:]], [], 1.0, None, None, False),
        "one limb": ([spread[20:21]], [], 1.0, None, None, False),
        "highest limb": ([spread[600:607].repeat(50)], [], 1.0, None, None, False),
        "zero": ([torch.zeros(5, dtype=torch.float64)], [], 1.0, None, None, True),
        "nothing": ([], [], 1.0, None, None, True),
        "inf": ([inf], [], 1.0, None, None, False),
        "nan": ([nan], fp32[:1], 1.0, None, None, False),
        "inf without threshold": ([inf[1:]], [], math.inf, None, None, False),
        "inf skips": ([ordinary, inf], [], 1.0, 2.0, 0.0, True),
        "nan skips": ([nan], [], 1.0, None, None, True),
        "finite does not skip": ([ordinary], fp32, 1.0, None, None, True),
    }
    for dtype, grads in by_dtype.items():
        cases[f"{dtype} grads"] = ([], grads, 1.0, 2.0, None, False)
        cases[f"{dtype} edge grads"] = ([ordinary], [edge_values(n, dtype) for n in sizes], 1.0, None, None, True)
        cases[f"{dtype} finite edge grads"] = (
            [], [edge_values(n, dtype, finite=True) for n in sizes], 1.0, None, 0.0, True
        )  # fmt: skip
    for name, (partials, grads, max_norm, scale, found_inf, skip_nonfinite) in cases.items():
        scalars = torch.tensor([-1.0, -1.0, -1.0, -1.0, 3.0, 7.0], dtype=torch.float64)
        yield Sample(
            name,
            (scalars, [torch.arange(70.0), torch.tensor(41.0)], partials, grads),
            {
                "max_norm": max_norm,
                "grad_scale": None if scale is None else torch.tensor(scale),
                "found_inf": None if found_inf is None else torch.tensor(found_inf),
                "skip_nonfinite": skip_nonfinite,
            },
        )
