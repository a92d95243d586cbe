"""Measuring a peak, and holding a program to one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import nn

from gradkern.checkpoint._allocator import load_allocator
from gradkern.checkpoint._bytes import format_bytes, parse_bytes
from gradkern.checkpoint._cuda import enforce_cuda
from gradkern.checkpoint._meter import interval_peak, make_meter
from gradkern.checkpoint._storages import device_of, live_bytes
from gradkern.errors import BudgetExceededError

__all__ = ["Peak", "enforce", "measure_peak"]

T = TypeVar("T")


@dataclass(frozen=True)
class Peak(Generic[T]):
    """What a call needed in tensor memory.

    Attributes:
        peak_bytes: Largest number of bytes alive at once, everything counted.
        start_bytes: Bytes alive when the call began.
        timeline: (seconds since the call began, live bytes), in order, the peak among them; at most 16384 samples
            with the hook, one for every allocation and free with the profiler.
        result: What the call returned.
        source: ``"allocator"`` (the hook counted), ``"profiler"`` (the hook is not available here) or ``"cuda"``
            (``torch.cuda.memory``; the timeline has its start and end alone).
    """

    peak_bytes: int
    start_bytes: int
    timeline: list[tuple[float, int]]
    result: T
    source: Literal["allocator", "profiler", "cuda"]


def measure_peak(
    fn: Callable[[], T],
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Peak[T]:
    """Call ``fn`` and measure the peak of tensor memory while it runs: of the CPU, or of the GPU ``model`` is on.

    With the allocator hook every CPU tensor made since the hook was installed counts, whoever holds it, a cycle
    that ``gc.collect()`` has not found yet too; tensors that are older (it is installed on first use) are found
    by walking ``model`` and ``optimizer``. If ``fn`` frees such older tensors, the peak is an upper bound. Without
    the hook the same allocations are read from ``torch.profiler`` and what was alive before is only what ``model``
    and ``optimizer`` hold. On CUDA it is what ``torch.cuda.memory_allocated`` counts, and
    ``torch.cuda.max_memory_allocated`` starts anew.

    Args:
        fn: Called once, without arguments, in this thread; what other threads allocate meanwhile counts too.
        model: Its parameters, buffers and gradients count.
        optimizer: Its state counts.

    Returns:
        A ``Peak``.

    Raises:
        TypeError: ``fn`` is not callable.
        ValueError: ``model`` or ``optimizer`` holds tensors on another device than the CPU or one GPU.
        RuntimeError: Called while another peak is being measured.

    Example:
        >>> measured = measure_peak(lambda: torch.ones(1000).sum())
        >>> measured.peak_bytes - measured.start_bytes >= 4000
        True
    """
    if not callable(fn):
        raise TypeError(f"measure_peak: fn must be callable without arguments, got {type(fn).__name__}")
    device = device_of("measure_peak", model, optimizer)
    meter = make_meter(device)
    start_bytes = live_bytes(meter.allocator, model, optimizer)
    with meter:
        result = fn()
    return Peak(
        peak_bytes=start_bytes + interval_peak(meter.marks),
        start_bytes=start_bytes,
        timeline=[(seconds, start_bytes + nbytes) for seconds, nbytes in meter.timeline],
        result=result,
        source="cuda" if device.type == "cuda" else "profiler" if meter.allocator is None else "allocator",
    )


@contextmanager
def enforce(
    budget: int | str,
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Iterator[None]:
    """Cap tensor memory, so that a CPU behaves like an accelerator with ``budget`` bytes, or a GPU like a smaller one.

    Inside the block an allocation that would raise the live bytes (counted as by ``measure_peak``) above the
    budget fails with ``torch.OutOfMemoryError``; if that error leaves the block it becomes a
    ``BudgetExceededError``. The cap ends with the block, and nothing but the failed call is disturbed. Where ``model``
    is on a GPU, the cap is one of torch's caching allocator there, for which gaps between blocks count too.

    Args:
        budget: Bytes, or text that ``parse_bytes`` reads.
        model: Its parameters, buffers and gradients count even where they are older than the hook.
        optimizer: Its state counts even where it is older than the hook.

    Raises:
        BackendUnavailableError: The allocator hook is not available; the message says why.
        BudgetExceededError: Already over the budget on entry, or an allocation in the block failed.
        RuntimeError: Entered inside another ``enforce``.
        TypeError: ``budget`` is neither ``int`` nor ``str``.
        ValueError: ``budget`` does not parse or is not positive, or tensors lie on another device than the CPU or
            one GPU.

    Example:
        >>> with enforce("2 GiB"):
        ...     total = torch.ones(1000).sum()
    """
    budget_bytes = parse_bytes(budget)
    device = device_of("enforce", model, optimizer)
    if device.type == "cuda":
        with enforce_cuda(budget_bytes, device):
            yield
        return
    allocator = load_allocator()
    if allocator.cap_bytes is not None:
        raise RuntimeError("a budget is being enforced already; enforce cannot be nested: leave the outer one")
    start_bytes = live_bytes(allocator, model, optimizer)
    if start_bytes > budget_bytes:
        raise BudgetExceededError(
            f"{format_bytes(start_bytes)} ({start_bytes} bytes) are alive already, more than the budget of "
            f"{budget_bytes} bytes; free tensors or raise the budget"
        )
    unseen_bytes = start_bytes - allocator.live_bytes
    allocator.set_cap(budget_bytes - unseen_bytes)
    refused_before = allocator.refused_count
    try:
        yield
    except RuntimeError as error:
        if allocator.refused_count == refused_before or "gradkern cap" not in str(error):
            raise
        raise BudgetExceededError(
            f"the budget of {format_bytes(budget_bytes)} ({budget_bytes} bytes, {unseen_bytes} of them older "
            f"than the counting allocator) was exceeded: {str(error).splitlines()[0]}; raise the budget or "
            "plan for this one with checkpoint.plan"
        ) from error
    finally:
        allocator.set_cap(None)
