"""Data sheets of the GPUs that a plan can be simulated for."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch

__all__ = ["GPUS", "Gpu", "find_gpu"]

_TERA, _GIGA = 10**12, 10**9


@dataclass(frozen=True)
class Gpu:
    """What its maker says of a GPU; dense rates, without sparsity.

    Attributes:
        name: As ``plan(..., gpu=)`` takes it.
        memory_bytes: Of its memory, all of it.
        bytes_per_s: Of its memory.
        half_flops: Floating point operations a second of matrix products in bf16 or fp16, accumulated in fp32.
        float_flops: The same in fp32, without TF32, which torch leaves off.
        workspace_bytes: What torch keeps for cuBLAS or hipBLAS once a matrix product has run.
        link_bytes_per_s: Of its link to the host, each way.
    """

    name: str
    memory_bytes: int
    bytes_per_s: float
    half_flops: float
    float_flops: float
    workspace_bytes: int
    link_bytes_per_s: float

    def flops(self, dtype: torch.dtype) -> float:
        """Operations a second of matrix products of a dtype; fp64 and integers as fp32."""
        return self.half_flops if dtype in (torch.bfloat16, torch.float16) else self.float_flops


# getChosenWorkspaceSize in torch's aten/src/ATen/cuda/CublasHandlePool.cpp: by architecture.
_AMPERE, _HOPPER, _CDNA3 = 8_519_680, 32 * 2**20, 128 * 2**20

# 16 lanes of PCI Express, fourth and fifth generation.
_PCIE4, _PCIE5 = 32 * _GIGA, 64 * _GIGA

GPUS = {
    gpu.name.casefold(): gpu
    for gpu in (
        Gpu("A100-40", 40 * _GIGA, 1.555 * _TERA, 312.0 * _TERA, 19.5 * _TERA, _AMPERE, _PCIE4),
        Gpu("A100-80", 80 * _GIGA, 2.039 * _TERA, 312.0 * _TERA, 19.5 * _TERA, _AMPERE, _PCIE4),
        Gpu("H100", 80 * _GIGA, 3.35 * _TERA, 989.4 * _TERA, 66.9 * _TERA, _HOPPER, _PCIE5),
        Gpu("H200", 141 * _GIGA, 4.8 * _TERA, 989.4 * _TERA, 66.9 * _TERA, _HOPPER, _PCIE5),
        Gpu("B200", 180 * _GIGA, 8.0 * _TERA, 2250.0 * _TERA, 75.0 * _TERA, _HOPPER, _PCIE5),
        Gpu("RTX4090", 24 * _GIGA, 1.008 * _TERA, 165.2 * _TERA, 82.6 * _TERA, _AMPERE, _PCIE4),
        Gpu("MI300X", 192 * _GIGA, 5.3 * _TERA, 1307.4 * _TERA, 163.4 * _TERA, _CDNA3, _PCIE5),
    )
}
"""By name, in lower case."""


def find_gpu(name: str) -> Gpu:
    """Return a GPU by its name, in any case, spaces left out.

    Raises:
        TypeError: The name is no text.
        ValueError: There is none of that name; the message lists them.
    """
    if not isinstance(name, str):
        raise TypeError(f"gpu must be a name such as 'H100', got {type(name).__name__}")
    key = name.casefold().replace(" ", "").replace("_", "-")
    if key not in GPUS:
        near = difflib.get_close_matches(key, GPUS, n=1, cutoff=0.6)
        hint = f"; did you mean {GPUS[near[0]].name}?" if near else ""
        raise ValueError(f"no data sheet for the GPU {name!r}; known: {', '.join(g.name for g in GPUS.values())}{hint}")
    return GPUS[key]
