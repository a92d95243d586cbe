"""Going through what a ledger holds, one segment in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gradkern.rollback._segment import Segment
from gradkern.rollback._store import FileEntry, StoreReader
from gradkern.rollback._together import read_together

__all__ = ["read_segment", "read_segments", "recorded_ids"]


def read_segment(store: StoreReader, entry: FileEntry) -> Segment:
    """Read one.

    Raises:
        LedgerError: It is damaged.
    """
    return Segment.from_tensors(store.layout, store.load(entry))


def read_segments(store: StoreReader, *, backwards: bool = False) -> Iterator[Segment]:
    """All of them from the first step to the last, or from the last to the first."""
    if len(store.parts) > 1:
        return read_together(store, backwards=backwards)
    entries = reversed(store.segments) if backwards else store.segments
    return (read_segment(store, entry) for entry in entries)


def recorded_ids(store: StoreReader) -> Tensor:
    """The different sample ids, ascending, int64."""
    ids = [segment.visit_ids for segment in read_segments(store)]
    return torch.unique(torch.cat(ids)) if ids else torch.empty(0, dtype=torch.int64)
