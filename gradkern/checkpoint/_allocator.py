"""The counting CPU allocator of ``csrc/alloc``, through ctypes."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gradkern.errors import BackendUnavailableError

__all__ = ["LIBRARY", "CountingAllocator", "allocator_unavailable_reason", "load_allocator", "uncapped"]

LIBRARY = Path(__file__).resolve().parents[1] / "_alloc.so"

_TIMELINE_CAPACITY = 16384
_MAX_BYTES = 2**63 - 1


class CountingAllocator:
    """Counts the bytes of every CPU tensor allocated since it was installed. Made by ``load_allocator``."""

    place = "cpu"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("live_bytes", "take_peak", "timeline", "refused_count"):
            getattr(library, f"gradkern_alloc_{name}").restype = ctypes.c_int64
        library.gradkern_alloc_owns.argtypes = [ctypes.c_void_p]
        library.gradkern_alloc_set_cap.argtypes = [ctypes.c_int64]
        library.gradkern_alloc_set_cap.restype = None
        library.gradkern_alloc_timeline.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        self.is_recording = False
        self.cap_bytes: int | None = None

    @property
    def live_bytes(self) -> int:
        """Bytes allocated since installation and not yet freed."""
        return int(self._library.gradkern_alloc_live_bytes())

    @property
    def refused_count(self) -> int:
        """How many allocations the cap has refused since installation."""
        return int(self._library.gradkern_alloc_refused_count())

    def owns(self, storage: torch.UntypedStorage) -> bool:
        """Whether ``storage`` was allocated here, that is, whether ``live_bytes`` counts it."""
        return bool(self._library.gradkern_alloc_owns(storage._cdata))

    def size_of(self, storage: torch.UntypedStorage) -> int:
        """Bytes that ``live_bytes`` counts for a storage."""
        return storage.nbytes()

    def start_recording(self) -> None:
        """Begin a new peak and timeline.

        Raises:
            RuntimeError: Something is recording already.
        """
        if self.is_recording:
            raise RuntimeError(
                "a peak is being measured already; measure_peak and plan cannot run inside measure_peak: "
                "let the outer one finish first"
            )
        self._library.gradkern_alloc_start_recording()
        self.is_recording = True

    def stop_recording(self) -> None:
        """Stop recording; what was recorded stays readable."""
        self._library.gradkern_alloc_stop_recording()
        self.is_recording = False

    def take_peak(self) -> int:
        """Return the largest live bytes since recording began or since the last call."""
        return int(self._library.gradkern_alloc_take_peak())

    def timeline(self) -> list[tuple[float, int]]:
        """Return samples (seconds since recording began, live bytes), at most 16384, the peak among them."""
        times = (ctypes.c_int64 * _TIMELINE_CAPACITY)()
        live = (ctypes.c_int64 * _TIMELINE_CAPACITY)()
        count = self._library.gradkern_alloc_timeline(times, live, _TIMELINE_CAPACITY)
        return [(ns * 1e-9, nbytes) for ns, nbytes in itertools.islice(zip(times, live, strict=True), count)]

    def set_cap(self, cap_bytes: int | None) -> None:
        """Refuse allocations that would raise ``live_bytes`` above the cap; None lifts it."""
        self._library.gradkern_alloc_set_cap(-1 if cap_bytes is None else min(cap_bytes, _MAX_BYTES))
        self.cap_bytes = cap_bytes


def load_allocator() -> CountingAllocator:
    """Load the library and install the allocator for the rest of the process, or return the one installed.

    Raises:
        BackendUnavailableError: The library was not built, does not load, was built for another minor version
            of torch, or another library has replaced torch's CPU allocator.
    """
    return _load(LIBRARY)


@contextmanager
def uncapped() -> Iterator[None]:
    """Lift a cap while the block runs; nothing where there is none."""
    allocator = None if allocator_unavailable_reason() else load_allocator()
    cap_bytes = None if allocator is None else allocator.cap_bytes
    if allocator is None or cap_bytes is None:
        yield
        return
    allocator.set_cap(None)
    try:
        yield
    finally:
        allocator.set_cap(cap_bytes)


def allocator_unavailable_reason() -> str | None:
    """Say why the allocator hook is off, or return None where it counts.

    Where the hook was not installed yet and can be, this installs it for the rest of the process, as the first
    measurement would; later calls find it installed.
    """
    try:
        load_allocator()
    except BackendUnavailableError as error:
        return str(error)
    return None


@functools.cache
def _load(path: Path) -> CountingAllocator:
    """Load and install from ``path``; a failure is not cached."""
    if not path.exists():
        raise BackendUnavailableError(
            f"the CPU allocator hook was not built: {path} does not exist; install a C++ compiler and "
            "install gradkern again"
        )
    try:
        library = ctypes.CDLL(str(path))
        library.gradkern_alloc_torch_version.restype = ctypes.c_int64
    except (OSError, AttributeError) as error:  # AttributeError: a library, but not this one
        raise BackendUnavailableError(f"the CPU allocator hook does not load: {error}") from error
    built_major, built_minor = divmod(library.gradkern_alloc_torch_version(), 1000)
    running = torch.__version__.split(".")[:2]
    if [str(built_major), str(built_minor)] != running:
        raise BackendUnavailableError(
            f"the CPU allocator hook was built for torch {built_major}.{built_minor}, running is torch "
            f"{'.'.join(running)}; install gradkern again with the torch you run"
        )
    if library.gradkern_alloc_install() != 0:
        raise BackendUnavailableError(
            "another library has replaced torch's CPU allocator; gradkern's counting allocator will not "
            "replace it: measure in a process without that library"
        )
    return CountingAllocator(library)
