"""Fewer, larger files in a ledger: what it holds stays the same."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from gradkern.rollback._segment import Segment
from gradkern.rollback._shards import open_store
from gradkern.rollback._store import FileEntry, StoreReader, StoreWriter

__all__ = ["compact"]


def compact(path: str | os.PathLike[str], *, segment_bytes: int = 1 << 26) -> int:
    """Join the neighbouring files of a ledger, and remove what a killed recorder left.

    Every query reads all files one after the other and holds one: short ones cost time, long ones memory. Nothing else
    changes, and whatever interrupts this leaves a ledger that is whole. Open it again for reading afterwards.

    Args:
        path: The ledger's folder; of a ledger of several ranks each shard is compacted by itself.
        segment_bytes: Files are joined as long as they come to no more than this together.

    Returns:
        How many files of records there are now.

    Raises:
        LedgerError: There is no ledger, it is damaged, or something records into it.
        ValueError: ``segment_bytes`` is below 1.
        OSError, sqlite3.Error: The ledger cannot be written.
    """
    if segment_bytes < 1:
        raise ValueError(f"compact: segment_bytes must be at least 1, got {segment_bytes}")
    return sum(_compact_part(part.path, segment_bytes) for part in open_store(Path(path)).parts)


def _compact_part(path: Path, segment_bytes: int) -> int:
    store, found = StoreWriter.open(path)
    try:
        for entries in _neighbours(found.segments, segment_bytes):
            _join(store, found, entries)
        store.remove_leftovers()
    finally:
        store.close()
    return len(StoreReader(path).segments)


def _neighbours(entries: Sequence[FileEntry], most_bytes: int) -> Iterator[list[FileEntry]]:
    """Runs of two or more files that come to no more than so many bytes."""
    run: list[FileEntry] = []
    for entry in [*entries, None]:
        if entry is None or sum(each.bytes for each in run) + entry.bytes > most_bytes:
            if len(run) > 1:
                yield run
            run = []
        if entry is not None:
            run.append(entry)


def _join(store: StoreWriter, found: StoreReader, entries: Sequence[FileEntry]) -> None:
    parts = [Segment.from_tensors(found.layout, found.load(entry)) for entry in entries]
    store.replace(entries, Segment.join(found.layout, parts).tensors())
