"""Inputs of ``adamw_step_`` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gradkern.ops._chunks import DTYPE_CODES
from gradkern.ops._spec import Sample
from gradkern.ops._values import SIZES, edge_values, random_values

__all__ = ["samples"]

_HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "maximize": False}


def samples() -> Iterator[Sample]:
    """Every codec on every side, amsgrad, maximize, unequal steps, edge values, a skipped step."""
    fp32 = torch.float32
    for param in DTYPE_CODES:
        for grad in DTYPE_CODES:
            for state in {fp32, param}:
                yield _sample(f"{param} {grad} {state}", param, grad, state)
        yield _sample(f"{param} amsgrad maximize", param, param, param, amsgrad=True, maximize=True)
    yield _sample("edges", fp32, fp32, fp32, amsgrad=True, edges=True)
    yield _sample("skipped", fp32, fp32, fp32, skip=1.0)
    yield _sample("zero betas and eps", fp32, fp32, fp32, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0)
    yield Sample("empty lists", ([], [], [], [], [], [], _scalars(0.0)), dict(_HYPER))


def _scalars(skip: float) -> torch.Tensor:
    return torch.tensor([3.0, float(torch.tensor(0.3)), skip, 0.3], dtype=torch.float64)


def _sample(
    name: str,
    param: torch.dtype,
    grad: torch.dtype,
    state: torch.dtype,
    *,
    amsgrad: bool = False,
    edges: bool = False,
    skip: float = 0.0,
    **hyper: Any,
) -> Sample:
    grads = [edge_values(n, grad) if edges else random_values(n, grad, seed=n) for n in SIZES]
    second = [random_values(n, state, seed=n + 3).abs() for n in SIZES]
    args = (
        [random_values(n, param, seed=n + 1) for n in SIZES],
        grads,
        [random_values(n, state, seed=n + 2) for n in SIZES],
        second,
        [(s * 0.5 + 0.25).to(state) for s in second] if amsgrad else [],
        [torch.tensor(float(1 + 37 * i)) for i in range(len(SIZES))],
        _scalars(skip),
    )
    return Sample(name, args, {**_HYPER, **hyper})
