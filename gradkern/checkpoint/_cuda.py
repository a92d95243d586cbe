"""A GPU's memory, as ``torch.cuda.memory`` counts it: what tensors hold, not what the caching allocator keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradkern.checkpoint._bytes import format_bytes
from gradkern.checkpoint._storages import rounded
from gradkern.errors import BudgetExceededError

__all__ = ["CudaMemory", "enforce_cuda"]


class CudaMemory:
    """The memory of one GPU.

    Args:
        device: Which.
    """

    place = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def live_bytes(self) -> int:
        """Bytes that torch has given out and not got back, in blocks."""
        return torch.cuda.memory_allocated(self._device)

    def take_peak(self) -> int:
        """Return the largest live bytes since the last call."""
        peak_bytes = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak_bytes

    def wait(self) -> None:
        """Until the GPU has done what it was told to."""
        torch.cuda.synchronize(self._device)

    def owns(self, storage: torch.UntypedStorage) -> bool:
        """Whether ``live_bytes`` counts it: all that is there."""
        return storage.device == self._device

    def size_of(self, storage: torch.UntypedStorage) -> int:
        """Bytes of its block."""
        return rounded(storage.nbytes())


@contextmanager
def enforce_cuda(budget_bytes: int, device: torch.device) -> Iterator[None]:
    """Cap what torch's caching allocator takes from a GPU.

    Raises:
        BudgetExceededError: Tensors hold more already, or memory ran out in the block.
    """
    live_bytes = torch.cuda.memory_allocated(device)
    if live_bytes > budget_bytes:
        raise BudgetExceededError(
            f"{format_bytes(live_bytes)} ({live_bytes} bytes) are alive on {device} already, more than the budget of "
            f"{budget_bytes} bytes; free tensors or raise the budget"
        )
    before = torch.cuda.get_per_process_memory_fraction(device)
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()  # what it keeps for later counts too
    torch.cuda.set_per_process_memory_fraction(min(before, budget_bytes / total_bytes), device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BudgetExceededError(
            f"the budget of {format_bytes(budget_bytes)} ({budget_bytes} bytes) on {device} was exceeded: "
            f"{str(error).splitlines()[0]}; raise the budget or plan for this one with checkpoint.plan"
        ) from error
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
