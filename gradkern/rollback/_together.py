"""The records of several ranks as those of one run: of every step those of rank 0, then those of rank 1, and so on.

Files of the ranks may end after different steps, so a segment made here goes as far as the files of all ranks do. The
order of visits and records within a step is always that one, so that sums have the same bits at every reading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from gradkern.errors import LedgerError
from gradkern.rollback._layout import Layout
from gradkern.rollback._records import RECORD_TYPES, Record
from gradkern.rollback._segment import Segment
from gradkern.rollback._store import FileEntry, StoreReader

__all__ = ["StepsDigest", "read_together"]


def read_together(store: StoreReader, *, backwards: bool) -> Iterator[Segment]:
    """The steps that all parts of a store have, from the first to the last or from the last to the first.

    One segment of each part is held at a time. Comparisons and what replaying needs are left out.

    Raises:
        LedgerError: A file is damaged, or the parts did not record the same steps.
    """
    ends = {entry.end_step for part in store.parts for entry in part.segments}
    spans = list(pairwise(sorted({0, store.steps, *(end for end in ends if end < store.steps)})))
    readers = [_PartReader(part) for part in store.parts]
    for first, end in reversed(spans) if backwards else spans:
        yield _together(store.layout, [reader.between(first, end) for reader in readers])


class _PartReader:
    """Reads pieces of one part, each file once as long as they come in order."""

    def __init__(self, part: StoreReader) -> None:
        self._part = part
        self._entry: FileEntry | None = None
        self._segment: Segment | None = None

    def between(self, first: int, end: int) -> Segment:
        """The steps from ``first`` to before ``end``, which lie in one file."""
        (entry,) = (each for each in self._part.segments if each.first_step <= first and end <= each.end_step)
        if self._segment is None or entry != self._entry:
            self._segment = None  # or two files would be held
            self._segment = Segment.from_tensors(self._part.layout, self._part.load(entry))
            self._entry = entry
        return _between(self._segment, first - entry.first_step, end - entry.first_step)


def _between(segment: Segment, first: int, end: int) -> Segment:
    """Some steps of a segment, as views."""
    low, high = segment.visit_bounds[[first, end]].tolist()
    records = {stream: record.between(low, high) for stream, record in segment.records.items()}
    return Segment(
        visit_ids=segment.visit_ids[low:high],
        curvature=segment.curvature[low:high],
        visit_bounds=segment.visit_bounds[first : end + 1] - low,
        scalars=segment.scalars[first:end],
        preconditioners={
            index: tuple(tensor[first:end] for tensor in stored) for index, stored in segment.preconditioners.items()
        },
        records={stream: replace(record, visit=record.visit - low) for stream, record in records.items()},
        fidelity=segment.fidelity[:0],
        comparisons=None,
    )


def _together(layout: Layout, parts: Sequence[Segment]) -> Segment:
    """Segments of the same steps, as one."""
    first = parts[0]
    for rank, part in enumerate(parts):
        # As bytes: NaN marks a parameter that a step left alone.
        if not torch.equal(part.scalars.view(torch.int64), first.scalars.view(torch.int64)):
            raise LedgerError(
                f"rank {rank} recorded other learning rates, decays or clip coefficients than rank 0, so that they did "
                f"not make the same steps; give every rank the same optimizer and the same schedule, and record again"
            )
    counts = torch.stack([part.visit_bounds.diff() for part in parts], dim=1)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), counts.flatten().cumsum(0)])
    starts = bounds[:-1].view_as(counts)
    steps = torch.arange(len(counts))
    visit_ids = torch.empty(int(bounds[-1]), dtype=torch.int64)
    curvature = torch.empty(len(visit_ids))
    found: dict[int, list[Record]] = {}
    places: dict[int, list[torch.Tensor]] = {}
    for rank, part in enumerate(parts):
        step = steps.repeat_interleave(counts[:, rank])
        number = torch.arange(len(step)) - part.visit_bounds[step] + starts[step, rank]
        visit_ids[number], curvature[number] = part.visit_ids, part.curvature
        for stream, record in part.records.items():
            visit = record.visit.long()
            found.setdefault(stream, []).append(replace(record, visit=number[visit].to(record.visit.dtype)))
            places.setdefault(stream, []).append(step[visit] * len(parts) + rank)
    return Segment(
        visit_ids=visit_ids,
        curvature=curvature,
        visit_bounds=bounds[:: len(parts)].clone(),
        scalars=first.scalars,
        preconditioners=first.preconditioners,
        records={
            stream: RECORD_TYPES[layout.streams[stream].kind]
            .join(each)
            .take(torch.cat(places[stream]).argsort(stable=True))
            for stream, each in found.items()
        },
        fidelity=first.fidelity[:0],
        comparisons=None,
    )


class StepsDigest:
    """What the optimizer did at some steps, which is the same in all ranks, as a number to compare.

    Args:
        layout: Of the records.
        steps: How many of the first steps count.
    """

    def __init__(self, layout: Layout, steps: int) -> None:
        self._parameters = len(layout.parameters)
        self._left = steps
        self._digest = hashlib.sha256()

    def add(self, segment: Segment) -> None:
        """Take the next segment."""
        for step in range(min(self._left, segment.steps)):
            self._left -= 1
            self._add(segment.scalars[step])
            for index in range(self._parameters):
                if segment.step_scalars(step, index) is not None:
                    for tensor in segment.preconditioners.get(index, ()):
                        self._add(tensor[step])

    def _add(self, tensor: torch.Tensor) -> None:
        self._digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def hex(self) -> str:
        """The number."""
        return self._digest.hexdigest()
