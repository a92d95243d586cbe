"""A GPU's memory, as ``torch.cuda.memory`` counts it: what tensors hold, not what the caching allocator keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradkern.checkpoint._bytes import format_bytes
from gradkern.checkpoint._storages import rounded
from gradkern.errors import BudgetExceededError

__all__ = ["CudaMemory", "enforce_cuda"]

# Devices whose peak is being measured, and that are capped: torch has one peak and one cap for each.
_recorded: set[torch.device] = set()
_capped: set[torch.device] = set()


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

    def start_recording(self) -> None:
        """Begin a new peak; that of ``torch.cuda.max_memory_allocated`` is lost.

        Raises:
            RuntimeError: Something is recording already.
        """
        if self._device in _recorded:
            raise RuntimeError(
                "a peak is being measured already; measure_peak and plan cannot run inside measure_peak: "
                "let the outer one finish first"
            )
        _recorded.add(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    def stop_recording(self) -> None:
        """Let others record."""
        _recorded.discard(self._device)

    def take_peak(self) -> int:
        """Wait for the GPU and return the largest live bytes since the last call."""
        torch.cuda.synchronize(self._device)
        peak_bytes = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak_bytes

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
        RuntimeError: Entered inside another.
    """
    if device in _capped:
        raise RuntimeError(
            f"a budget is being enforced on {device} already; enforce cannot be nested: leave the outer one"
        )
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
    _capped.add(device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BudgetExceededError(
            f"the budget of {format_bytes(budget_bytes)} ({budget_bytes} bytes) on {device} was exceeded: "
            f"{str(error).splitlines()[0]}; raise the budget or plan for this one with checkpoint.plan"
        ) from error
    finally:
        _capped.discard(device)
        torch.cuda.set_per_process_memory_fraction(before, device)
