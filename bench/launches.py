"""Counts kernel launches of real optimizer steps in Triton's interpreter: ``python -m bench.launches`` prints JSON.

A process of its own, with ``TRITON_INTERPRET=1``: interpreter and compiler cannot share one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import gradkern as gk
from gradkern.ops._triton.launch import count_launches

__all__ = ["TENSORS", "main"]

TENSORS = (1, 148, 1500)
_FEW = 5

_OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda params: gk.AdamW(params, max_norm=1.0),
    "Adam": lambda params: gk.Adam(params, max_norm=1.0),
    "SGD": lambda params: gk.SGD(params, lr=0.1, momentum=0.9, max_norm=1.0),
    "Lion": lambda params: gk.Lion(params, max_norm=1.0),
    "AdamW int8": lambda params: gk.AdamW(params, max_norm=1.0, state="int8"),
    "AdamW master fp32": lambda params: gk.AdamW(params, max_norm=1.0, master="fp32"),
    "AdamW master split16": lambda params: gk.AdamW(params, max_norm=1.0, master="split16"),
    "AdamW master split8, int8": lambda params: gk.AdamW(params, max_norm=1.0, master="split8", state="int8"),
    "AdamW skip_nonfinite": lambda params: gk.AdamW(params, max_norm=1.0, skip_nonfinite=True),
}


def _params(count: int, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.full((3,), 0.5, dtype=dtype)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def main(tensors: Sequence[int] = TENSORS) -> None:
    """Count for these numbers of tensors with AdamW, for a few with everything else."""
    counts: list[tuple[str, int]] = []
    with gk.use_backend("triton"):
        for name, make in _OPTIMIZERS.items():
            for number in tensors if name == "AdamW" else (_FEW,):
                optimizer: Any = make(_params(number, torch.bfloat16 if "master" in name else torch.float32))
                with count_launches() as count:
                    optimizer.step()
                counts.append((f"{name} clip + step, {number} tensors", count.launches))
        params = _params(_FEW)
        accumulator = gk.GradAccumulator(params)
        with count_launches() as count:
            accumulator.accumulate_([torch.ones(3, dtype=torch.bfloat16) for _ in params])
        counts.append((f"accumulate + norm, {_FEW} tensors", count.launches))
    print(json.dumps(counts))


if __name__ == "__main__":
    main([int(number) for number in sys.argv[1:]] or TENSORS)
