"""The fixed chunk that fixes the norm's bits, and how a tensor becomes a flat run of elements."""

from __future__ import annotations

import torch

__all__ = ["CHUNK", "DTYPE_CODES", "chunk_count", "flat_view", "is_dense", "kernel_can_read", "laid_alike"]

CHUNK = 4096
"""Elements in one chunk; ``kChunk`` in ``csrc/cpu/kernels.h``."""

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes that kernels store, with the codes shared with ``csrc``."""


def chunk_count(numel: int) -> int:
    """Chunks of a tensor of ``numel`` elements."""
    return -(-numel // CHUNK)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one run of memory without gaps or overlaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda d: (d[1], d[0])):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def laid_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape lie alike: strides of dimensions of size one lead nowhere."""
    return a.shape == b.shape and all(
        size == 1 or one == other for size, one, other in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def flat_view(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in memory order, shape ``(numel,)``, sharing memory; ``tensor`` must be dense.

    Memory order, not logical order, is what chunks are cut from, so that a kernel never has to know strides.
    """
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.as_strided((tensor.numel(),), (1,))


def kernel_can_read(tensor: torch.Tensor) -> bool:
    """Whether kernels can walk the tensor's memory: a plain dense tensor of a dtype that they store.

    Subclasses (DTensor and other wrappers) have no memory of their own, nor do tensors on the meta device.
    """
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.dtype in DTYPE_CODES
        and tensor.layout == torch.strided
        and not tensor.is_meta
        and is_dense(tensor)
    )
