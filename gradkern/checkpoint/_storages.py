"""Which storages are alive behind a model, an optimizer, a batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Memory", "dense_parts", "device_of", "live_bytes", "rounded", "storages_of", "tensors_of"]

_CONTAINERS = (list, tuple, set, frozenset)

# CUDA's caching allocator gives out multiples of this (kMinBlockSize in torch's c10/cuda/CUDACachingAllocator.cpp).
_BLOCK_BYTES = 512


class Memory(Protocol):
    """What counts the bytes of tensors."""

    place: str
    """Type of the device whose tensors it counts."""

    @property
    def live_bytes(self) -> int:
        """Bytes alive now."""

    def owns(self, storage: torch.UntypedStorage) -> bool:
        """Whether ``live_bytes`` counts it."""

    def size_of(self, storage: torch.UntypedStorage) -> int:
        """Bytes that it counts for it."""


def rounded(nbytes: int) -> int:
    """Bytes of the block that CUDA's caching allocator gives out for so many."""
    return -(-nbytes // _BLOCK_BYTES) * _BLOCK_BYTES


def tensors_of(root: object) -> Iterator[Tensor]:
    """Yield the tensors that ``root`` holds, gradients included.

    Looked into: modules (parameters, buffers and plain attributes), containers and the attributes of ``root``
    itself. Other objects are not followed, for they may reach the whole program.
    """
    seen: set[int] = set()
    attributes = getattr(root, "__dict__", None)
    pending: list[Any] = [root]
    if attributes is not None and not isinstance(root, Tensor):
        pending.append(attributes)
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
            if item.is_leaf and item.grad is not None:
                pending.append(item.grad)
        elif isinstance(item, nn.Module):
            pending.append(vars(item))
        elif isinstance(item, Mapping):
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, _CONTAINERS):
            pending.extend(item)


def storages_of(*roots: object, places: Collection[str] = ("cpu",)) -> dict[int, torch.UntypedStorage]:
    """Return the storages behind ``roots`` on devices of these types, each once, keyed by identity."""
    found: dict[int, torch.UntypedStorage] = {}
    for root in roots:
        for tensor in tensors_of(root):
            for part in dense_parts(tensor):
                if part.device.type in places:
                    storage = part.untyped_storage()
                    found[storage._cdata] = storage
    return found


def live_bytes(allocator: Memory | None, *roots: object) -> int:
    """Count the bytes alive now.

    Args:
        allocator: With it: everything it counts, plus the storages behind ``roots`` that are older than it or
            were not allocated by torch. None: the storages behind ``roots`` alone.
        roots: Models, optimizers, batches; None is ignored.
    """
    if allocator is None:
        return sum(storage.nbytes() for storage in storages_of(*roots).values())
    storages = storages_of(*roots, places=(allocator.place,)).values()
    return allocator.live_bytes + sum(allocator.size_of(each) for each in storages if not allocator.owns(each))


def device_of(caller: str, *roots: object) -> torch.device:
    """The device whose memory counts for ``roots``: the GPU that all but scalars are on, or the CPU.

    Raises:
        ValueError: They are on two devices, or on something else.
    """
    cpu = torch.device("cpu")
    tensors = [tensor for root in roots for tensor in tensors_of(root)]
    devices = {tensor.device for tensor in tensors if tensor.dim() > 0 or tensor.device != cpu} or {cpu}
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise ValueError(
            f"{caller} measures the memory of the CPU or of one CUDA device, got tensors on "
            f"{', '.join(sorted(map(str, devices)))}; move all to one of those"
        )
    return devices.pop()


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that hold the data of ``tensor``."""
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]
