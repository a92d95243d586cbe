"""Taking the last steps out of a ledger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gradkern.rollback._layout import Layout
from gradkern.rollback._segment import Segment
from gradkern.rollback._store import StoreReader, StoreWriter

__all__ = ["cut_after", "resume_store"]


def resume_store(
    path: Path, layout: Layout, settings: Mapping[str, str], ledger_id: str | None, steps: int
) -> StoreWriter:
    """Open a ledger to go on after ``steps`` steps, and take out what it holds of later ones.

    Raises:
        LedgerError: As :meth:`~gradkern.rollback._store.StoreWriter.resume` and :func:`cut_after`; nothing has been
            changed then.
        OSError, sqlite3.Error: The ledger cannot be written.
    """
    store = StoreWriter.resume(path, layout, settings, ledger_id, steps)
    try:
        cut_after(store, layout, steps)
    except BaseException:
        store.close()
        raise
    return store


def cut_after(store: StoreWriter, layout: Layout, steps: int) -> None:
    """Leave the ledger that a recording has after ``steps`` steps, with a file that ends there.

    Whatever interrupts this leaves the old ledger or the new one.

    Args:
        store: The ledger, which holds so many steps.
        layout: Its layout.
        steps: To keep.

    Raises:
        LedgerError: A segment has to be cut that is damaged, or older than what cutting needs; nothing has been changed
            then.
        OSError, sqlite3.Error: The ledger cannot be written.
    """
    found = StoreReader(store.path)
    head = None
    for entry in found.segments:
        if entry.first_step < steps < entry.end_step:
            segment = Segment.from_tensors(layout, found.load(entry)).head(steps - entry.first_step)
            head = (entry, segment.tensors(), len(segment.visit_ids))
    store.truncate(steps, head)
