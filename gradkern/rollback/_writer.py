"""Writes finished steps to a ledger on a thread of its own, while training goes on.

Of steps there are at most two segments in memory: one that is being written and one that fills up. Where writing is
slower than training, handing over the second waits for the first.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from gradkern.rollback._cut import cut_after
from gradkern.rollback._layout import Layout
from gradkern.rollback._segment import Segment, StepRecord
from gradkern.rollback._store import StoreWriter

__all__ = ["Writer"]

# How often the bytes of a segment are in memory while it is written: as steps, as tensors of all steps, as a file.
_WRITING = 3

# Of a file, where nobody says how many steps it takes: small models make steps faster than a disk makes files durable.
_FULL_BYTES, _LEAST_STEPS, _MOST_STEPS = 1 << 22, 10, 1000


class _Job(NamedTuple):
    """Steps that were handed to the thread; the first has the number ``first_step``."""

    first_step: int
    steps: list[StepRecord]
    nbytes: int
    future: Future[None]


class Writer:
    """Commits steps in order, each exactly once, whatever interrupts it.

    Args:
        store: Where to; it says which step comes next.
        layout: Of the records.
        steps_per_segment: Steps in a file, but the last before :meth:`flush`; None for as many as make four
            megabytes, at least 10 and at most 1,000.

    Attributes:
        most_bytes: The most that steps have taken so far, with the copies of a segment that are made to write it.
    """

    def __init__(self, store: StoreWriter, layout: Layout, steps_per_segment: int | None) -> None:
        self._store = store
        self._layout = layout
        self._steps_per_segment = steps_per_segment
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="gradkern-ledger")
        # The number of the first of those that wait.
        self._first_step = store.steps
        self._waiting: list[StepRecord] = []
        self._waiting_bytes = 0
        self._job: _Job | None = None
        self.most_bytes = 0

    def put(self, step: StepRecord) -> None:
        """Take a step, to be committed with those around it."""
        if self._job is not None and self._job.future.done() and self._job.future.exception() is None:
            self._job = None  # or its steps would stay in memory until the next segment is full
        self._waiting_bytes += step.nbytes()
        written_bytes = 0 if self._job is None else _WRITING * self._job.nbytes
        self.most_bytes = max(self.most_bytes, self._waiting_bytes + written_bytes)
        self._waiting.append(step)

    def write_full(self) -> None:
        """Have a segment written if its steps are there.

        Raises:
            OSError, sqlite3.Error: The one before could not be written. Its steps and these are kept and are written
                with the next.
        """
        if self._is_full():
            self._hand_over()

    def flush(self) -> None:
        """Return once every step that was put is durable.

        Raises:
            OSError, sqlite3.Error: As :meth:`write_full`.
        """
        if self._waiting:
            self._hand_over()
        self._finish_job()

    def go_back(self, steps: int) -> None:
        """Take out what was recorded after ``steps`` steps; all of it must have been flushed.

        Raises:
            LedgerError: The segment to be cut is damaged; nothing has been changed then.
            OSError, sqlite3.Error: The ledger cannot be written.
        """
        cut_after(self._store, self._layout, steps)
        self._first_step = steps

    def close(self) -> None:
        """End the thread, after what it is doing; steps that were not handed to it are forgotten."""
        self._executor.shutdown()

    def _is_full(self) -> bool:
        if self._steps_per_segment is not None:
            return len(self._waiting) >= self._steps_per_segment
        enough = _LEAST_STEPS if self._waiting_bytes >= _FULL_BYTES else _MOST_STEPS
        return len(self._waiting) >= enough

    def _hand_over(self) -> None:
        self._finish_job()
        first_step, steps, nbytes = self._first_step, self._waiting, self._waiting_bytes
        self.most_bytes = max(self.most_bytes, _WRITING * nbytes)
        job = _Job(first_step, steps, nbytes, self._executor.submit(self._commit, first_step, steps))
        self._job, self._waiting, self._first_step, self._waiting_bytes = job, [], first_step + len(steps), 0

    def _finish_job(self) -> None:
        """Wait for the thread, and take back what it could not commit."""
        if self._job is None:
            return
        job, error = self._job, self._job.future.exception()
        if error is None:
            self._job = None
            return
        # Whether it took effect the next attempt finds out: now the catalog may be out of reach. At one blow, or an
        # interrupt would leave its steps in both places.
        steps, nbytes = job.steps + self._waiting, job.nbytes + self._waiting_bytes
        self._job, self._waiting, self._first_step, self._waiting_bytes = None, steps, job.first_step, nbytes
        raise error

    def _commit(self, first_step: int, steps: list[StepRecord]) -> None:
        # An earlier attempt may have taken effect before it was interrupted.
        steps = steps[max(0, self._store.committed_steps() - first_step) :]
        if steps:
            segment = Segment.build(self._layout, steps)
            self._store.commit_segment(segment.tensors(), segment.steps, len(segment.visit_ids))
