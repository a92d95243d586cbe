"""Meters: live bytes between marks, counted by the allocator hook or, without it, by torch's profiler."""

from __future__ import annotations

import functools
import itertools
import math
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from gradkern.checkpoint._allocator import CountingAllocator, load_allocator
from gradkern.checkpoint._cuda import CudaMemory
from gradkern.checkpoint._offload import Link, link_of
from gradkern.checkpoint._storages import Memory, dense_parts
from gradkern.errors import BackendUnavailableError

__all__ = ["Machine", "Mark", "Meter", "Source", "interval_peak", "make_meter"]

_CPU = torch.device("cpu")

# Of an operator's calls, to find what selective checkpointing adds to one.
_CALLS, _TIMED = 50, 5


class Mark(NamedTuple):
    """Memory at one instant; bytes are relative to the start of the meter.

    Attributes:
        live_bytes: Bytes alive at the mark.
        peak_bytes: Largest live bytes since the previous mark (or the start).
        time_s: A monotonic clock.
    """

    live_bytes: int
    peak_bytes: int
    time_s: float


class Meter(Protocol):
    """A context manager that counts; ``marks`` and ``timeline`` are complete once it has exited.

    The meter marks its own start and end, so the marks of a run without calls of ``mark`` are two.
    """

    allocator: Memory | None
    marks: list[Mark]
    timeline: list[tuple[float, int]]

    def __enter__(self) -> Meter: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def mark(self) -> None:
        """Close the current interval and begin the next."""

    def bytes_of(self, tensor: Tensor) -> int:
        """Bytes that it counts for a tensor that has a storage of its own."""


class Source(Protocol):
    """Where costs are read: from the machine that runs, or from a simulation of another."""

    compares_bits: bool
    """Whether tensors hold values."""

    @property
    def select_s(self) -> float:
        """Seconds that recomputing but for some outputs adds for every operator, forward and again together."""

    def meter(self) -> Meter:
        """A new meter."""

    def clock(self) -> float:
        """Seconds."""

    def link(self, device: torch.device) -> Link | None:
        """The link of a device to its host; None where it is the host."""


class Machine:
    """This machine's own memory and clock.

    Args:
        device: The CPU or a GPU, which is waited for before the clock is read.
    """

    compares_bits = True

    def __init__(self, device: torch.device = _CPU) -> None:
        self._device = device

    @property
    def select_s(self) -> float:
        """Seconds for an operator under torch's selective checkpointing, twice; measured once."""
        return _select_seconds()

    def meter(self) -> Meter:
        """Return what counts the device's memory."""
        return make_meter(self._device)

    def clock(self) -> float:
        """Return a monotonic time."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def link(self, device: torch.device) -> Link | None:
        """Return the device's own."""
        return link_of(device)


@functools.cache
def _select_seconds() -> float:
    """Least of a few measurements: an operator of next to no work, with and without the modes around it."""
    value = torch.zeros(8)
    least = {True: math.inf, False: math.inf}
    for is_selective in (False, True) * _TIMED:
        with ExitStack() as stack:
            if is_selective:
                forward, _ = create_selective_checkpoint_contexts([torch.ops.aten.mm.default])
                stack.enter_context(forward)
            start_s = time.perf_counter()
            for _ in range(_CALLS):
                value.neg()
            least[is_selective] = min(least[is_selective], time.perf_counter() - start_s)
    return 2 * max(0.0, least[True] - least[False]) / _CALLS


def make_meter(device: torch.device = _CPU) -> Meter:
    """Return a meter of a device: of the CPU the allocator hook where it is available, else the profiler."""
    if device.type == "cuda":
        return AllocatorMeter(CudaMemory(device))
    try:
        return AllocatorMeter(load_allocator())
    except BackendUnavailableError:
        return ProfilerMeter()


class AllocatorMeter:
    """Counts with the allocator hook, exact and blind to nothing, or on a GPU with torch's own counter."""

    def __init__(self, allocator: CountingAllocator | CudaMemory) -> None:
        self.allocator: Memory | None = allocator
        self._allocator = allocator
        self.marks: list[Mark] = []
        self.timeline: list[tuple[float, int]] = []

    def __enter__(self) -> AllocatorMeter:
        self._allocator.start_recording()
        self._start_bytes = self._allocator.live_bytes
        self.mark()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.mark()
        self._allocator.stop_recording()
        if isinstance(self._allocator, CudaMemory):
            # Of single allocations it tells only with a history of all.
            self.timeline = [(mark.time_s - self.marks[0].time_s, mark.live_bytes) for mark in self.marks]
        else:
            self.timeline = [(seconds, nbytes - self._start_bytes) for seconds, nbytes in self._allocator.timeline()]

    def mark(self) -> None:
        """Close the current interval and begin the next."""
        live = self._allocator.live_bytes - self._start_bytes
        peak = self._allocator.take_peak() - self._start_bytes
        self.marks.append(Mark(live, peak, time.perf_counter()))

    def bytes_of(self, tensor: Tensor) -> int:
        """Bytes that it counts for the dense parts of a tensor."""
        return sum(self._allocator.size_of(part.untyped_storage()) for part in dense_parts(tensor))


class ProfilerMeter:
    """Counts by the allocation events of ``torch.profiler``: same bytes, slower, known only afterwards.

    Frees of blocks allocated before the meter started carry no size in torch's events and are not seen.
    """

    allocator: Memory | None = None

    _MARK = "gradkern.mark"

    def __init__(self) -> None:
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._mark_times: list[float] = []
        self.marks: list[Mark] = []
        self.timeline: list[tuple[float, int]] = []

    def __enter__(self) -> ProfilerMeter:
        self._profiler.start()
        self.mark()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.mark()
        self._profiler.stop()
        self._read_events()

    def mark(self) -> None:
        """Close the current interval and begin the next."""
        self._mark_times.append(time.perf_counter())
        with record_function(self._MARK):
            pass

    def bytes_of(self, tensor: Tensor) -> int:
        """Bytes of the dense parts of a tensor."""
        return sum(part.untyped_storage().nbytes() for part in dense_parts(tensor))

    def _read_events(self) -> None:
        """Replay the events in order of time."""
        results = self._profiler.profiler.kineto_results if self._profiler.profiler else None
        # torch's stubs omit nbytes from the event type.
        unsorted: list[Any] = list(results.events()) if results else []
        events = sorted(unsorted, key=lambda event: event.start_ns())
        times = iter(self._mark_times)
        live = peak = 0
        start_ns = events[0].start_ns() if events else 0
        for event in events:
            if event.name() == self._MARK:
                self.marks.append(Mark(live, peak, next(times)))
                peak = live
            elif event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
                self.timeline.append(((event.start_ns() - start_ns) * 1e-9, live))


def interval_peak(marks: list[Mark]) -> int:
    """Return the largest live bytes over a whole run of marks."""
    return max(later.peak_bytes for _, later in itertools.pairwise(marks))
