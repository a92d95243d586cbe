"""Lists of parameter shapes that training really has."""

from __future__ import annotations

import random

__all__ = ["CASES"]

Shape = tuple[int, ...]


def gpt2_124m() -> list[Shape]:
    """GPT-2 small: 148 tensors, 124 M parameters."""
    block: list[Shape] = [
        (768,),
        (768,),
        (768, 2304),
        (2304,),
        (768, 768),
        (768,),
        (768,),
        (768,),
        (768, 3072),
        (3072,),
    ]
    block += [(3072, 768), (768,)]
    return [(50257, 768), (1024, 768), *block * 12, (768,), (768,)]


def small_1500() -> list[Shape]:
    """1,500 small tensors, 2.3 M parameters: launches and bookkeeping, not bandwidth."""
    draw = random.Random(0)
    return [(draw.randint(64, 3000),) for _ in range(1500)]


def large_8() -> list[Shape]:
    """8 matrices of 4096 x 4096, 134 M parameters: bandwidth, nothing else."""
    return [(4096, 4096)] * 8


CASES = {"gpt2_124m": gpt2_124m, "small_1500": small_1500, "large_8x4096x4096": large_8}
