"""Which storages are alive behind a model, an optimizer, a batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradkern.checkpoint._allocator import CountingAllocator

__all__ = ["dense_parts", "live_bytes", "require_cpu", "storages_of", "tensors_of"]

_CONTAINERS = (list, tuple, set, frozenset)


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


def live_bytes(allocator: CountingAllocator | None, *roots: object) -> int:
    """Count the bytes alive now.

    Args:
        allocator: With it: everything it counts, plus the storages behind ``roots`` that are older than it or
            were not allocated by torch. None: the storages behind ``roots`` alone.
        roots: Models, optimizers, batches; None is ignored.
    """
    storages = storages_of(*roots).values()
    if allocator is None:
        return sum(storage.nbytes() for storage in storages)
    unseen = sum(storage.nbytes() for storage in storages if not allocator.owns(storage))
    return allocator.live_bytes + unseen


def require_cpu(caller: str, tensors: Iterable[Tensor]) -> None:
    """Raise ValueError unless every tensor is in CPU memory."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{caller} measures CPU memory, got a tensor on {tensor.device}; move the model to the CPU, "
                "the only device supported in this version"
            )


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that hold the data of ``tensor``."""
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]
