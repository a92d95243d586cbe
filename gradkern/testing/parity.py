"""Running samples of every op on any backend and comparing bit patterns."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from gradkern.ops import _registry
from gradkern.ops._spec import OpSpec, Sample

__all__ = ["all_samples", "run_sample", "same_bits"]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def all_samples() -> Iterator[tuple[OpSpec, Sample]]:
    """Every sample of every registered op."""
    for spec in _registry.SPECS.values():
        folder = spec.triton.rpartition(".")[0]
        for sample in importlib.import_module(f"{folder}.samples").samples():
            yield spec, sample


def run_sample(spec: OpSpec, sample: Sample, backend: str) -> list[torch.Tensor]:
    """Call the op on copies of the sample's tensors.

    Args:
        spec: The op.
        sample: Its arguments; not changed.
        backend: Name of the backend to force.

    Returns:
        Every tensor argument after the call, then the result if there is one.
    """
    args = [_copy(arg) for arg in sample.args]
    op = getattr(torch.ops.gradkern, spec.name)
    with _registry.use_backend(backend):
        result = op(*args, **sample.kwargs)
    return [*_tensors(args), *_tensors([result])]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bit patterns, any NaN counting as equal to any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = _INTEGERS[a.itemsize]
    equal = a.contiguous().view(integer) == b.contiguous().view(integer)
    if a.is_floating_point():
        equal |= a.isnan() & b.isnan()
    return bool(equal.all())


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _tensors(values: list[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list):
            yield from _tensors(value)
